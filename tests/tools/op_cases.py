"""The ops' formulas in eager PyTorch, cases of every size, and the policy for low precision."""

import itertools
import math

import torch
import torch.nn.functional as F

from vapt_fast import functional
from vapt_fast.activations import ACTIVATIONS

POOL = {"num_prefix": 2, "eps": 1e-6, "prompt_eps": 1e-5}


# ---- each op's formula, literally


def add_norm_formula(x, branch=None, weight=None, bias=None, *, layer_scale=None, eps):
    total = x if branch is None else x + (branch if layer_scale is None else layer_scale * branch)
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def pool_formula(
    x,
    matrix,
    weight,
    bias,
    *,
    branch=None,
    layer_scale=None,
    norm_weight=None,
    norm_bias=None,
    num_prefix,
    eps,
    prompt_eps,
):
    total, normed = add_norm_formula(x, branch, norm_weight, norm_bias, layer_scale=layer_scale, eps=eps)
    z = F.layer_norm(total[:, num_prefix:], x.shape[-1:], weight, bias, prompt_eps)
    return total, normed, matrix @ z


def attention_formula(q, k, v, prompt_k, prompt_v, *, scale, bias=None):
    batch, groups = q.shape[0], q.shape[2] // k.shape[2]
    keys = torch.cat([prompt_k.expand(batch, -1, -1, -1), k], dim=1).repeat_interleave(groups, dim=2)
    values = torch.cat([prompt_v.expand(batch, -1, -1, -1), v], dim=1).repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    if bias is not None:
        scores = scores + F.pad(bias, (prompt_k.shape[1], 0))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


def packed_formula(qkv, prompt_kv, *, num_heads, num_kv_heads, scale, bias=None):
    dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    q, kv = qkv.tensor_split([num_heads * dim], dim=-1)
    parts = (q, *kv.chunk(2, dim=-1), *prompt_kv.chunk(2, dim=-1))
    return attention_formula(*(t.unflatten(-1, (-1, dim)) for t in parts), scale=scale, bias=bias)


def cls_formula(q, x, prompts, key_weight, value_weight, *, scale, bias=None):
    def heads(weight, rows):
        return torch.einsum("hdc,bnc->bnhd", weight, rows)

    return attention_formula(
        q,
        heads(key_weight, x),
        heads(value_weight, x),
        heads(key_weight, prompts),
        heads(value_weight, prompts),
        scale=scale,
        bias=bias,
    )


def projector_formula(
    pooled,
    bias,
    down=None,
    up=None,
    scale=1.0,
    *,
    channel_mask=None,
    feature_mask=None,
    activation="relu",
    eps=None,
    norm_weight=None,
    norm_bias=None,
):
    t = (pooled if channel_mask is None else pooled * channel_mask) + bias[:, None]
    if down is not None:
        features = ACTIVATIONS[activation](t @ down.t())
        t = t + scale * ((features if feature_mask is None else features * feature_mask) @ up.t())
    return t if eps is None else F.layer_norm(t, t.shape[-1:], norm_weight, norm_bias, eps)


def mlp_formula(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    hidden = F.linear(x, fc1_weight, fc1_bias).double()
    activated = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return F.linear(activated.to(x.dtype), fc2_weight, fc2_bias)


# ---- arguments


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_name(function, names):
    """``function`` with the tensors of these ``names`` as its first arguments."""
    return lambda *tensors, **options: function(**dict(zip(names, tensors, strict=True)), **options)


def case_by_name(op, formula, tensors, frozen, options):
    """A case of ``tensors`` by name; those that are None or ``frozen``, and need no gradient, are options."""
    names = [name for name, tensor in tensors.items() if tensor is not None and name not in frozen]
    options = {name: tensor for name, tensor in tensors.items() if name not in names} | options
    return by_name(op, names), by_name(formula, names), [tensors[name] for name in names], options


# What belongs to the backbone among the arguments of the ops that cases have as options.
FROZEN = (
    *("weight", "bias", "norm_weight", "norm_bias", "layer_scale"),
    *("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
)


def affine_of(dim, names=("norm_weight", "norm_bias")):
    """The affine of a norm over ``dim`` channels by name, its weight zero in some of them; None without."""
    if dim is None:
        return dict.fromkeys(names)
    weight, bias = rand(dim), rand(dim)
    weight[1::3] = 0.0
    return dict(zip(names, (weight, bias), strict=True))


def add_norm_case(batch=2, tokens=5, dim=6, branch=True, layer_scale=True, affine=True, learned=False):
    """With ``learned``, weight, bias and layer_scale need gradients too."""
    tensors = {"x": rand(batch, tokens, dim), "branch": rand(batch, tokens, dim) if branch else None}
    tensors |= affine_of(dim if affine else None, ("weight", "bias"))
    tensors |= {"layer_scale": rand(dim) if branch and layer_scale else None}
    frozen = () if learned else FROZEN
    return case_by_name(functional.add_norm, add_norm_formula, tensors, frozen, {"eps": 1e-6})


def pool_case(
    batch=2, prefix=2, patches=9, dim=6, rows=3, branch=True, layer_scale=True, affine=True, learned=False
):
    """With ``learned``, the layer_scale and the affine need gradients too."""
    tensors = {"x": rand(batch, prefix + patches, dim), "matrix": rand(rows, patches)}
    tensors |= {"weight": rand(dim), "bias": rand(dim)}
    tensors |= {"branch": rand(batch, prefix + patches, dim) if branch else None}
    tensors |= {"layer_scale": rand(dim) if branch and layer_scale else None}
    tensors |= affine_of(dim if affine else None)
    frozen = () if learned else ("layer_scale", "norm_weight", "norm_bias")
    options = {**POOL, "num_prefix": prefix}
    return case_by_name(functional.prompt_pool, pool_formula, tensors, frozen, options)


def attention_case(
    batch=2, queries=5, tokens=7, heads=4, groups=4, dim=3, prompts=2, shared=False, bias=False
):
    one = 1 if shared else batch
    tensors = [
        rand(batch, queries, heads, dim),
        rand(batch, tokens, groups, dim),
        rand(batch, tokens, groups, dim),
    ]
    tensors += [rand(one, prompts, groups, dim), rand(one, prompts, groups, dim)]
    options = {"scale": 0.7, "bias": rand(1, heads, queries, tokens) if bias else None}
    return functional.prompt_attention, attention_formula, tensors, options


def packed_case(batch=2, tokens=7, heads=4, groups=4, dim=3, prompts=2, shared=False, bias=False):
    tensors = [rand(batch, tokens, (heads + 2 * groups) * dim)]
    tensors += [rand(1 if shared else batch, prompts, 2 * groups * dim)]
    options = {"num_heads": heads, "num_kv_heads": groups, "scale": 0.7}
    options |= {"bias": rand(1, heads, tokens, tokens) if bias else None}
    return functional.prompt_attention_packed, packed_formula, tensors, options


def mlp_case(batch=2, tokens=5, dim=6, hidden=8, out=6, bias=True, learned=False):
    """With ``learned``, weights and biases need gradients too."""
    tensors = {"x": rand(batch, tokens, dim)}
    tensors |= {"fc1_weight": rand(hidden, dim), "fc1_bias": rand(hidden) if bias else None}
    tensors |= {"fc2_weight": rand(out, hidden), "fc2_bias": rand(out) if bias else None}
    frozen = () if learned else FROZEN
    return case_by_name(functional.mlp, mlp_formula, tensors, frozen, {})


def cls_case(batch=2, rows=1, tokens=7, heads=3, dim=2, channels=6, prompts=2, shared=False, bias=False):
    tensors = [rand(batch, rows, heads, dim), rand(batch, tokens, channels)]
    tensors += [rand(1 if shared else batch, prompts, channels)]
    tensors += [rand(heads, dim, channels), rand(heads, dim, channels)]
    options = {"scale": 0.7, "bias": rand(1, heads, rows, tokens) if bias else None}
    return functional.absorbed_attention, cls_formula, tensors, options


def projector_case(
    batch=2,
    prompts=3,
    dim=6,
    width=4,
    activation="relu",
    masked=False,
    eps=None,
    affine=True,
    learned_scale=False,
    learned=False,
):
    """A ``width`` of None: no projector. With ``learned``, the affine, if there is one, needs gradients."""
    tensors = {"pooled": rand(batch, prompts, dim), "bias": rand(prompts)}
    options = {"activation": activation, "eps": eps}
    if masked:
        options["channel_mask"] = torch.randint(0, 2, (batch, 1, dim)).double() * 2
    if width is not None:
        tensors |= {"down": rand(width, dim), "up": rand(dim, width)}
        tensors |= {"scale": rand(1)} if learned_scale else {}
        if masked:
            options["feature_mask"] = torch.randint(0, 2, (batch, prompts, width)).double() * 2
    tensors |= affine_of(dim if affine and eps is not None else None)
    frozen = () if learned else ("norm_weight", "norm_bias")
    return case_by_name(functional.prompt_projector, projector_formula, tensors, frozen, options)


# What a projector's norm can be: eps, and whether there is an affine.
NORMS = ((None, False), (1e-6, False), (1e-6, True))

CASES = {
    **{
        f"add_norm-B{b}-T{t}-C{c}-branch{d}-layer_scale{g}-affine{a}": (
            add_norm_case,
            {"batch": b, "tokens": t, "dim": c, "branch": d, "layer_scale": g, "affine": a, "learned": True},
        )
        for (b, t, c), (d, g), a in itertools.product(
            (
                *itertools.product((1, 3), (1, 5), (1, 5, 64)),
                *((2, 197, 48), (1, 5, 768), (0, 5, 6), (2, 0, 6)),
            ),
            ((False, False), (True, False), (True, True)),
            (False, True),
        )
    },
    **{
        f"pool-B{b}-S{s}-N{n}-C{c}-R{r}-branch-layer_scale{g}-affine{a}": (
            pool_case,
            {"batch": b, "prefix": s, "patches": n, "dim": c, "rows": r, "branch": True, "layer_scale": g}
            | {"affine": a, "learned": True},
        )
        for (b, s, n, c, r), g, a in itertools.product(
            (
                *itertools.product((1, 3), (0, 5), (1, 16), (5, 64), (1, 10)),
                *((0, 1, 4, 6, 3), (2, 1, 4, 6, 0)),
            ),
            (False, True),
            (False, True),
        )
    },
    **{
        f"pool-B{b}-S{s}-N{n}-C{c}-R{r}-affine{a}": (
            pool_case,
            {"batch": b, "prefix": s, "patches": n, "dim": c, "rows": r, "branch": False, "affine": a}
            | {"learned": a},
        )
        for (b, s, n, c, r), a in itertools.product(
            (
                *itertools.product((1, 3), (0, 1, 5), (1, 16), (5, 64), (1, 10)),
                *((2, 1, 196, 48, 50), (0, 1, 4, 6, 3), (2, 1, 4, 6, 0)),
            ),
            (False, True),
        )
    },
    **{
        f"attention-B{b}-q{q}-T{t}-h{h}/{g}-d{d}-P{p}-shared{s}-bias{m}": (
            attention_case,
            {"batch": b, "queries": q, "tokens": t, "heads": h, "groups": g, "dim": d, "prompts": p}
            | {"shared": s, "bias": m},
        )
        for b, q, t, (h, g), d, p, s, m in [
            *itertools.product(
                (2,), (1, 6), (6,), ((4, 4), (4, 2)), (3, 8), (0, 1, 5), (False, True), (False, True)
            ),
            (1, 197, 197, (2, 2), 32, 10, False, False),
            (0, 5, 5, (2, 2), 4, 3, False, False),
        ]
    },
    **{
        f"packed-B{b}-T{t}-h{h}/{g}-d{d}-P{p}-shared{s}-bias{m}": (
            packed_case,
            {"batch": b, "tokens": t, "heads": h, "groups": g, "dim": d, "prompts": p}
            | {"shared": s, "bias": m},
        )
        for b, t, (h, g), d, p, s, m in [
            *itertools.product((2,), (1, 6), ((2, 2), (4, 2)), (1, 8), (0, 5), (False, True), (False, True)),
            (0, 5, (2, 2), 4, 3, False, False),
        ]
    },
    **{
        f"mlp-B{b}-T{t}-C{c}-D{d}-E{e}-bias{m}-learned{x}": (
            mlp_case,
            {"batch": b, "tokens": t, "dim": c, "hidden": d, "out": e, "bias": m, "learned": x},
        )
        for b, t, (c, d, e), m, x in itertools.product(
            (0, 1, 3), (1, 5, 17), ((1, 1, 1), (6, 24, 6), (5, 3, 7)), (False, True), (False, True)
        )
    },
    **{
        f"cls-R{r}-T{t}-P{p}-shared{s}-bias{m}": (
            cls_case,
            {"rows": r, "tokens": t, "prompts": p, "shared": s, "bias": m},
        )
        for r, t, p, s, m in itertools.product((1, 2), (1, 17), (0, 1, 10), (False, True), (False, True))
    },
    **{
        f"projector-{a}-B{b}-P{p}-C{c}-r{w}-masked{m}-eps{e}-affine{f}-scaled{s}": (
            projector_case,
            {"activation": a, "batch": b, "prompts": p, "dim": c, "width": w}
            | {"masked": m, "eps": e, "affine": f, "learned_scale": s, "learned": True},
        )
        for a, b, p, c, w, m, (e, f), s in [
            *itertools.product(ACTIVATIONS, (2,), (3,), (6,), (4,), (False, True), NORMS, (False, True)),
            *itertools.product(("relu",), (1, 3), (1, 10), (5, 64), (None, 1, 8), (True,), NORMS, (False,)),
            ("relu", 2, 0, 6, 8, True, (1e-6, True), True),
            ("relu", 0, 3, 6, 8, True, (1e-6, True), True),
        ]
    },
}


def results(op, tensors, options, seed=1):
    """Outputs of ``op`` and gradients of all ``tensors`` under fixed random output gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = {"dtype": torch.float64, "device": "cpu", "generator": torch.Generator().manual_seed(seed)}
    incoming = [torch.randn(o.shape, **random).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, incoming, materialize_grads=True)
    return [o.detach() for o in outputs], list(grads)


def assert_same_results(actual, expected, tolerance, message=None):
    """Outputs and gradients agree in shape, dtype and, up to ``tolerance`` relative or absolute, in value."""
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=message)


GRADCHECK = [
    *[
        (add_norm_case, {"batch": b, "branch": d, "layer_scale": g, "affine": a, "learned": True})
        for b in (1, 2)
        for d, g in ((False, False), (True, False), (True, True))
        for a in (False, True)
    ],
    *[
        (
            pool_case,
            {"batch": b, "prefix": s, "patches": 4, "dim": 5, "rows": r, "branch": True, "layer_scale": g}
            | {"affine": a, "learned": True},
        )
        for b in (1, 2)
        for s in (0, 2)
        for r, g in ((1, False), (2, False), (3, True))
        for a in (False, True)
    ],
    *[
        (
            pool_case,
            {"batch": b, "prefix": s, "patches": 4, "dim": 5, "rows": r, "branch": False, "affine": False},
        )
        for b in (1, 2)
        for s in (0, 2)
        for r in (1, 2, 3)
    ],
    *[
        (attention_case, {"heads": 2, "groups": g, "prompts": p, "shared": s, "bias": m})
        for g in (1, 2)
        for p in (0, 2)
        for s in (False, True)
        for m in (False, True)
    ],
    *[
        (packed_case, {"heads": 2, "groups": g, "prompts": p, "shared": s, "bias": m})
        for g in (1, 2)
        for p in (0, 2)
        for s in (False, True)
        for m in (False, True)
    ],
    *[
        (mlp_case, {"batch": b, "tokens": t, "bias": m, "learned": x})
        for b in (1, 2)
        for t in (1, 3)
        for m in (False, True)
        for x in (False, True)
    ],
    *[
        (cls_case, {"rows": r, "prompts": p, "shared": s, "bias": m})
        for r in (1, 2)
        for p in (0, 2)
        for s in (False, True)
        for m in (False, True)
    ],
    *[
        (
            projector_case,
            {"activation": a, "masked": m, "eps": e, "affine": f, "learned_scale": True, "learned": True},
        )
        for a in ("gelu", "sigmoid", "softmax")
        for m in (False, True)
        for e, f in ((None, False), (0.1, False), (0.1, True))
    ],
]


def far_from_zero(seed, make, **sizes):
    """A case of a norm with mean / std = 1e4, and a constant row: variance 0, rstd 1000."""
    torch.manual_seed(seed)
    op, formula, (x, *rest), options = make(dim=64, **sizes)
    x = x + 1e4
    x[:, 3] = 7.0
    for branch in (t for t in rest if t.shape == x.shape):
        branch[:, 3] = 0.0
    return op, formula, [x, *rest], options


# ---- low precision


def sdpa_formula(q, k, v, prompt_k, prompt_v, *, scale, bias=None):
    """attention_formula as anyone would run it in low precision."""
    batch, groups = q.shape[0], q.shape[2] // k.shape[2]
    keys = torch.cat([prompt_k.expand(batch, -1, -1, -1), k], dim=1).repeat_interleave(groups, dim=2)
    values = torch.cat([prompt_v.expand(batch, -1, -1, -1), v], dim=1).repeat_interleave(groups, dim=2)
    q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, scale=scale).transpose(1, 2)


def _with_frozen(options, dtype):
    """``options`` with what is frozen among them in ``dtype``."""
    return {
        name: value.to(dtype) if name in FROZEN and value is not None else value
        for name, value in options.items()
    }


def assert_policy(make, cases, dtype):
    """The one policy for low precision.

    Over all cases, the largest error of each output and gradient against float64, relative to its max|exact|,
    is at most that of eager PyTorch in the same dtype (float32: twice that), plus 2 eps.
    """
    # What comes from the backbone is in ``dtype``; the prompts' own arithmetic is at least float32.
    low = {pool_case: (0, *range(4, 8)), projector_case: ()}.get(make, range(9))
    errors, dtypes = [], []
    for op, formula, tensors, options in cases:
        tensors = [t.to(dtype if i in low else torch.float32) for i, t in enumerate(tensors)]
        options = _with_frozen(options, dtype)
        ours = results(op, tensors, options)
        eager_formula = sdpa_formula if make is attention_case else formula
        eager = results(eager_formula, [t.to(dtype) for t in tensors], options)
        exact = results(formula, [t.double() for t in tensors], _with_frozen(options, torch.float64))
        triples = list(zip(*(itertools.chain(*r) for r in (ours, eager, exact)), strict=True))
        dtypes = [mine.dtype for mine, _, _ in triples]
        errors.append(
            [
                [(t - exact).abs().max() / exact.abs().max() for t in (mine, theirs)]
                for mine, theirs, exact in triples
            ]
        )
    for (ours, eager), of in zip(torch.tensor(errors).amax(dim=0).tolist(), dtypes, strict=True):
        assert ours <= (2 if of == torch.float32 else 1) * eager + 2 * torch.finfo(of).eps


# ---- layouts


def layouts(tensor):
    """The same values in other memory layouts."""
    yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    padded[..., : tensor.shape[-1]] = tensor
    yield "padded rows", padded[..., : tensor.shape[-1]]
    flat = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
    flat[1:] = tensor.flatten()
    yield "offset by one", flat[1:].view(tensor.shape)

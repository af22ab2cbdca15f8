"""The ops' formulas in eager PyTorch, cases of every size, and the policy for low precision."""

import itertools

import torch
import torch.nn.functional as F

from vapt_fast import functional
from vapt_fast.activations import ACTIVATIONS

POOL = {"num_prefix": 2, "eps": 1e-6, "prompt_eps": 1e-5}


# ---- each op's formula, literally


def pool_formula(x, matrix, weight, bias, *, num_prefix, eps, prompt_eps):
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    z = F.layer_norm(x[:, num_prefix:], x.shape[-1:], weight, bias, prompt_eps)
    return normed, matrix @ z


def attention_formula(q, k, v, prompt_k, prompt_v, *, scale, bias=None):
    batch, groups = q.shape[0], q.shape[2] // k.shape[2]
    keys = torch.cat([prompt_k.expand(batch, -1, -1, -1), k], dim=1).repeat_interleave(groups, dim=2)
    values = torch.cat([prompt_v.expand(batch, -1, -1, -1), v], dim=1).repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    if bias is not None:
        scores = scores + F.pad(bias, (prompt_k.shape[1], 0))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


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
):
    t = (pooled if channel_mask is None else pooled * channel_mask) + bias[:, None]
    if down is not None:
        features = ACTIVATIONS[activation](t @ down.t())
        t = t + scale * ((features if feature_mask is None else features * feature_mask) @ up.t())
    return t if eps is None else F.layer_norm(t, t.shape[-1:], eps=eps)


# ---- arguments


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def pool_case(batch=2, prefix=2, patches=9, dim=6, rows=3):
    return (
        functional.prompt_pool,
        pool_formula,
        [rand(batch, prefix + patches, dim), rand(rows, patches), rand(dim), rand(dim)],
        {**POOL, "num_prefix": prefix},
    )


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


def cls_case(batch=2, rows=1, tokens=7, heads=3, dim=2, channels=6, prompts=2, shared=False, bias=False):
    tensors = [rand(batch, rows, heads, dim), rand(batch, tokens, channels)]
    tensors += [rand(1 if shared else batch, prompts, channels)]
    tensors += [rand(heads, dim, channels), rand(heads, dim, channels)]
    options = {"scale": 0.7, "bias": rand(1, heads, rows, tokens) if bias else None}
    return functional.cls_attention, cls_formula, tensors, options


def projector_op(pooled, bias, down=None, up=None, scale=1.0, **options):
    """The op with ``scale`` among its tensors, whose gradients ``results`` takes."""
    return functional.prompt_projector(pooled, bias, down, up, scale=scale, **options)


def projector_case(
    batch=2,
    prompts=3,
    dim=6,
    width=4,
    activation="relu",
    masked=False,
    eps=None,
    learned_scale=False,
):
    """A ``width`` of None: no projector."""
    tensors = [rand(batch, prompts, dim), rand(prompts)]
    options = {"activation": activation, "eps": eps}
    if masked:
        options["channel_mask"] = torch.randint(0, 2, (batch, 1, dim)).double() * 2
    if width is not None:
        tensors += [rand(width, dim), rand(dim, width), *([rand(1)] if learned_scale else [])]
        if masked:
            options["feature_mask"] = torch.randint(0, 2, (batch, prompts, width)).double() * 2
    return projector_op, projector_formula, tensors, options


CASES = {
    **{
        f"pool-B{b}-S{s}-N{n}-C{c}-R{r}": (
            pool_case,
            {"batch": b, "prefix": s, "patches": n, "dim": c, "rows": r},
        )
        for b, s, n, c, r in [
            *itertools.product((1, 3), (0, 1, 5), (1, 16), (5, 64), (1, 10)),
            (2, 1, 196, 48, 50),
            (0, 1, 4, 6, 3),
            (2, 1, 4, 6, 0),
        ]
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
        f"cls-R{r}-T{t}-P{p}-shared{s}-bias{m}": (
            cls_case,
            {"rows": r, "tokens": t, "prompts": p, "shared": s, "bias": m},
        )
        for r, t, p, s, m in itertools.product((1, 2), (1, 17), (0, 1, 10), (False, True), (False, True))
    },
    **{
        f"projector-{a}-B{b}-P{p}-C{c}-r{w}-masked{m}-eps{e}-scaled{s}": (
            projector_case,
            {"activation": a, "batch": b, "prompts": p, "dim": c, "width": w}
            | {"masked": m, "eps": e, "learned_scale": s},
        )
        for a, b, p, c, w, m, e, s in [
            *itertools.product(
                ACTIVATIONS, (2,), (3,), (6,), (4,), (False, True), (None, 1e-6), (False, True)
            ),
            *itertools.product(
                ("relu",), (1, 3), (1, 10), (5, 64), (None, 1, 8), (True,), (None, 1e-6), (False,)
            ),
            ("relu", 2, 0, 6, 8, True, 1e-6, True),
            ("relu", 0, 3, 6, 8, True, 1e-6, True),
        ]
    },
}


def results(op, tensors, options, seed=1):
    """Outputs of ``op`` and gradients of all ``tensors`` under fixed random output gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, incoming, materialize_grads=True)
    return [o.detach() for o in outputs], list(grads)


def assert_same_results(actual, expected, tolerance, message=None):
    """Outputs and gradients agree in shape, dtype and, up to ``tolerance`` relative or absolute, in value."""
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=message)


GRADCHECK = [
    *[
        (pool_case, {"batch": b, "prefix": s, "patches": 4, "dim": 5, "rows": r})
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
        (cls_case, {"rows": r, "prompts": p, "shared": s, "bias": m})
        for r in (1, 2)
        for p in (0, 2)
        for s in (False, True)
        for m in (False, True)
    ],
    *[
        (projector_case, {"activation": a, "masked": m, "eps": e, "learned_scale": True})
        for a in ("gelu", "sigmoid", "softmax")
        for m in (False, True)
        for e in (None, 0.1)
    ],
]


def far_from_zero(seed):
    """A pool case with mean / std = 1e4, and a constant row: variance 0, rstd 1000."""
    torch.manual_seed(seed)
    op, formula, (x, *rest), options = pool_case(dim=64, patches=16)
    x = x + 1e4
    x[:, 3] = 7.0
    return op, formula, [x, *rest], options


# ---- low precision


def sdpa_formula(q, k, v, prompt_k, prompt_v, *, scale, bias=None):
    """attention_formula as anyone would run it in low precision."""
    keys = torch.cat([prompt_k.expand(q.shape[0], -1, -1, -1), k], dim=1)
    values = torch.cat([prompt_v.expand(q.shape[0], -1, -1, -1), v], dim=1)
    q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, scale=scale).transpose(1, 2)


def assert_policy(make, cases, dtype):
    """The one policy for low precision.

    Over all cases, the largest error of each output and gradient against float64, relative to its max|exact|,
    is at most that of eager PyTorch in the same dtype (float32: twice that), plus 2 eps.
    """
    # Tokens, queries, keys and values are in ``dtype``; the prompts' own arithmetic is at least float32.
    low = {pool_case: [0], projector_case: []}.get(make, range(9))
    errors, dtypes = [], []
    for op, formula, tensors, options in cases:
        tensors = [t.to(dtype if i in low else torch.float32) for i, t in enumerate(tensors)]
        ours = results(op, tensors, options)
        eager_formula = sdpa_formula if make is attention_case else formula
        eager = results(eager_formula, [t.to(dtype) for t in tensors], options)
        exact = results(formula, [t.double() for t in tensors], options)
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

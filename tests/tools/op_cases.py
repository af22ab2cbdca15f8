"""The ops' formulas in eager PyTorch, cases of every size, and the policy for low precision."""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F

from vapt_fast import functional
from vapt_fast.activations import ACTIVATIONS
from vapt_fast.ops import device as machine

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
    by_image = weight.ndim == 2
    affine = (None, None) if by_image else (weight, bias)
    z = F.layer_norm(total[:, num_prefix:], x.shape[-1:], *affine, prompt_eps)
    if by_image:
        z = z * weight[:, None] + bias[:, None]
    return total, normed, matrix @ z


def with_cut_prompts(num_tensors, num_prompts):
    """A decorator: with ``prompt_lengths`` the formula is called for each image by itself, its prompts cut.

    Args:
        num_tensors: how many of the first arguments are of the images.
        num_prompts: how many after them are (B or 1, P, ...), the prompts.
    """
    end = num_tensors + num_prompts

    def decorate(formula):
        def cut(*args, bias=None, prompt_lengths=None, **options):
            batch = len(args[0])
            if prompt_lengths is None or not batch:
                return formula(*args, bias=bias, **options)
            prompts = [t.expand(batch, *t.shape[1:]) for t in args[num_tensors:end]]
            biases = [None] * batch if bias is None else bias.expand(batch, -1, -1, -1).split(1)
            images = []
            for i, number in enumerate(prompt_lengths.tolist()):
                own = [t[i : i + 1] for t in args[:num_tensors]] + [t[i : i + 1, :number] for t in prompts]
                images.append(formula(*own, *args[end:], bias=biases[i], **options))
            return torch.cat(images)

        return cut

    return decorate


@with_cut_prompts(3, 2)
def attention_formula(q, k, v, prompt_k, prompt_v, *, scale, bias=None):
    batch, groups = q.shape[0], q.shape[2] // k.shape[2]
    keys = torch.cat([prompt_k.expand(batch, -1, -1, -1), k], dim=1).repeat_interleave(groups, dim=2)
    values = torch.cat([prompt_v.expand(batch, -1, -1, -1), v], dim=1).repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    if bias is not None:
        scores = scores + F.pad(bias, (prompt_k.shape[1], 0))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


def packed_formula(qkv, prompt_kv, *, num_heads, num_kv_heads, attention=attention_formula, **options):
    dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    q, kv = qkv.tensor_split([num_heads * dim], dim=-1)
    parts = (q, *kv.chunk(2, dim=-1), *prompt_kv.chunk(2, dim=-1))
    return attention(*(t.unflatten(-1, (-1, dim)) for t in parts), **options)


@with_cut_prompts(2, 1)
def cls_formula(q, x, prompts, key_weight, value_weight, **options):
    def heads(weight, rows):
        return torch.einsum("hdc,bnc->bnhd", weight, rows)

    return attention_formula(
        q,
        heads(key_weight, x),
        heads(value_weight, x),
        heads(key_weight, prompts),
        heads(value_weight, prompts),
        **options,
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
    t = (pooled if channel_mask is None else pooled * channel_mask) + bias[..., None]
    if down is not None:
        scale = scale[:, None, None] if isinstance(scale, torch.Tensor) else scale
        features = ACTIVATIONS[activation](t @ down.mT)
        t = t + scale * ((features if feature_mask is None else features * feature_mask) @ up.mT)
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
    batch=2,
    prefix=2,
    patches=9,
    dim=6,
    rows=3,
    branch=True,
    layer_scale=True,
    affine=True,
    learned=False,
    matrix_by_image=False,
    affine_by_image=False,
):
    """With ``learned``, the layer_scale and the affine need gradients too.

    With ``matrix_by_image`` there is a matrix for each image, with ``affine_by_image`` a weight and a bias.
    """
    matrices, affines = (batch,) * matrix_by_image, (batch,) * affine_by_image
    tensors = {"x": rand(batch, prefix + patches, dim), "matrix": rand(*matrices, rows, patches)}
    tensors |= {"weight": rand(*affines, dim), "bias": rand(*affines, dim)}
    tensors |= {"branch": rand(batch, prefix + patches, dim) if branch else None}
    tensors |= {"layer_scale": rand(dim) if branch and layer_scale else None}
    tensors |= affine_of(dim if affine else None)
    frozen = () if learned else ("layer_scale", "norm_weight", "norm_bias")
    options = {**POOL, "num_prefix": prefix}
    return case_by_name(functional.prompt_pool, pool_formula, tensors, frozen, options)


def with_lengths(prompts, lengths, batch):
    """Numbers of prompts for the images, ``lengths`` over and over; NaN where no image has a prompt.

    Args:
        prompts: the tensors (B or 1, P, ...) that hold them.
        lengths: those larger than P are P; None where there are none.
    """
    if lengths is None:
        return None
    numbers = torch.tensor([lengths[image % len(lengths)] for image in range(batch)], dtype=torch.int64)
    numbers = numbers.clamp(max=prompts[0].shape[1])
    for tensor in prompts:
        most = numbers.tolist() if len(tensor) == batch else [max(numbers.tolist(), default=tensor.shape[1])]
        for image, number in enumerate(most):
            tensor[image, number:] = float("nan")
    return numbers


def attention_case(
    batch=2,
    queries=5,
    tokens=7,
    heads=4,
    groups=4,
    dim=3,
    prompts=2,
    shared=False,
    bias=False,
    lengths=None,
):
    one = 1 if shared else batch
    tensors = [
        rand(batch, queries, heads, dim),
        rand(batch, tokens, groups, dim),
        rand(batch, tokens, groups, dim),
    ]
    tensors += [rand(one, prompts, groups, dim), rand(one, prompts, groups, dim)]
    options = {"scale": 0.7, "bias": rand(1, heads, queries, tokens) if bias else None}
    options |= {"prompt_lengths": with_lengths(tensors[3:], lengths, batch)}
    return functional.prompt_attention, attention_formula, tensors, options


def packed_case(
    batch=2, tokens=7, heads=4, groups=4, dim=3, prompts=2, shared=False, bias=False, lengths=None
):
    tensors = [rand(batch, tokens, (heads + 2 * groups) * dim)]
    tensors += [rand(1 if shared else batch, prompts, 2 * groups * dim)]
    options = {"num_heads": heads, "num_kv_heads": groups, "scale": 0.7}
    options |= {"bias": rand(1, heads, tokens, tokens) if bias else None}
    options |= {"prompt_lengths": with_lengths(tensors[1:], lengths, batch)}
    return functional.prompt_attention_packed, packed_formula, tensors, options


def mlp_case(batch=2, tokens=5, dim=6, hidden=8, out=6, bias=True, learned=False):
    """With ``learned``, weights and biases need gradients too."""
    tensors = {"x": rand(batch, tokens, dim)}
    tensors |= {"fc1_weight": rand(hidden, dim), "fc1_bias": rand(hidden) if bias else None}
    tensors |= {"fc2_weight": rand(out, hidden), "fc2_bias": rand(out) if bias else None}
    frozen = () if learned else FROZEN
    return case_by_name(functional.mlp, mlp_formula, tensors, frozen, {})


def cls_case(
    batch=2,
    rows=1,
    tokens=7,
    heads=3,
    dim=2,
    channels=6,
    prompts=2,
    shared=False,
    bias=False,
    lengths=None,
):
    tensors = [rand(batch, rows, heads, dim), rand(batch, tokens, channels)]
    tensors += [rand(1 if shared else batch, prompts, channels)]
    numbers = with_lengths(tensors[2:], lengths, batch)
    # As a layer's: with larger weights a softmax over scores of 100 and more leaves each query one key.
    tensors += [rand(heads, dim, channels) / math.sqrt(channels) for _ in range(2)]
    options = {"scale": 0.7, "bias": rand(1, heads, rows, tokens) if bias else None}
    options |= {"prompt_lengths": numbers}
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
    bias_by_image=False,
    weights_by_image=False,
    scale_by_image=False,
):
    """A ``width`` of None: no projector. With ``learned``, the affine, if there is one, needs gradients.

    With ``bias_by_image`` there is a bias for each image, with ``weights_by_image`` a projector, and with
    ``scale_by_image`` a learned scale.
    """
    biases, weights, scales = (
        (batch,) * bias_by_image,
        (batch,) * weights_by_image,
        batch if scale_by_image else 1,
    )
    tensors = {"pooled": rand(batch, prompts, dim), "bias": rand(*biases, prompts)}
    options = {"activation": activation, "eps": eps}
    if masked:
        options["channel_mask"] = torch.randint(0, 2, (batch, 1, dim)).double() * 2
    if width is not None:
        tensors |= {"down": rand(*weights, width, dim), "up": rand(*weights, dim, width)}
        tensors |= {"scale": rand(scales)} if learned_scale else {}
        if masked:
            options["feature_mask"] = torch.randint(0, 2, (batch, prompts, width)).double() * 2
    tensors |= affine_of(dim if affine and eps is not None else None)
    frozen = () if learned else ("norm_weight", "norm_bias")
    return case_by_name(functional.prompt_projector, projector_formula, tensors, frozen, options)


YES_OR_NO = (False, True)
LEARNED = {"learned": (True,)}
RESIDUAL = {"branch": YES_OR_NO, "layer_scale": YES_OR_NO, "affine": YES_OR_NO}
PREFIXED = {"batch": (1, 3), "prefix": (0, 5), "patches": (1, 16), "dim": (5, 64), "rows": (1, 10)}
HEADS = {"heads": (4,), "groups": (2, 4), "shared": YES_OR_NO, "bias": YES_OR_NO}
NORMED = {"eps": (None, 1e-6), "affine": YES_OR_NO}
MASKED = {"masked": YES_OR_NO, "learned_scale": (True,), **LEARNED}
FROZEN_OR_NOT = {"bias": YES_OR_NO, "learned": YES_OR_NO}
POOL_BY_IMAGE = ("matrix_by_image", "affine_by_image")
PROJECTOR_BY_IMAGE = ("bias_by_image", "weights_by_image", "scale_by_image")


def grid(make, **axes):
    """A maker and its arguments, for each combination of values of the ``axes``."""
    return [(make, dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def by_image(make, **axes):
    """A grid of cases with each choice of what may be given for each image, but none of it."""
    names = {pool_case: POOL_BY_IMAGE, projector_case: PROJECTOR_BY_IMAGE}[make]
    choices = grid(make, **axes, **dict.fromkeys(names, YES_OR_NO))
    return [(make, sizes) for make, sizes in choices if any(sizes[name] for name in names)]


CASES = [
    *grid(add_norm_case, batch=(1, 3), tokens=(1, 5), dim=(1, 5, 64), **RESIDUAL, **LEARNED),
    *grid(add_norm_case, batch=(0, 2), tokens=(0, 197), dim=(48,), **RESIDUAL, **LEARNED),
    *grid(add_norm_case, dim=(768,), **RESIDUAL, **LEARNED),
    *grid(pool_case, **PREFIXED, **RESIDUAL, **LEARNED),
    *grid(pool_case, batch=(0, 2), rows=(0, 3), **RESIDUAL, **LEARNED),
    *grid(pool_case, patches=(196,), dim=(48,), rows=(50,), branch=YES_OR_NO),
    *by_image(pool_case, batch=(0, 1, 3), rows=(0, 1, 3), branch=YES_OR_NO, **LEARNED),
    *grid(attention_case, queries=(1, 6), tokens=(6,), dim=(3, 8), prompts=(0, 1, 5), **HEADS),
    *grid(attention_case, queries=(197,), tokens=(197,), heads=(2,), groups=(2,), dim=(32,), prompts=(10,)),
    *grid(packed_case, tokens=(1, 6), dim=(1, 8), prompts=(0, 5), **HEADS),
    *grid(attention_case, batch=(0,), lengths=(None, (1,))),
    *grid(packed_case, batch=(0,), lengths=(None, (1,))),
    *grid(
        attention_case, batch=(3,), queries=(1, 6), tokens=(6,), prompts=(5,), lengths=((2, 0, 5),), **HEADS
    ),
    *grid(packed_case, batch=(3,), tokens=(6,), prompts=(5,), lengths=((2, 0, 5),), **HEADS),
    *grid(
        cls_case,
        batch=(3,),
        rows=(1, 2),
        prompts=(5,),
        lengths=((2, 0, 5),),
        shared=YES_OR_NO,
        bias=YES_OR_NO,
    ),
    *(
        case
        for make in (attention_case, packed_case, cls_case)
        for case in grid(make, prompts=(0, 3), lengths=((0,), (3,)))
    ),
    *(
        case
        for dim, hidden, out in ((1, 1, 1), (6, 24, 6), (5, 3, 7))
        for case in grid(
            mlp_case,
            batch=(0, 1, 3),
            tokens=(1, 17),
            dim=(dim,),
            hidden=(hidden,),
            out=(out,),
            **FROZEN_OR_NOT,
        )
    ),
    *grid(cls_case, rows=(1, 2), tokens=(1, 17), prompts=(0, 1, 10), shared=YES_OR_NO, bias=YES_OR_NO),
    *grid(
        projector_case, activation=ACTIVATIONS, masked=YES_OR_NO, learned_scale=YES_OR_NO, **NORMED, **LEARNED
    ),
    *grid(
        projector_case, batch=(1, 3), prompts=(1, 10), dim=(5, 64), width=(None, 1, 8), **NORMED, **LEARNED
    ),
    *grid(projector_case, batch=(0, 2), prompts=(0, 3), masked=(True,), **NORMED, **LEARNED),
    *by_image(projector_case, batch=(0, 1, 3), prompts=(0, 3), eps=(None, 1e-6), **MASKED),
]

GRADCHECK = [
    *grid(add_norm_case, batch=(1, 2), **RESIDUAL, **LEARNED),
    *grid(pool_case, prefix=(0, 2), patches=(4,), dim=(5,), rows=(1, 2, 3), **RESIDUAL, **LEARNED),
    *by_image(pool_case, patches=(4,), dim=(5,), rows=(0, 2), **LEARNED),
    *(
        case
        for make in (attention_case, packed_case)
        for case in grid(
            make, prompts=(0, 2), lengths=(None, (0, 1)), **HEADS | {"heads": (2,), "groups": (1, 2)}
        )
    ),
    *grid(mlp_case, batch=(1, 2), tokens=(1, 3), **FROZEN_OR_NOT),
    *grid(cls_case, rows=(1, 2), prompts=(0, 2), lengths=(None, (0, 1)), shared=YES_OR_NO, bias=YES_OR_NO),
    *grid(
        projector_case, activation=("gelu", "sigmoid", "softmax"), eps=(None, 0.1), affine=YES_OR_NO, **MASKED
    ),
    *by_image(projector_case, activation=("gelu",), eps=(None, 0.1), **MASKED),
]


# For image_by_image. Blocks of the kernels have 16 rows.
BY_IMAGE = [
    *by_image(pool_case, batch=(1, 3), patches=(7,), dim=(5,), rows=(0, 17)),
    *by_image(
        projector_case,
        batch=(1, 3),
        prompts=(0, 17),
        dim=(5,),
        masked=(True,),
        eps=(0.1,),
        learned_scale=(True,),
    ),
]


def results(op, tensors, options, seed=1, lay_out=lambda grad: grad):
    """Outputs of ``op`` and gradients of all ``tensors`` under fixed random output gradients.

    Args:
        lay_out: gives an output's gradient another memory layout.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = {"dtype": torch.float64, "device": "cpu", "generator": torch.Generator().manual_seed(seed)}
    incoming = [lay_out(torch.randn(o.shape, **random).to(o)) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, incoming, materialize_grads=True)
    return [o.detach() for o in outputs], list(grads)


def assert_same_results(actual, expected, tolerance, message=None):
    """Outputs and gradients agree in shape, dtype and, up to ``tolerance`` relative or absolute, in value."""
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=message)


def image_by_image(make, **sizes):
    """The op of a case, the same by a call for each image, tensors and options.

    A single call has an image's own part of what is given for each, in the shape of what all share.
    """
    torch.manual_seed(0)
    op, _, tensors, options = make(**sizes)
    *_, one, options_of_one = make(
        **{name: value for name, value in sizes.items() if "by_image" not in name} | {"batch": 1}
    )

    def part(value, like, image):
        whole = not isinstance(value, torch.Tensor) or value.shape == like.shape
        return value if whole else value[image].reshape(like.shape)

    def calls(*tensors, **options):
        outputs = []
        for image in range(sizes["batch"]):
            parts = [part(*pair, image) for pair in zip(tensors, one, strict=True)]
            options_here = {
                name: part(value, options_of_one.get(name), image) for name, value in options.items()
            }
            results = op(*parts, **options_here)
            outputs.append(results if isinstance(results, tuple) else (results,))
        return tuple(map(torch.cat, zip(*outputs, strict=True)))

    return op, calls, tensors, options


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


@with_cut_prompts(3, 2)
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


def relative_error(actual, exact):
    """The largest error, relative to max|exact|; the error itself where all of that is 0."""
    largest = exact.abs().max()
    error = (actual - exact).abs().max() / torch.where(largest == 0, 1, largest)
    return torch.where(error.isnan(), torch.inf, error)  # comparisons with NaN would be false


def hardware_rounding(dtype, tensors):
    """What a GPU may lose that eager PyTorch, for these ``tensors``, happens not to lose.

    What is multiplied is rounded to ``dtype``, whatever the dtype of the result. And n numbers are added up
    in float32 in some order: their rounding errors, of independent signs, add up to sqrt(n) eps.
    """
    terms = max(max(t.shape, default=1) for t in tensors)  # of a product
    terms = max(terms, max(t.numel() for t in tensors) // min(t.numel() for t in tensors))  # of a gradient
    return 2 * (torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps)


def _finite_results(formula, tensors, options, dtype):
    """``results`` in ``dtype``, and in the next wider one of those that overflow."""
    found = results(formula, [t.to(dtype) for t in tensors], _with_frozen(options, dtype))
    if all(t.isfinite().all() for t in itertools.chain(*found)):
        return found
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    wide = results(formula, [t.to(wider) for t in tensors], _with_frozen(options, wider))
    return [
        [t if t.isfinite().all() else w for t, w in zip(*pair, strict=True)]
        for pair in zip(found, wide, strict=True)
    ]


def assert_policy(make, cases, dtype, on_gpu=False):
    """The one policy for low precision.

    Over all cases, the largest error of each output and gradient against float64, relative to its max|exact|,
    is at most that of eager PyTorch in the same dtype (float32: twice that), plus 2 eps. Where eager PyTorch
    overflows, the next wider dtype takes its place.

    Args:
        on_gpu: what ran was the hardware's arithmetic, to which ``hardware_rounding`` is granted.
    """
    # What comes from the backbone is in ``dtype``; the prompts' own arithmetic is at least float32.
    low = {pool_case: (0, *range(4, 8)), projector_case: ()}.get(make, range(9))
    as_anyone = {attention_case: sdpa_formula, packed_case: partial(packed_formula, attention=sdpa_formula)}
    errors, dtypes, granted = [], [], 0.0
    for op, formula, tensors, options in cases:
        tensors = [t.to(dtype if i in low else torch.float32) for i, t in enumerate(tensors)]
        options = _with_frozen(options, dtype)
        ours = results(op, tensors, options)
        eager = _finite_results(as_anyone.get(make, formula), tensors, options, dtype)
        exact = results(formula, [t.double() for t in tensors], _with_frozen(options, torch.float64))
        compared = list(zip(*(itertools.chain(*r) for r in (ours, eager, exact)), strict=True))
        dtypes = [mine.dtype for mine, *_ in compared]
        errors.append(
            [[relative_error(t, exact) for t in (mine, theirs)] for mine, theirs, exact in compared]
        )
        if on_gpu:
            granted = max(granted, hardware_rounding(dtype, [exact for *_, exact in compared]))
    for (ours, eager), of in zip(torch.tensor(errors).amax(dim=0).tolist(), dtypes, strict=True):
        assert ours <= (2 if of == torch.float32 else 1) * eager + max(2 * torch.finfo(of).eps, granted)


# ---- layouts


def layouts(tensor):
    """The same values in other memory layouts."""
    yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    between = float("nan") if tensor.is_floating_point() else -1
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), between, dtype=tensor.dtype)
    padded[..., : tensor.shape[-1]] = tensor
    yield "padded rows", padded[..., : tensor.shape[-1]]
    flat = torch.full((tensor.numel() + 1,), between, dtype=tensor.dtype)
    flat[1:] = tensor.flatten()
    yield "offset by one", flat[1:].view(tensor.shape)


# ---- the machine


def forget():
    """Have the machine be asked again what it can run."""
    for function in vars(machine).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()

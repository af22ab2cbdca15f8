"""The ops that have Triton kernels, for the tests that are the same for all of them: one entry an op."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from op_cases import (
    add_norm_case,
    attention_case,
    cls_case,
    layouts,
    mlp_case,
    packed_case,
    pool_case,
    projector_case,
)

__all__ = [
    "KERNELS",
    "POOL_BY_IMAGE",
    "PROJECTOR_BY_IMAGE",
    "REAL",
    "Kernels",
    "converted",
    "laid_out",
    "precision_cases",
    "random_cases",
]


@dataclass(frozen=True)
class Kernels:
    """One op.

    Attributes:
        make: makes a case of it, see op_cases.py.
        sizes: what to choose each argument of ``make`` from: around the sizes of blocks, and nothing at all.
        precise: sizes for comparisons in low precision.
        quick: few small sizes that between them go through all of the kernels' code, with several blocks.
        wide: sizes of models, and what else is too large to be combined with everything.
        far: sizes, a dimension and the stride between neighbours in it, with which offsets leave 32 bits.
        huge: sizes of an image of which there are so many that offsets take more than 32 bits, positions of
            the tensors that are then float16, and of those that require a gradient (none that is summed over
            the images: its programs would take forever).
        scales: of the inputs in low precision.
        cuda_sizes, cuda_quick: as ``sizes`` and ``quick`` for the CUDA kernels, which read 16 bytes at once:
            around their tiles, in several blocks. Empty for ops without; nothing in
            cuda_sizes is empty or absent, so that errors can be compared.
    """

    make: Callable[..., tuple]
    sizes: dict[str, list[Any]]
    precise: dict[str, Any]
    quick: list[dict[str, Any]]
    wide: list[dict[str, Any]]
    far: list[tuple[dict[str, Any], int, int]]
    huge: list[tuple[dict[str, Any], Sequence[int], Sequence[int]]]
    scales: tuple[float, ...] = (1.0, 5.0)
    cuda_sizes: dict[str, list[Any]] = field(default_factory=dict)
    cuda_quick: list[dict[str, Any]] = field(default_factory=list)


YES_OR_NO = [False, True]
LENGTHS = [None, None, (3, 0, 17), (17, 2), (0,)]  # of prompts
ONE_HEAD = {"heads": 1, "groups": 1, "dim": 2}
POOL_BY_IMAGE = {"matrix_by_image": True, "affine_by_image": True}
PROJECTOR_BY_IMAGE = {"bias_by_image": True, "weights_by_image": True} | {
    "learned_scale": True,
    "scale_by_image": True,
}
THREE_HEADS = {"batch": 1, "queries": 3, "tokens": 3, "heads": 3, "groups": 3, "dim": 2, "prompts": 3}

KERNELS = {
    "add_norm": Kernels(
        add_norm_case,
        {
            "batch": [1, 1, 2, 5, 0],
            "tokens": [1, 3, 9],
            "dim": [1, 6, 63, 65, 257],
            "branch": [False, True, True],
            "layer_scale": YES_OR_NO,
            "affine": YES_OR_NO,
        },
        {"batch": 1, "dim": 32},
        [
            {"batch": 2, "tokens": 5, "dim": 6},
            {"batch": 1, "tokens": 3, "dim": 1025, "layer_scale": False, "affine": False},
            {"batch": 3, "tokens": 3, "dim": 5, "branch": False},
        ],
        [
            *(
                {"batch": 1, "tokens": 2, "dim": dim}
                for dim in (192, 768, 1280, 1536, 1537, 2049, 4097, 9000)
            ),
            {"batch": 2, "tokens": 197, "dim": 8},
        ],
        [({"batch": 3, "tokens": 3, "dim": 3}, dim, 2**30) for dim in (0, 1, 2)],
        [({"tokens": 4, "dim": 64}, [0, 1], [0, 1])],
    ),
    "prompt_pool": Kernels(
        pool_case,
        {
            "batch": [1, 1, 2, 5, 0],
            "prefix": [0, 1, 3],
            "patches": [1, 9, 31, 33],
            "dim": [1, 6, 63, 65],
            "rows": [1, 3, 15, 17, 0],
            "branch": YES_OR_NO,
            "layer_scale": YES_OR_NO,
            "affine": YES_OR_NO,
            "matrix_by_image": YES_OR_NO,
            "affine_by_image": YES_OR_NO,
        },
        {"batch": 1, "dim": 32},
        [
            {"batch": 2, "prefix": 2, "patches": 5, "dim": 6, "rows": 3},
            {"batch": 1, "prefix": 1, "patches": 33, "dim": 65, "rows": 17, "layer_scale": False},
            {"batch": 5, "prefix": 0, "patches": 4, "dim": 7, "rows": 2, "branch": False, "affine": False},
            {"batch": 1, "prefix": 1, "patches": 3, "dim": 257, "rows": 2},
            {"batch": 3, "prefix": 1, "patches": 5, "dim": 6, "rows": 17} | POOL_BY_IMAGE,
        ],
        [
            *({"batch": 1, "prefix": 1, "patches": 4, "dim": dim, "rows": 3} for dim in (256, 768, 1280)),
            *({"batch": 1, "prefix": 1, "patches": n, "dim": 8, "rows": 3} for n in (49, 64, 196, 729)),
            *({"batch": 1, "prefix": 0, "patches": 4, "dim": 8, "rows": r} for r in (50, 100, 400)),
        ],
        [
            ({"batch": 3, "prefix": 0, "patches": 3, "dim": 3, "rows": 3, "branch": branch}, dim, 2**30)
            for dim, branch in ((0, False), (1, False), (2, False), (0, True))
        ]
        + [
            ({"batch": 3, "prefix": 0, "patches": 3, "dim": 3, "rows": 3} | POOL_BY_IMAGE, dim, 2**30)
            for dim in (0, 1, 2)
        ],
        [
            ({"prefix": 1, "patches": 3, "dim": 64, "rows": 5}, [0, 4], []),
            ({"prefix": 1, "patches": 3, "dim": 64, "rows": 1}, [0, 4], [0, 4]),
            ({"prefix": 1, "patches": 3, "dim": 64, "rows": 5} | POOL_BY_IMAGE, [0, 4], range(5)),
        ],
    ),
    "prompt_projector": Kernels(
        projector_case,
        {
            "batch": [1, 1, 2, 5, 0],
            "prompts": [1, 3, 17, 0],
            "dim": [1, 6, 63, 65],
            "width": [1, 4, 17, None],
            "activation": ["relu", "gelu", "sigmoid", "softmax", "identity"],
            "masked": YES_OR_NO,
            "eps": [None, 1e-6],
            "affine": YES_OR_NO,
            "learned_scale": YES_OR_NO,
            "bias_by_image": YES_OR_NO,
            "weights_by_image": YES_OR_NO,
            "scale_by_image": YES_OR_NO,
        },
        {"batch": 1, "prompts": 5, "dim": 32, "eps": 1e-6},
        [
            {"batch": 2, "prompts": 3, "dim": 6, "masked": True, "eps": 0.1, "learned_scale": True},
            {"batch": 1, "prompts": 17, "dim": 65, "width": 17, "activation": "gelu", "eps": 0.1},
            {"batch": 5, "prompts": 5, "dim": 7, "width": 3, "activation": "softmax", "learned_scale": True},
            {"batch": 1, "prompts": 2, "dim": 5, "activation": "sigmoid"},
            {"batch": 1, "prompts": 2, "dim": 5, "width": None, "eps": 0.1},
            {"batch": 1, "prompts": 2, "dim": 5, "eps": 0.1, "affine": False},
            {"batch": 3, "prompts": 17, "dim": 5, "masked": True, "eps": 0.1} | PROJECTOR_BY_IMAGE,
            {"batch": 3, "prompts": 2, "dim": 5, "weights_by_image": True},
        ],
        [
            *({"batch": 1, "dim": dim, "width": 8, "eps": 0.1} for dim in (192, 768, 1280)),
            *({"batch": 1, "prompts": prompts, "width": 8, "masked": True} for prompts in (50, 100)),
            {"batch": 9, "width": 64, "learned_scale": True},
        ],
        [
            (
                {"batch": 3, "prompts": 3, "dim": 3, "width": 3, "masked": True, "eps": 0.1} | by_image,
                dim,
                2**30,
            )
            for by_image in ({}, PROJECTOR_BY_IMAGE)
            for dim in (0, 1, 2)
        ],
        [
            ({"prompts": 4, "dim": 64, "eps": 1e-6}, [], [0]),
            ({"prompts": 4, "dim": 32, "eps": 1e-6} | PROJECTOR_BY_IMAGE, [], range(5)),
        ],
    ),
    "prompt_attention": Kernels(
        attention_case,
        {
            "batch": [1, 1, 2, 0],
            "queries": [1, 5, 16, 17],
            "tokens": [1, 7, 16, 17],
            "heads": [2],
            "groups": [1, 2],
            "dim": [1, 3, 8, 17],
            "prompts": [0, 1, 5, 17],
            "shared": YES_OR_NO,
            "bias": [False, False, True],
            "lengths": LENGTHS,
        },
        {"batch": 1, "heads": 1, "groups": 1, "queries": 30, "tokens": 28, "dim": 32, "prompts": 5},
        [
            {"batch": 2, "queries": 5, "tokens": 7, "heads": 2, "groups": 1, "dim": 3},
            {"batch": 1, "queries": 17, "tokens": 18, "heads": 2, "groups": 2, "dim": 17, "prompts": 17}
            | {"bias": True},
            {"batch": 2, "queries": 3, "tokens": 3, "heads": 3, "groups": 1, "dim": 16, "shared": True}
            | {"bias": True, "prompts": 3, "lengths": (1, 2)},
            {"batch": 3, "queries": 5, "tokens": 7, "heads": 2, "groups": 1, "dim": 3, "prompts": 18}
            | {"lengths": (17, 0, 18)},
        ],
        [
            *({"batch": 1, "heads": 1, "groups": 1, "dim": dim} for dim in (32, 64, 72, 80, 88, 96, 128)),
            ONE_HEAD | {"batch": 1, "queries": 49, "tokens": 50, "dim": 32, "prompts": 50},
        ],
        # Strides of tokens are below 2^24.
        [
            (ONE_HEAD | {"batch": 3, "queries": 3, "tokens": 3, "prompts": 3}, 0, 2**30),
            (ONE_HEAD | {"batch": 1, "queries": 162, "tokens": 162, "prompts": 1}, 1, 2**24 - 8),
            (ONE_HEAD | {"batch": 1, "queries": 1, "tokens": 1, "prompts": 162}, 1, 2**24 - 8),
            (THREE_HEADS, 2, 2**30),
            # Of these the launcher copies all but the bias.
            (THREE_HEADS | {"bias": True}, 1, 2**30),
            (ONE_HEAD | {"batch": 1, "queries": 162, "tokens": 1, "bias": True}, 2, 2**24 - 8),
            (ONE_HEAD | {"batch": 1, "queries": 1, "tokens": 162, "bias": True}, 3, 2**24 - 8),
        ],
        [({"queries": 4, "tokens": 4, "heads": 1, "groups": 1, "dim": 64, "prompts": 4}, range(5), range(5))],
        cuda_sizes={
            "batch": [1, 2, 5],
            "queries": [1, 16, 65, 197, 257],
            "tokens": [1, 15, 64, 197, 220],  # with 100 prompts as many as wide heads may have
            "heads": [2],
            "groups": [2],
            "dim": [8, 32, 40, 64, 72, 80, 96, 128],
            "prompts": [1, 10, 50, 100],
            "shared": YES_OR_NO,
        },
        cuda_quick=[
            {"batch": 2, "queries": 70, "tokens": 75, "heads": 2, "groups": 2, "dim": 40, "prompts": 9},
            {"batch": 1, "queries": 193, "tokens": 197, "dim": 64, "prompts": 50, "shared": True},
            {"batch": 3, "queries": 1, "tokens": 3, "dim": 8, "prompts": 0},
            {"batch": 2, "queries": 130, "tokens": 99, "dim": 80, "prompts": 30},
        ],
    ),
    "prompt_attention_packed": Kernels(
        packed_case,
        {
            "batch": [1, 1, 2, 0],
            "tokens": [1, 7, 16, 17],
            "heads": [2],
            "groups": [1, 2],
            "dim": [1, 3, 8, 17],
            "prompts": [0, 1, 5, 17],
            "shared": YES_OR_NO,
            "bias": [False, False, True],
            "lengths": LENGTHS,
        },
        {"batch": 1, "heads": 1, "groups": 1, "tokens": 28, "dim": 32, "prompts": 5},
        [
            {"batch": 2, "tokens": 7, "heads": 2, "groups": 1, "dim": 3},
            {"batch": 1, "tokens": 18, "heads": 2, "groups": 2, "dim": 3, "prompts": 17, "shared": True},
            {"batch": 2, "tokens": 3, "heads": 1, "groups": 1, "dim": 3, "prompts": 3, "lengths": (2, 0)},
        ],
        [
            {"batch": 1, "tokens": 33, "heads": 1, "groups": 1, "dim": 8, "prompts": 17},
            {"batch": 1, "tokens": 5, "heads": 4, "groups": 2, "dim": 64, "prompts": 1, "bias": True},
        ],
        [
            (ONE_HEAD | {"batch": 3, "tokens": 3, "prompts": 3}, 0, 2**30),
            (ONE_HEAD | {"batch": 1, "tokens": 162, "prompts": 1}, 1, 2**24 - 8),
        ],
        [({"tokens": 4, "heads": 1, "groups": 1, "dim": 64, "prompts": 4}, range(2), range(2))],
        cuda_quick=[
            {"tokens": 75, "heads": 3, "groups": 3, "dim": 40, "prompts": 9, "shared": True},
            {"tokens": 75, "heads": 2, "groups": 2, "dim": 96, "prompts": 9, "shared": True},
        ],
    ),
    "absorbed_attention": Kernels(
        cls_case,
        {
            "batch": [1, 1, 2, 0],
            "rows": [1, 2],
            "tokens": [1, 7, 17, 33],
            "heads": [1, 3, 9],
            "dim": [2],
            "channels": [1, 6, 63, 65],
            "prompts": [0, 1, 10, 17],
            "shared": YES_OR_NO,
            "bias": [False, False, True],
            "lengths": LENGTHS,
        },
        {"batch": 1, "tokens": 28, "heads": 2, "dim": 8, "channels": 32, "prompts": 5},
        [
            {"batch": 2, "rows": 1, "tokens": 7, "heads": 3, "channels": 6, "prompts": 2},
            {"batch": 1, "rows": 2, "tokens": 65, "heads": 9, "channels": 65, "prompts": 17, "bias": True},
            {"batch": 2, "rows": 1, "tokens": 3, "heads": 1, "channels": 5, "prompts": 3, "shared": True},
            {"batch": 2, "rows": 2, "tokens": 33, "heads": 33, "dim": 1, "channels": 3, "prompts": 1},
            {
                "batch": 3,
                "rows": 1,
                "tokens": 7,
                "heads": 3,
                "channels": 6,
                "prompts": 34,
                "lengths": (33, 0, 2),
            },
            {"batch": 6, "rows": 1, "tokens": 3, "heads": 1, "channels": 5, "prompts": 3, "shared": True}
            | {"bias": True, "lengths": (1, 0, 2)},
        ],
        [
            *({"batch": 1, "channels": channels} for channels in (192, 768, 1280)),
            *({"batch": 1, "tokens": tokens, "prompts": 50} for tokens in (197, 257)),
            {"batch": 9, "shared": True, "prompts": 100},
            {"batch": 1, "rows": 11, "heads": 16},
        ],
        [
            ({"batch": 3, "rows": 1, "tokens": 3, "heads": 3, "channels": 3, "prompts": 3}, dim, 2**30)
            for dim in (0, 1, 2)
        ],
        [],
        scales=(1.0,),  # larger ones multiply with the weights' and leave each query one key
    ),
    "mlp": Kernels(
        mlp_case,
        {
            "batch": [1, 2, 3, 0],
            "tokens": [1, 5, 17],
            "dim": [1, 6, 31, 33],
            "hidden": [1, 8, 33, 65],
            "out": [1, 6, 33],
            "bias": YES_OR_NO,
        },
        {"batch": 1, "tokens": 20, "dim": 32, "hidden": 64, "out": 32},
        [
            {"batch": 2, "tokens": 5, "dim": 6, "hidden": 8, "out": 5},
            {"batch": 3, "tokens": 15, "dim": 33, "hidden": 65, "out": 35, "bias": False},
            {"batch": 1, "tokens": 290, "dim": 3, "hidden": 33, "out": 3},
        ],
        [
            *({"batch": 1, "tokens": tokens, "hidden": 9} for tokens in (32, 64, 197)),
            *({"batch": 1, "dim": dim, "out": dim} for dim in (48, 192)),
            *({"batch": 1, "hidden": hidden} for hidden in (64, 256)),
        ],
        # Strides are below 2^24.
        [({"batch": 1, "tokens": 194, "dim": 3, "hidden": 194, "out": 3}, dim, 2**24 - 8) for dim in (0, 1)],
        [],
        cuda_sizes={
            "batch": [1, 2, 5],
            "tokens": [1, 5, 64, 129],
            "dim": [8, 72, 192],
            "hidden": [8, 136, 256, 264, 768],
            "out": [8, 72, 200],
            "bias": YES_OR_NO,
        },
        cuda_quick=[
            {"batch": 2, "tokens": 70, "dim": 72, "hidden": 264, "out": 40},
            {"batch": 1, "tokens": 5, "dim": 8, "hidden": 8, "out": 8, "bias": False},
            {"batch": 3, "tokens": 100, "dim": 136, "hidden": 520, "out": 24},
        ],
    ),
}


# One block of a ViT-B/16 at 224 x 224 pixels with 50 prompts, by ops.
REAL = {
    "add_norm": {"tokens": 197, "dim": 768},
    "prompt_pool": {"prefix": 1, "patches": 196, "dim": 768, "rows": 50},
    "prompt_projector": {"prompts": 50, "dim": 768, "width": 8, "eps": 1e-6},
    "prompt_attention": {"queries": 197, "tokens": 197, "heads": 12, "groups": 12, "dim": 64, "prompts": 50},
    "prompt_attention_packed": {"tokens": 197, "heads": 12, "groups": 12, "dim": 64, "prompts": 50},
    "absorbed_attention": {"tokens": 197, "heads": 12, "dim": 64, "channels": 768, "prompts": 50},
    "mlp": {"tokens": 197, "dim": 768, "hidden": 3072, "out": 768},
}


def random_cases(op: str, count: int, which: str = "sizes") -> Iterator[dict[str, Any]]:
    """Sizes for the op's ``make``, different from each other and always the same.

    Args:
        which: "sizes" or "cuda_sizes", where they are from.
    """
    choose, seen = random.Random(op), []
    while len(seen) < count:
        sizes = {name: choose.choice(values) for name, values in getattr(KERNELS[op], which).items()}
        if sizes not in seen:
            seen.append(sizes)
            yield sizes


def precision_cases(op: str, scale: float, count: int = 20) -> Iterator[tuple]:
    """Cases for op_cases.assert_policy: ``count`` seeds, the inputs multiplied by ``scale``."""
    for seed in range(count):
        torch.manual_seed(seed)
        function, formula, tensors, options = KERNELS[op].make(**KERNELS[op].precise)
        yield function, formula, [t * scale for t in tensors], options


def converted(op: str, case: tuple, dtype: torch.dtype) -> tuple:
    """The op of a case, its tensors in the dtypes of a model in ``dtype``, and its options likewise."""
    function, _, tensors, options = case
    learned = torch.promote_types(dtype, torch.float32)
    of_tokens = {"prompt_pool": (0, *range(4, 8)), "prompt_projector": ()}.get(op, range(9))
    tensors = [t.to(dtype if i in of_tokens else learned) for i, t in enumerate(tensors)]
    options = {
        name: value.to(learned if "mask" in name else dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in options.items()
    }
    return function, tensors, options


def laid_out(value: Any, layout: str) -> Any:
    """``value``, where it is a tensor with something in it, in that one of op_cases.layouts."""
    if not isinstance(value, torch.Tensor) or not value.ndim or not value.numel():
        return value
    return dict(layouts(value))[layout]

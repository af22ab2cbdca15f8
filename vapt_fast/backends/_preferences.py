"""Which implementation of an op is faster than PyTorch's own operations, on which GPUs, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PREFERENCES", "Preference"]

KB = 1024
HALF = (torch.float16, torch.bfloat16)
LARGEST_NUM_KEYS = 400  # beyond, other attentions lose less by padding
# Compute capabilities: A100; H100 and H200; B200; consumer GPUs, which have less shared memory.
SM_80, SM_90, SM_100, CONSUMER = (8, 0), (9, 0), (10, 0), ((8, 6), (8, 9), (12, 0))
ALL = (SM_80, SM_90, SM_100, *CONSUMER)


def _always(*args: object) -> bool:
    return True


def _rounded_to_half(*args: object) -> bool:
    """Whether prompt_projector, which computes in float32 at least, rounds to 16 bits: its last argument."""
    return args[-1] in HALF


def _keys_fit(shared_memory: int) -> Callable[..., bool]:
    """Whether prompt_attention's CUDA kernels do with that many bytes of shared memory and should be faster.

    It is computed as in csrc/prompt_attention.cu, which can't be asked while torch.compile traces.
    """

    def fits(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, *rest: object) -> bool:
        _, num_queries, heads, dim = q.shape
        num_keys = k.shape[1] + prompt_k.shape[1]
        width = next((size for size in (32, 64, 80, 96, 128) if dim <= size), None)
        if width is None or num_keys > LARGEST_NUM_KEYS:
            return False
        row = (width // 8 | 1) * 16  # bytes
        forward = 2 * row * (-(-num_keys // 16) * 16)
        statistics = 8 * (heads // k.shape[2]) * (-(-num_queries // 32) * 32)
        backward = 160 * row + 2560 + statistics  # with 16 keys at a time
        return max(forward, backward) <= shared_memory

    return fits


@dataclass(frozen=True)
class Preference:
    """An implementation of an op that is faster than PyTorch's operations on some GPUs, for some arguments.

    Attributes:
        op, implementation: keys and values of _dispatch.IMPLEMENTATIONS.
        capabilities: compute capabilities of the GPUs that it holds for, as (9, 0).
        dtypes: of the op's first argument, or of autocast where that is on.
        model: what docs/model.md expects of it.
        measured: the device, date and ratio that were measured; None if nothing was. Backend "auto" goes by
            measurements alone, backend "kernels" by models too.
        fits: which arguments of the op (positional, as its implementations take them) it holds for.
    """

    op: str
    implementation: str
    capabilities: tuple[tuple[int, int], ...]
    dtypes: tuple[torch.dtype, ...]
    model: str
    measured: str | None = None
    fits: Callable[..., bool] = _always


NOTHING_CONCATENATED = "keys are padded to 16 and not concatenated"

# The first entry that matches decides. Nothing is measured yet: no kernel has run on a GPU, and one that was
# never seen to be right there is not worth any speed by default. There is no entry for mlp, whose products
# would have to keep up with cuBLAS.
PREFERENCES: tuple[Preference, ...] = (
    Preference(
        "prompt_attention",
        "cuda",
        (SM_90,),
        HALF,
        "2.4 times as fast forward and 1.7 times backward as cuDNN on concatenated keys",
        fits=_keys_fit(227 * KB),
    ),
    Preference("prompt_attention", "cuda", (SM_80,), HALF, NOTHING_CONCATENATED, fits=_keys_fit(163 * KB)),
    Preference("prompt_attention", "cuda", CONSUMER, HALF, NOTHING_CONCATENATED, fits=_keys_fit(99 * KB)),
    Preference(
        "prompt_attention", "torch", (SM_100,), HALF, "its tensor cores want instructions that cuDNN uses"
    ),
    Preference("prompt_pool", "cuda", ALL, HALF, "3 times as fast: a third of the memory traffic"),
    Preference(
        "prompt_projector",
        "triton",
        ALL,
        (torch.float32, *HALF),
        "12 times as fast: one kernel where there are ten",
        fits=_rounded_to_half,
    ),
    Preference(
        "add_norm", "triton", ALL, HALF, "1.2 times as fast, under autocast twice: less memory traffic"
    ),
    Preference("cls_attention", "triton", ALL, HALF, "twice as fast: the tokens are read once"),
)

"""Which implementation of an op is faster than PyTorch's own operations, on which GPUs, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PREFERENCES", "Preference"]

KB = 1024
HALF = (torch.float16, torch.bfloat16)
# Compute capabilities. Consumer GPUs have less shared memory.
A100, H100, B200, CONSUMER = (8, 0), (9, 0), (10, 0), ((8, 6), (8, 9), (12, 0))
ALL = (A100, H100, B200, *CONSUMER)


def _always(*args: object) -> bool:
    return True


def _keys_fit(shared_memory: int) -> Callable[..., bool]:
    """Whether all keys and values of a head fit into that many bytes, as in csrc/prompt_attention.cu.

    That can't be asked of the kernels while torch.compile traces. Beyond 400 keys others catch up.
    """

    def fits(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, *rest: object) -> bool:
        num_keys = k.shape[1] + prompt_k.shape[1]
        width = next((size for size in (32, 64, 80, 96, 128) if q.shape[3] <= size), None)
        if width is None or num_keys > 400:
            return False
        padded_keys, stride = -(-num_keys // 16) * 16, (width // 8 | 1) * 8
        return 2 * 2 * padded_keys * stride <= shared_memory

    return fits


@dataclass(frozen=True)
class Preference:
    """An implementation of an op that is faster than PyTorch's operations on some GPUs, for some arguments.

    Attributes:
        op, implementation: keys and values of _dispatch.IMPLEMENTATIONS.
        capabilities: compute capabilities of the GPUs that it holds for, as (9, 0).
        dtypes: that the op computes in: of its first argument, or of autocast where that is on.
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
# would have to keep up with cuBLAS, and none for attention on B200, whose tensor cores want other kernels.
PREFERENCES: tuple[Preference, ...] = (
    Preference(
        "prompt_attention",
        "cuda",
        (H100,),
        HALF,
        "2.4 times as fast forward and 1.7 times backward as cuDNN on concatenated keys",
        fits=_keys_fit(227 * KB),
    ),
    Preference("prompt_attention", "cuda", (A100,), HALF, NOTHING_CONCATENATED, fits=_keys_fit(163 * KB)),
    Preference("prompt_attention", "cuda", CONSUMER, HALF, NOTHING_CONCATENATED, fits=_keys_fit(99 * KB)),
    Preference("prompt_pool", "cuda", ALL, HALF, "3 times as fast: a third of the memory traffic"),
    Preference("prompt_projector", "triton", ALL, HALF, "10 times as fast: one kernel where there are ten"),
    Preference(
        "add_norm", "triton", ALL, HALF, "1.2 times as fast, under autocast twice: less memory traffic"
    ),
    Preference("cls_attention", "triton", ALL, HALF, "twice as fast: the tokens are read once"),
)

"""The function that runs an op, by backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends import _dispatch
from ..backends import torch as torch_backend

__all__ = ["implementation"]


def implementation(op: str, backend: str | None, device: torch.device) -> Callable:
    """The implementation of ``op`` that ``backend`` runs on ``device``; see _dispatch.choose."""
    if _dispatch.choose(op, backend, device) == "torch":
        return getattr(torch_backend, op)
    from ..backends import triton as triton_backend  # not before it is asked for: triton may be missing

    return getattr(triton_backend, op)

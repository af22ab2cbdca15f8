"""What a server is told when it starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ServeOptions", "token_digest"]


@dataclass(frozen=True)
class ServeOptions:
    """The options of a server; all replicas get the same.

    Attributes:
        first: the adapter whose backbone is served: a folder, or "hf-hub:owner/name".
        store: the folder of the adapters, for vapt_fast.serving.store; shared by all machines.
        capacity: how many adapters a replica holds at a time; others are read from the store when asked for.
        max_classes: the most classes of an adapter.
        root: the folder below which clients may name folders to load; None for none.
        token_sha256: ``token_digest`` of what clients show to change adapters; None to refuse changes.
        max_body: bytes of the largest request.
        max_pixels: of the largest image.
        batch_size, batch_wait: the most images in a batch, and the seconds that one waits for more.
        device: where the model computes.
        autocast: "bfloat16" or "float16" to compute in; None for the weights' dtype.
        threads: of PyTorch in each replica, on a CPU; None for PyTorch's own choice.
        backbone, weights, backend, backbone_precision: as for AdaptiveViT.from_adapter.
    """

    first: str
    store: Path
    capacity: int
    max_classes: int
    root: Path | None = None
    token_sha256: bytes | None = None
    max_body: int = 16 * 10**6
    max_pixels: int = 32_000_000
    batch_size: int = 32
    batch_wait: float = 0.005
    device: str = "cpu"
    autocast: str | None = None
    threads: int | None = None
    backbone: str | None = None
    weights: str | None = None
    backend: str | None = None
    backbone_precision: str | None = None


def token_digest(token: str) -> bytes:
    """Return the sha256 of a token: what is kept of it, and compared."""
    return hashlib.sha256(token.encode()).digest()

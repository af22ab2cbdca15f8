"""Data-parallel training by the processes of torchrun or ``launch``, each with its part of every batch.

Gradients are added up after the backward pass, so a step is that of the whole batch in one process, but for
dropout, which every process draws by itself. Frozen weights may be spread over them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError

__all__ = ["add_up", "add_up_gradients", "joined", "place", "rank", "wait", "world_size"]

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def joined(*devices: str) -> Iterator[str]:
    """Join the processes of torchrun or ``launch``, if there are several; give this one's device.

    Args:
        *devices: where to compute: one for each process of this machine, or one for all; of "cuda", each
            process takes the GPU of its local rank.
    """
    device = devices[0]
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield device
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = torch.device(device).type == "cuda"
    if len(devices) > 1:
        device = devices[local_rank]
    elif gpu:
        device = f"cuda:{local_rank}"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    yield device
    # Not after an error: the others may be waiting for this process, which must not wait for them.
    dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them, from 0, which is the one that writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def wait() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by the sum of those of all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sums over all processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(together)
    parts = together.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def place(model: Model, device: torch.device | str, shard: bool = False) -> Model:
    """Move a model to a device; with ``shard``, of the frozen weights of its blocks a part only (FSDP2).

    Each process then has its part of them, and those of a block or two whole while they are called: all
    processes must call the model as often. What is learned, and what is outside of the blocks, stays with
    each process. The model is changed in place.

    Raises:
        UserError: with ``shard``, a model without blocks, or without frozen weights in them.
    """
    if shard:
        _shard(model, torch.device(device).type)
    return model.to(device)


def _shard(model: nn.Module, device_type: str) -> None:
    from torch.distributed.fsdp import fully_shard

    blocks: Any = getattr(getattr(model, "backbone", model), "blocks", None)
    blocks = [] if blocks is None else list(blocks)
    frozen = {p for block in blocks for p in block.parameters() if not p.requires_grad}
    if not frozen:
        raise UserError("shard spreads the frozen weights of a ViT's blocks, and this model has none")
    options: dict[str, Any] = {
        "mesh": dist.device_mesh.init_device_mesh(device_type, (world_size(),)),
        "ignored_params": {p for p in model.parameters() if p not in frozen},
    }
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)

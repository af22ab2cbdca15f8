"""What a model costs: parameters, operations, and the memory of a training step, before anything is run.

The model is run on fake tensors, which have shapes and no numbers, so that a library counts in the place of
formulas: ``torch.utils.flop_counter`` the operations, autograd's own hooks what it keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .arguments import integer
from .model import AdaptiveViT
from .ops.backend import use_backend

__all__ = ["Account", "Costs", "account"]


@dataclass(frozen=True)
class Costs:
    """The costs of one way to compute, for each image of a batch.

    Attributes:
        forward: multiply-adds of the forward pass in eval mode.
        training: multiply-adds of a training step, forward and backward.
        activations: bytes that a training step keeps from its forward to its backward pass.
    """

    forward: float
    training: float
    activations: float


@dataclass(frozen=True)
class Account:
    """Parameters and costs of a model.

    Attributes:
        backbone, prompts, head: the numbers of their parameters; the backbone's without a head.
        weights: bytes of all parameters and buffers.
        gradients: bytes of the gradients of what is trained.
        batch_size: images of a step.
        bare: the backbone with the head but without prompts, of which the head alone is trained.
        full: the same with all of it trained (full fine-tuning); its gradients take as much as its weights.
        literal: the method as published, prompts in the sequence.
        rewritten: the method as it is run, in PyTorch's operations.
    """

    backbone: int
    prompts: int
    head: int
    weights: int
    gradients: int
    batch_size: int
    bare: Costs
    full: Costs
    literal: Costs
    rewritten: Costs

    @property
    def share(self) -> float:
        """The parameters of the prompts as a share of the backbone's."""
        return self.prompts / self.backbone

    def training_memory(self, costs: Costs) -> float:
        """Return the bytes of a training step that are known: weights, activations, gradients, momentum.

        With SGD's momentum, what is trained takes its size twice more. Temporary buffers, one or a few
        activations large, come on top.
        """
        trained = self.weights if costs is self.full else self.gradients
        return self.weights + costs.activations * self.batch_size + 2 * trained


def account(model: AdaptiveViT, batch_size: int = 64) -> Account:
    """Count parameters, operations and memory of ``model``, for images of the size that it takes.

    Nothing is computed: neither the time nor the memory of a step is needed.

    Args:
        model: any, on any device; it stays as it is.
        batch_size: images of a step. What is done once in a step is spread over them.

    Returns:
        An Account. A multiply-add is one multiplication and one addition in a matrix product or convolution;
        other operations are not counted, as in the papers. Attention is counted as its two products.
        Activations are those of PyTorch's fused attention on a CPU, which keeps no attention weights, in the
        dtype of the model: without autocast, checkpointing and kernels of one's own.

    Raises:
        TypeError, ValueError: not a number of images.
    """
    batch_size = integer("batch_size", batch_size, minimum=1)
    tensors = [*_tensors(model.backbone), *_tensors(model._adapter)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        copied = _without_numbers(model)
        shape = batch_size, *copied.pretrained_cfg["input_size"]
        images = torch.zeros(shape, dtype=next(copied.backbone.parameters()).dtype, device="cpu")
        literal, rewritten = _costs(copied, images, "reference"), _costs(copied, images, "torch")
        copied.prompts.prune(0)
        bare = _costs(copied, images, "reference")
        full = _costs(copied.requires_grad_(True), images, "reference")
    return Account(
        backbone=_size(model.backbone),
        prompts=_size(model.prompts),
        head=sum(_size(head) for head in model._adapter.heads()),
        weights=sum(tensor.nbytes for tensor in tensors),
        gradients=sum(tensor.nbytes for tensor in tensors if tensor.requires_grad),
        batch_size=batch_size,
        bare=bare,
        full=full,
        literal=literal,
        rewritten=rewritten,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _without_numbers(model: AdaptiveViT) -> AdaptiveViT:
    """Return a copy of the model with fake tensors on a CPU, within a FakeTensorMode."""
    fakes: dict[int, Any] = {}
    for tensor in _tensors(model):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        learned = isinstance(tensor, nn.Parameter)
        fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if learned else fake
    copied = copy.deepcopy(model, fakes)
    copied.backbone_precision = None
    return copied


def _costs(model: AdaptiveViT, images: Tensor, backend: str) -> Costs:
    def step() -> None:
        logits = model.train()(images)
        if logits.requires_grad:  # else nothing is trained
            logits.sum().backward()

    with use_backend(backend):
        forward = _operations(lambda: model.eval()(images))
        training = _operations(step)
        activations = _kept(model.train(), images)
    return Costs(*(number / len(images) for number in (forward, training, activations)))


def _operations(run: Callable[[], Any]) -> float:
    """Return the multiply-adds of ``run``, of attention as its two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def _kept(model: nn.Module, images: Tensor) -> float:
    """Return the bytes that are kept for the backward pass, besides the model's own tensors."""
    own = {tensor.untyped_storage()._cdata for tensor in _tensors(model)}
    kept: dict[int, UntypedStorage] = {}  # by their address, which no other has while they are here

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())

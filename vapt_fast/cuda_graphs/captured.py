"""A captured call: the forward pass, and the backward pass, of one model for one shape of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.autocast import without_autocast
from .recorder import Recorder
from .state import ModelState, addresses

__all__ = ["CapturedCall", "Logits"]

Logits = Callable[..., Tensor]


class CapturedCall:
    """The graphs of one call and the memory that they read and write.

    Args:
        recorder: who records.
        logits: the function of a model and images that is captured; the model itself is not called.
        model: the model, as ``state`` says.
        state: what the graphs depend on.
        images: the images of the first call.
        others: what else the function is given, tensors of the same shapes in each call.
        differentiable: whether a backward pass is captured too.

    Attributes:
        recorder, state: as given.
        constants: the tensors that must not change between a forward pass and its backward pass.
        memory: bytes that the device reserved for the graphs.
        replays: how often the forward pass has been repeated.
    """

    def __init__(
        self,
        recorder: Recorder,
        logits: Logits,
        model: nn.Module,
        state: ModelState,
        images: Tensor,
        others: tuple[Tensor, ...] = (),
        *,
        differentiable: bool,
    ) -> None:
        self.state = state
        self.replays = 0
        self.recorder = recorder
        self._logits = logits
        self._differentiable = differentiable
        device_type = images.device.type
        self._autocast_dtype = (
            torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        )
        reserved = recorder.memory()
        # Libraries make their workspaces in the first call on a stream, so one precedes the captures. It must
        # leave no traces.
        rng_state = recorder.rng_state()
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        written: set[int] = set()
        with torch.inference_mode(False):
            try:
                with recorder.recording():
                    self._capture(model, images, others)
            finally:
                recorder.set_rng_state(rng_state)
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        written.add(id(buffer))
                        with torch.no_grad():
                            buffer.copy_(value)
        # What must not change between a forward pass and its backward pass.
        self.constants = [t for t in state.tensors() if id(t) not in written]
        self._addresses = addresses(self.constants)
        self.memory = max(0, recorder.memory() - reserved)

    def _capture(self, model: nn.Module, images: Tensor, others: tuple[Tensor, ...]) -> None:
        twin, parameters = _twin(model)
        before = ModelState(twin)
        self._images = torch.empty_like(images).copy_(images).requires_grad_(images.requires_grad)
        self._others = tuple(torch.empty_like(t).copy_(t) for t in others)
        leaves = [self._images, *parameters.values()]

        def forward() -> Tensor:
            with torch.set_grad_enabled(self._differentiable), self._autocast():
                return self._logits(twin, self._images, *self._others)

        def backward(output: Tensor, grad: Tensor) -> list[Tensor | None]:
            # What the forward pass has left behind stays, for another backward pass through it.
            with without_autocast(images.device.type):
                grads = torch.autograd.grad(output, wanted, grad, retain_graph=True, allow_unused=True)
            return list(grads)

        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        output = forward()
        self._differentiable = output.requires_grad
        if self._differentiable:
            grads = backward(output, torch.zeros_like(output))
            # Those that the output depends on.
            wanted = [leaf for leaf, grad in zip(wanted, grads, strict=True) if grad is not None]
            del grads
        del output
        if not before.matches(twin):
            raise RuntimeError("the model changes its own attributes in a call")
        output, self._forward = self.recorder.record(forward)
        self._output = output.detach()
        if self._differentiable:
            self._grad_output = torch.zeros_like(self._output)
            self._grads, self._backward = self.recorder.record(
                lambda: _flatten(backward(output, self._grad_output))
            )
            originals = {id(alias): parameter for parameter, alias in parameters.items()}
            self._inputs = [originals.get(id(leaf)) for leaf in wanted]
            self._shapes = [(leaf.dtype, leaf.shape) for leaf in wanted]

    def _autocast(self) -> AbstractContextManager:
        """Autocast as it was in the first call, without its cache: changed weights are cast anew."""
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._images.device.type, dtype=self._autocast_dtype, cache_enabled=False)

    # ---- repeating

    def __call__(self, model: nn.Module, images: Tensor, others: tuple[Tensor, ...] = ()) -> Tensor:
        """Return the logits (B, num_classes) of ``images``; as differentiable as those of ``model``."""
        if not self._differentiable:
            return self.repeat_forward(images, others)
        inputs = [images if given is None else given for given in self._inputs]
        output: Tensor = _Replay.apply(self, model, images, others, *inputs)
        return output

    def repeat_forward(self, images: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """Repeat the forward pass and return its output, a copy."""
        self.replays += 1
        with self.recorder.lock, self.recorder.repeating(), torch.no_grad():
            for own, given in zip((self._images, *self._others), (images, *others), strict=True):
                own.copy_(given)
            self._forward()
            return self._output.clone()

    def repeat_backward(self, grad_output: Tensor) -> list[Tensor]:
        """Repeat the backward pass and return the gradients of the inputs, copies.

        They are parts of one copy: a parameter whose gradient it becomes may keep it.
        """
        with self.recorder.lock, self.recorder.repeating():
            self._grad_output.copy_(grad_output)
            self._backward()
            flat = {dtype: grads.clone() for dtype, grads in self._grads.items()}
        start = dict.fromkeys(flat, 0)
        grads = []
        for dtype, shape in self._shapes:
            end = start[dtype] + shape.numel()
            grads.append(flat[dtype][start[dtype] : end].view(shape))
            start[dtype] = end
        return grads

    def differentiate_eagerly(
        self, model: nn.Module, images: Tensor | None, rng_state: Tensor, grad_output: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the inputs as differentiable functions, by a forward pass without graphs.

        Args:
            model: the model.
            images: if their gradient is wanted; else a copy of those of the last call is taken.
            rng_state: of the generator before the forward pass.
            grad_output: the gradient of the output.
        """
        now = self.recorder.rng_state()
        self.recorder.set_rng_state(rng_state)
        with self._autocast():
            own = self._images.detach().clone() if images is None else images
            output = self._logits(model, own, *(t.clone() for t in self._others))
        self.recorder.set_rng_state(now)
        inputs = [cast(Tensor, images) if given is None else given for given in self._inputs]
        return torch.autograd.grad(output, inputs, grad_output, create_graph=True)

    def has_moved(self) -> bool:
        """Whether one of ``constants`` is not where it was."""
        return addresses(self.constants) != self._addresses


class _Pending(bytearray):
    """The memory of a tensor that lives as long as a backward pass may come.

    Autograd frees what it has saved for the backward pass after it, unless it is told to retain the graph.
    """


class _Replay(torch.autograd.Function):
    """A captured call in the autograd graph of the user."""

    @staticmethod
    def forward(
        ctx: Any,
        call: CapturedCall,
        model: nn.Module,
        images: Tensor,
        others: tuple[Tensor, ...],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.call, ctx.model = call, model
        ctx.rng_state = call.recorder.rng_state()
        pending = _Pending(1)
        call.recorder.claim(pending)
        saved = [images] if images.requires_grad else []
        # That these did not change is checked where they are unpacked.
        ctx.save_for_backward(torch.frombuffer(pending, dtype=torch.uint8), *call.constants, *saved)
        return call.repeat_forward(images, others)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: CapturedCall = ctx.call
        saved = ctx.saved_tensors
        if call.has_moved():
            raise RuntimeError(
                "parameters of the model were moved or frozen between a forward pass and its "
                "backward pass, which needs them; do that after the backward pass, or set cuda_graphs=False"
            )
        if torch.is_grad_enabled():  # the gradients are to be differentiated again
            images = saved[-1] if ctx.needs_input_grad[2] else None
            grads = call.differentiate_eagerly(ctx.model, images, ctx.rng_state, grad_output)
        else:
            grads = call.repeat_backward(grad_output)
        return None, None, None, None, *grads


def _twin(model: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """A copy of ``model`` that shares the memory of all its tensors, and its parameters by the model's.

    They have no past in autograd. Other attributes are the model's own: nothing else is copied.
    """
    parameters = {p: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    twins: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        twin = twins[module] = type(module).__new__(type(module))
        aliases = {name: None if p is None else parameters[p] for name, p in module._parameters.items()}
        vars(twin).update(vars(module) | {"_parameters": aliases, "_buffers": dict(module._buffers)})
    for module, twin in twins.items():
        children = {name: None if m is None else twins[m] for name, m in module._modules.items()}
        vars(twin)["_modules"] = children
    return twins[model], parameters


def _flatten(grads: Sequence[Tensor | None]) -> dict[torch.dtype, Tensor]:
    """The gradients in one tensor for each dtype: to copy them takes one kernel."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        assert grad is not None
        by_dtype.setdefault(grad.dtype, []).append(grad.reshape(-1))
    return {dtype: torch.cat(parts) for dtype, parts in by_dtype.items()}

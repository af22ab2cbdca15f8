"""Graphs: which calls of a model are captured, repeated, or made as they are."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from ..modules import has_global_hooks
from ..ops.backend import warn_once
from ..ops.base import is_recorded, is_transformed
from .captured import CapturedCall, Logits
from .choice import CudaGraphError, choice
from .recorder import RECORDERS, Recorder
from .state import ModelState, global_state, model_reasons

__all__ = ["Graphs"]

# Calls that are made as they are before one is captured: what comes once or twice is not worth a graph.
UNCAPTURED_CALLS = 2
MAX_GRAPHS = 4  # of a model: training and evaluation, each with the last batch of an epoch
MAX_KNOWN = 16  # kinds of calls that are counted
# A model that changes all the time is left alone: after some captures, each must have been worth its time.
FREE_CAPTURES, WORTHWHILE = 16, 8  # captures; repeats of each


@dataclass
class _Known:
    """What is known of calls of one kind.

    Attributes:
        state: of the model, as it was in all these calls.
        reasons: why they can't be captured.
        count: how many there were.
        call: their graphs.
    """

    state: ModelState
    reasons: list[str]
    count: int = 0
    call: CapturedCall | None = None


class Graphs:
    """The CUDA graphs of one model.

    A call is captured when there were a few of the same kind before: shape, dtype and layout of the images,
    grad mode, autocast, PyTorch's settings, the active adapter, and all that the model's Python code can see
    of the model. Then such calls repeat the graphs. A call that they can't serve is made as it is.

    A copy has no graphs, nor has what is unpickled.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Any, _Known] = OrderedDict()
        self._recorder: Recorder | None = None
        self._recording = False
        self._captures = 0
        self._repeats = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def clear(self) -> None:
        """Forget all graphs. Their memory is free when nothing waits for their backward passes."""
        self._known.clear()
        self._recorder = None

    def __call__(
        self, logits: Logits, model: nn.Module, images: Tensor, *others: Tensor, preferred: bool | None
    ) -> Tensor:
        """Return ``logits(model, images, *others)``, by a graph where that is possible.

        Args:
            logits: the function; equal ones compute the same.
            model: its model.
            images: a tensor that it takes.
            others: more of them, on the same device, which are not differentiated.
            preferred: the model's own choice; see vapt_fast.use_cuda_graphs.

        Raises:
            CudaGraphError: graphs are demanded and can't serve this call.
        """
        enabled = choice(preferred)
        if enabled is False or (enabled is None and images.device.type not in RECORDERS):
            return logits(model, images, *others)
        reasons = _reasons(model, images)
        if not reasons:
            call, reasons = self._find(logits, model, images, others, at_once=enabled is True)
            if call is not None:
                return call
        if enabled and reasons:
            raise CudaGraphError("CUDA graphs can't serve this call: " + "; ".join(reasons))
        return logits(model, images, *others)

    def _find(
        self, logits: Logits, model: nn.Module, images: Tensor, others: tuple[Tensor, ...], *, at_once: bool
    ) -> tuple[Tensor | None, list[str]]:
        """Return the output by a graph, or None and the reasons why there is none."""
        if self._recorder is None or self._recorder.device != images.device:
            self.clear()
            self._recorder = RECORDERS[images.device.type](images.device)
        recorder = self._recorder
        if recorder.is_busy():
            return None, ["it is captured by somebody else"]
        with recorder.lock:
            known = self._look_up(logits, model, images, others)
            if known.reasons:
                return None, known.reasons
            if recorder.claimed:
                return None, ["an earlier output still waits for its backward pass"]
            if self._recording:
                return None, ["another thread is capturing the model"]
            if known.call is not None:
                self._repeats += 1
                return known.call(model, images, others), []
            if known.count <= UNCAPTURED_CALLS and not at_once:
                return None, ["there were too few calls of this kind"]
            if self._captures >= FREE_CAPTURES and self._repeats < WORTHWHILE * self._captures:
                reason = (
                    f"{self._captures} captures have served {self._repeats} calls: the model keeps changing"
                )
                warn_once(f"a model is not captured as a CUDA graph any more: {reason}")
                return None, [reason]
            self._recording = True
            self._captures += 1
        try:
            call = self._capture(known, recorder, logits, model, images, others)
        finally:
            self._recording = False
        with recorder.lock:
            if call is None or recorder.claimed:
                return None, known.reasons
            self._repeats += 1
            return call(model, images, others), []

    def _look_up(
        self, logits: Logits, model: nn.Module, images: Tensor, others: tuple[Tensor, ...]
    ) -> _Known:
        """Count the call among those of its kind."""
        device_type = images.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        key = (
            *(logits, images.shape, images.stride(), images.dtype, images.requires_grad),
            *(torch.is_grad_enabled(), autocast, global_state(), tuple(t.dtype for t in others)),
            getattr(model, "active_adapter", None),
        )
        known = self._known.get(key)
        if known is None or not known.state.matches(model):
            # Those of another mode stay; those of weights or modules that are gone would keep their memory.
            for other in [key for key, other in self._known.items() if not other.state.has_same_parts()]:
                del self._known[other]
            known = _Known(ModelState(model), model_reasons(model, images.device))
            self._known[key] = known
        known.count += 1
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return known

    def _capture(
        self,
        known: _Known,
        recorder: Recorder,
        logits: Logits,
        model: nn.Module,
        images: Tensor,
        others: tuple[Tensor, ...],
    ) -> CapturedCall | None:
        differentiable = torch.is_grad_enabled() and (
            images.requires_grad or any(parameter.requires_grad for parameter in model.parameters())
        )
        captured = [other for other in self._known.values() if other.call is not None]
        for other in captured[: max(0, len(captured) + 1 - MAX_GRAPHS)]:
            other.call, other.count = None, 0
        try:
            call = CapturedCall(
                recorder, logits, model, known.state, images, others, differentiable=differentiable
            )
        # Whatever it was: the call can be made as it is.
        except Exception as error:
            known.reasons = [f"capturing it failed: {error}"]
            warn_once(
                f"images of {tuple(images.shape)} are computed without a CUDA graph, because capturing one "
                f"failed: {error}. cuda_graphs=False, or VAPT_FAST_CUDA_GRAPHS=0, leaves out the attempt"
            )
            return None
        known.call = call
        return call

    def report(self) -> str:
        """Return one line for each kind of calls: what it is, its graphs and their memory, or why none."""
        lines = []
        for key, known in self._known.items():
            _, shape, _, dtype, _, grad, autocast, *_ = key
            what = f"{'x'.join(map(str, shape))} {dtype}".replace("torch.", "")
            what += f", autocast {autocast}".replace("torch.", "") if autocast is not None else ""
            what += ", with gradients" if grad else ""
            if known.call is not None:
                how = f"captured, {known.call.memory / 2**20:,.0f} MiB, repeated {known.call.replays} times"
            elif known.reasons:
                how = f"not captured: {'; '.join(known.reasons)}"
            else:
                how = f"not captured yet, {known.count} calls"
            lines.append(f"  {what}: {how}")
        return "\n".join(lines)


def _reasons(model: nn.Module, images: Tensor) -> list[str]:
    """Return every reason why this call, whatever the model's state, has to be made as it is."""
    reasons = []
    if images.device.type not in RECORDERS:
        reasons.append(f"images are on {images.device}")
    if not images.numel():
        reasons.append("there are no images")
    if is_recorded(images) or is_transformed():
        reasons.append("it is compiled, traced, transformed, or watched by a dispatch mode")
    modes = torch.overrides._get_current_function_mode_stack()
    if not all(isinstance(mode, DeviceContext) for mode in modes):
        reasons.append("a torch function mode may change it")
    if has_global_hooks():
        reasons.append("there are hooks on all modules")
    if torch.is_grad_enabled():
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            reasons.append("hooks on saved tensors are set, as by activation checkpointing")
        if getattr(model, "grad_checkpointing", False):
            reasons.append("gradient checkpointing is on")
    if getattr(model, "_is_replica", False):
        reasons.append("the model is a replica of DataParallel")
    return reasons

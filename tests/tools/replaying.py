"""A stand-in for CUDA graphs on a CPU: PyTorch's operations, recorded and repeated on the same memory.

As on a GPU, no Python code of the model runs in a replay, tensors are where they were when they were
recorded, and what another recording has left in the shared memory is lost: it becomes NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vapt_fast.cuda_graphs.recorder import RECORDERS, Recorder

__all__ = ["ReplayingRecorder", "replaying_on_cpu"]


class _Tape(TorchDispatchMode):
    """The operations that ran, with the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor | None]]] = []
        self.storages: set[int] = set()  # all that are used
        self.made: dict[int, Tensor] = {}  # those that this tape has made, by a tensor on each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        written: list[Tensor | None] = []
        for leaf in tree_leaves(out):
            new = isinstance(leaf, Tensor) and storage(leaf) not in read
            written.append(leaf.detach() if new else None)
            if new:
                self.made.setdefault(storage(leaf), leaf.detach())
        self.storages |= read | {storage(t) for t in written if t is not None}
        is_view = not any(t is not None for t in written) and not func._schema.is_mutable
        if not is_view:
            self.calls.append((func, args, kwargs, written))
        return out

    def repeat(self) -> None:
        # What was recorded lies below autograd and autocast.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, written in self.calls:
                for kept, new in zip(written, tree_leaves(func(*args, **kwargs)), strict=True):
                    if kept is not None:
                        kept.copy_(new)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class ReplayingRecorder(Recorder):
    """Records operations on a CPU."""

    failure: Exception | None = None  # raised by the next recording

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._tapes: list[_Tape] = []
        self._results: set[int] = set()  # storages of what recorded functions have returned
        self.repeats = 0

    def is_busy(self) -> bool:
        return False

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.failure is not None:
            raise self.failure
        tape = _Tape()
        with tape:
            result = function()
        self._tapes.append(tape)
        self._results |= {storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}

        def repeat() -> None:
            self.repeats += 1
            self._spoil(tape)
            tape.repeat()

        return result, repeat

    def _spoil(self, used: _Tape) -> None:
        """Fill what other tapes have made, and neither ``used`` reads nor anybody holds, with NaN."""
        for tape in self._tapes:
            for key, tensor in tape.made.items():
                if key not in used.storages | self._results and tensor.is_floating_point():
                    torch.as_strided(
                        tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0
                    ).fill_(torch.nan)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        yield

    def rng_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def memory(self) -> int:
        storages = {key: t.untyped_storage().nbytes() for tape in self._tapes for key, t in tape.made.items()}
        return sum(storages.values())


@contextmanager
def replaying_on_cpu() -> Iterator[None]:
    """Capture calls on the CPU too, by the stand-in."""
    RECORDERS["cpu"] = ReplayingRecorder
    try:
        yield
    finally:
        del RECORDERS["cpu"]

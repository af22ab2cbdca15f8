"""A stand-in for CUDA graphs on a CPU: PyTorch's operations, recorded and repeated on the same memory.

As on a GPU, no Python code of the model runs in a replay, tensors are where they were when they were
recorded, and what another recording has left in the shared memory is lost: it becomes NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vapt_fast.cuda_graphs.recorder import RECORDERS, Recorder

__all__ = ["ReplayingRecorder", "replaying_on_cpu"]


class _Tape(TorchDispatchMode):
    """The operations that ran, with aliases of the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor | None]]] = []
        self.made: dict[int, Tensor] = {}  # a tensor on each storage that the tape has made
        self.aliases: Counter[int] = Counter()  # how many tensors the tape has on each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        read = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        new = [isinstance(leaf, Tensor) and storage(leaf) not in read for leaf in tree_leaves(out)]
        if any(new) or func._schema.is_mutable:  # else it is a view
            given, keywords = tree_map_only(Tensor, self._alias, (args, kwargs or {}))
            written = [
                self._alias(t) if is_new else None for t, is_new in zip(tree_leaves(out), new, strict=True)
            ]
            self.made |= {storage(t): t for t in written if t is not None}
            self.calls.append((func, given, keywords, written))
        return out

    def _alias(self, tensor: Tensor) -> Tensor:
        self.aliases[storage(tensor)] += 1
        return tensor.detach()

    def repeat(self) -> None:
        # What was recorded lies below autograd and autocast.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, written in self.calls:
                for kept, new in zip(written, tree_leaves(func(*args, **kwargs)), strict=True):
                    if kept is not None:
                        kept.copy_(new)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _uses(key: int) -> int:
    """How many tensors there are on a storage."""
    return torch._C._storage_Use_Count(key) - _PYTHON_USES


def _count_python_uses() -> int:
    # In some versions of PyTorch, Python uses a storage that it has seen.
    with _Tape() as tape:
        torch.ones(1)
    (key,) = tape.made
    return torch._C._storage_Use_Count(key) - tape.aliases[key]


_PYTHON_USES = _count_python_uses()


def spoil(tensor: Tensor) -> None:
    """Fill the whole storage of a tensor with NaN."""
    if tensor.is_floating_point():
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        tensor.as_strided((size,), (1,), 0).fill_(torch.nan)


class ReplayingRecorder(Recorder):
    """Records operations on a CPU."""

    failure: Exception | None = None  # raised by the next recording

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._tapes: list[_Tape] = []
        self._results: set[int] = set()  # storages of what recorded functions have returned

    def is_busy(self) -> bool:
        return False

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.failure is not None:
            raise self.failure
        tape, held = _Tape(), self._held()
        with tape:
            result = function()
        self._tapes.append(tape)
        self._results |= {storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        # What was given up meanwhile: its memory may have been given to something else.
        reused = [tensor for key, tensor in held.items() if key not in self._held()]

        def repeat() -> None:
            for other in self._tapes:
                for key, tensor in other.made.items():
                    if key not in self._results and key not in tape.aliases:
                        spoil(tensor)
            tape.repeat()
            for tensor in reused:
                spoil(tensor)

        return result, repeat

    def _held(self) -> dict[int, Tensor]:
        """What tapes have made and somebody else holds, too."""
        aliases = sum((tape.aliases for tape in self._tapes), Counter())
        made = {key: tensor for tape in self._tapes for key, tensor in tape.made.items()}
        return {key: tensor for key, tensor in made.items() if _uses(key) > aliases[key]}

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

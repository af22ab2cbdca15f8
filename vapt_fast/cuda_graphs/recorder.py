"""How work is recorded and repeated: CUDA's own graphs. Nothing above this file mentions CUDA's API."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch

__all__ = ["RECORDERS", "Recorder"]


class Recorder:
    """The recordings of one model on one device. They share memory, so one is under way at a time.

    What a recorded function has made and nobody holds any more when it ends, the next recording may reuse. So
    what a recording leaves behind for another (the activations of a forward pass) lasts until a third one is
    repeated: see ``claim``.

    This one records by ``torch.cuda.CUDAGraph``. One of another device overrides all methods from ``is_busy``
    on.

    Attributes:
        device: the device.
        lock: to be held while anything is repeated; recordings are not made under it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self._claim: weakref.ref[Any] | None = None
        self._keeper: torch.cuda.CUDAGraph | None = None
        self._last: torch.cuda.Event | None = None
        self._last_stream: torch.cuda.Stream | None = None

    def claim(self, owner: object) -> None:
        """Keep everything from being recorded or repeated, but by ``owner``, as long as that lives."""
        self._claim = weakref.ref(owner)

    @property
    def claimed(self) -> bool:
        """Whether somebody still needs what the last recording left behind."""
        return self._claim is not None and self._claim() is not None

    def is_busy(self) -> bool:
        """Whether the calling thread is recording already, so that nothing else may be recorded."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Make everything within run where recordings are made; ``record`` is called within."""
        with torch.cuda.device(self.device):
            outer = torch.cuda.current_stream()
            self._stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                outer.wait_stream(self._stream)

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Return what ``function`` returns, and a function that does the same work again.

        It reads from and writes to the same memory. Whether the work is also done while it is recorded is
        left open: here it is not.
        """
        if self._keeper is None:
            # PyTorch gives a pool up with its last graph, and refuses to capture into it again.
            self._keeper, _ = self._capture(partial(torch.zeros, 1, device=self.device))
        graph, result = self._capture(function)
        return result, graph.replay

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Order everything within after what other streams have repeated."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._last is not None and stream != self._last_stream:
                stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last, self._last_stream = stream.record_event(), stream

    def rng_state(self) -> torch.Tensor:
        """Return the state of the device's default generator."""
        return torch.cuda.get_rng_state(self.device)

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Set the state of the device's default generator."""
        torch.cuda.set_rng_state(state, self.device)

    def memory(self) -> int:
        """Return the bytes that are reserved for recordings."""
        segments = torch.cuda.memory_snapshot()
        return sum(of["total_size"] for of in segments if tuple(of["segment_pool_id"]) == self._pool)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def _capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, as those do that pin memory or watch collectives.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph, result


RECORDERS: dict[str, type[Recorder]] = {"cuda": Recorder}
"""Who records on a device, by its type."""

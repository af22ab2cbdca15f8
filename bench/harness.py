"""The check and the timing of one op, one implementation, one size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from floors import Work as Work
from torch import Tensor

from vapt_fast import BackendUnavailableError
from vapt_fast.benchmark.agreement import relative_error
from vapt_fast.ops.base import OPS

MODES = ("forward", "forward and backward")
SEED = 0

# Largest relative error against float64 of an output or gradient, by the dtype of the tokens.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}

# Inputs in turn, so much larger than the caches of a GPU (60 MB on an H200) that they come from memory.
ROTATION = 240e6
MOST_SETS = 64

Op = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one block: images, patches along each side, channels, heads, width of the MLP.

    ``compiler`` is the backend of torch.compile.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    grid: tuple[int, int]
    dim: int
    heads: int
    hidden: int
    compiler: str = "inductor"

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return 1 + self.patches

    @property
    def rows(self) -> int:
        """The tokens of all images."""
        return self.batch * self.tokens

    def compile(self, op: Op) -> Op:
        return torch.compile(op, backend=self.compiler, fullgraph=True, dynamic=False)

    def randn(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        tensor = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        return tensor.requires_grad_(grad)


@dataclass(frozen=True)
class Job:
    """An op at one size.

    Attributes:
        make: new random inputs; those that require a gradient get one.
        definition: what any implementation must compute.
        forward, backward: the least that has to be done.
    """

    make: Callable[[], list[Tensor]]
    definition: Op
    forward: Work
    backward: Work

    def work(self, mode: str) -> Work:
        return self.forward if mode == "forward" else self.forward + self.backward


class Bench:
    """A check and a timer of implementations, for pytest-benchmark.

    Args:
        benchmark: its fixture.
        sizes: for which device and dtype.
        rounds: to time.
    """

    def __init__(self, benchmark: Any, sizes: Sizes, rounds: int) -> None:
        self.benchmark, self.sizes, self.rounds = benchmark, sizes, rounds

    def __call__(self, group: str, job: Job, rival: str, op: Op, mode: str) -> None:
        """Fail if ``op`` is wrong, and skip, with the reason, if it can't run here.

        Puts into extra_info: seconds of a call, error, bytes and operations in a second, times the floor.
        """
        self.benchmark.group = f"{group}, {mode}"
        try:
            error = self._check(job, op)
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))
        calls, run = self._prepare(job, op, mode)
        self.benchmark.pedantic(run, rounds=self.rounds, warmup_rounds=2)
        facts = {"rival": rival, "largest_error": error, "calls_a_round": calls}
        if self.benchmark.enabled:
            facts |= self._figures(self.benchmark.stats.stats.median / calls, job.work(mode))
        self.benchmark.extra_info |= facts

    def _figures(self, seconds: float, work: Work) -> dict[str, float | None]:
        on_gpu = self.sizes.device.type == "cuda"
        name = torch.cuda.get_device_name(self.sizes.device) if on_gpu else "cpu"
        floor = work.seconds(name, self.sizes.dtype)
        return {
            "seconds": seconds,
            "bytes": work.bytes,
            "operations": work.operations,
            "bytes_per_second": work.bytes / seconds,
            "operations_per_second": work.operations / seconds,
            "floor_seconds": floor,
            "times_floor": None if floor is None else seconds / floor,
        }

    def _check(self, job: Job, op: Op) -> float:
        """Return the largest relative error of outputs and gradients, against the definition in float64."""
        torch.manual_seed(SEED)
        inputs = job.make()
        exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
        pairs = zip(
            outputs_and_gradients(op, inputs), outputs_and_gradients(job.definition, exact), strict=True
        )
        worst = max(relative_error(ours.double(), right) for ours, right in pairs)
        tolerance = TOLERANCES[self.sizes.dtype]
        assert worst <= tolerance, f"an output or gradient is off by {worst:.1e}, more than {tolerance:.0e}"
        return worst

    def _prepare(self, job: Job, op: Op, mode: str) -> tuple[int, Callable[[], Any]]:
        """Return the calls in a round, and the round: on a GPU a CUDA graph over many sets of inputs."""
        if self.sizes.device.type != "cuda":
            call = _caller(op, job.make(), mode)
            return 1, call
        sets = [job.make()]
        size = sum(tensor.nbytes for tensor in sets[0])
        sets += [job.make() for _ in range(min(MOST_SETS, max(4, math.ceil(ROTATION / size))) - 1)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            callers = [_caller(op, inputs, mode) for inputs in sets]
            for call in callers:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = [call() for call in callers]

        def run() -> list[tuple[Tensor, ...]]:
            graph.replay()
            torch.cuda.synchronize()
            return results  # held, so that each call writes to memory of its own

        return len(sets), run


def kernels(op: str) -> list[str]:
    """Return the backends that have kernels for ``op``, and "torch", its definition."""
    return [name for name in ("torch", "triton", "cuda") if name in ("torch", *OPS[op].implementations)]


def _caller(op: Op, inputs: list[Tensor], mode: str) -> Callable[[], tuple[Tensor, ...]]:
    if mode == "forward":
        return torch.no_grad()(lambda: _tuple(op(*inputs)))
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    with torch.no_grad():
        incoming = [torch.randn_like(output) for output in _tuple(op(*inputs))]

    def call() -> tuple[Tensor, ...]:
        outputs = _tuple(op(*inputs))
        return *(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, incoming)

    return call


def outputs_and_gradients(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    outputs = _tuple(op(*inputs))
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(SEED)
    incoming = [torch.randn(o.shape, generator=generator, device=device).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, [tensor for tensor in inputs if tensor.requires_grad], incoming)
    return [tensor.detach() for tensor in (*outputs, *grads)]


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)

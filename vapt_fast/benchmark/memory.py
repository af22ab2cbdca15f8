"""The peak memory of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from .workload import WARM_UP, Setting, Variant, Workload

__all__ = ["allocated", "peak_allocated", "peak_resident"]


def peak_resident(setting: Setting, variant: Variant, mode: str) -> float | None:
    """Return the peak on the CPU in MB (1e6 bytes), or None where the system does not tell.

    Growth of the resident memory from the finished model on, warm-up included (buffers, gradients,
    activations), in a fresh process: nothing that ran before is in the figure.
    """
    request = json.dumps([asdict(setting), asdict(variant), mode])
    command = [sys.executable, "-c", f"from {__name__} import _answer; _answer()", request]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def allocated(setting: Setting) -> int:
    """Return the bytes that PyTorch has allocated on the GPU, those of CUDA graphs included; 0 on a CPU."""
    if not setting.on_gpu:
        return 0
    torch.cuda.empty_cache()  # else what graphs that are gone have left behind is counted
    return torch.cuda.memory_allocated(setting.device) + _kept_by_graphs()


def peak_allocated(run: Callable[[], None], setting: Setting, before: int) -> float:
    """Return the MB that are allocated on the GPU at the peak of ``run``, beyond ``before`` bytes."""
    setting.synchronize()
    torch.cuda.reset_peak_memory_stats(setting.device)
    run()
    setting.synchronize()
    return (torch.cuda.max_memory_allocated(setting.device) + _kept_by_graphs() - before) / 1e6


def _kept_by_graphs() -> int:
    """Return the bytes that CUDA graphs compute in: nothing else may use them, though no tensor does."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _answer() -> None:
    """Answer peak_resident, in its fresh process."""
    setting, variant, mode = json.loads(sys.argv[1])
    run = Workload(Setting(**setting), Variant(**variant)).runner(mode)
    before = _reset_peak_resident()
    for _ in range(WARM_UP):
        run()
    print(json.dumps(None if before is None else (_resident("VmHWM") - before) / 1e6))


def _reset_peak_resident() -> int | None:
    """Start a new peak, and return the resident bytes now; None where there is no /proc (not Linux).

    getrusage would be portable, but a process starts with the peak of the one that started it.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")

"""Peak memory of a workload, measured in a fresh process: nothing that ran before is in the figure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from workload import Setting, Variant, Workload

WARM_UP, MEASURED = 1, 1


def peak_memory(setting: Setting, variant: Variant, mode: str) -> float | None:
    """Peak in MB (1e6 bytes), or None where the system does not tell.

    GPU: all that PyTorch has allocated at the peak of a run after warm-up, weights included. CPU: growth of
    the resident memory from the finished model on, warm-up included (buffers, gradients, activations).
    """
    request = json.dumps([asdict(setting), asdict(variant), mode])
    done = subprocess.run(
        [sys.executable, Path(__file__), request], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def _measure(setting: Setting, variant: Variant, mode: str) -> float | None:
    run = Workload(setting, variant).runner(mode)
    if setting.device == "cpu":
        before = _reset_peak_resident()
        for _ in range(WARM_UP + MEASURED):
            run()
        return None if before is None else (_resident("VmHWM") - before) / 1e6
    for _ in range(WARM_UP):
        run()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(MEASURED):
        run()
    return torch.cuda.max_memory_allocated() / 1e6


def _reset_peak_resident() -> int | None:
    """Start a new peak; resident bytes now. None where there is no /proc (not Linux).

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


if __name__ == "__main__":
    setting, variant, mode = json.loads(sys.argv[1])
    print(json.dumps(_measure(Setting(**setting), Variant(**variant), mode)))

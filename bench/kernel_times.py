"""Where the time of a training step goes: every kernel of the GPU, and the busiest operations of the host.

Example:
    python bench/kernel_times.py --out profile.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models import EVERY_VARIANT
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vapt_fast.benchmark import MODES, Setting, Workload
from vapt_fast.benchmark.workload import WARM_UP
from vapt_fast.files import write_atomically

NAMES = ("auto, bfloat16", "torch, bfloat16-tf32, compiled", "reference, bfloat16")
STEPS = 3
BUSIEST = 25  # operations of the host that are listed


def measure(setting: Setting, name: str, num_prompts: int) -> dict[str, Any]:
    """Return microseconds and calls of one step: of the kernels all, of the host's operations the busiest."""
    run = Workload(setting, replace(EVERY_VARIANT[name], num_prompts=num_prompts)).runner(MODES[0])
    for _ in range(WARM_UP):
        run()
    setting.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            run()
        setting.synchronize()
    events = profiler.key_averages()
    kernels = [
        _row(event.key, event.self_device_time_total, event.count)
        for event in events
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]
    host = [
        _row(event.key, event.self_cpu_time_total, event.count)
        for event in events
        if event.device_type == DeviceType.CPU
    ]
    return {
        "name": name,
        "gpu_us": round(sum(kernel["us"] for kernel in kernels), 1),
        "kernels": _busiest(kernels),
        "host_us": round(sum(operation["us"] for operation in host), 1),
        "host": _busiest(host)[:BUSIEST],
    }


def _row(name: str, us: float, count: int) -> dict[str, Any]:
    return {"name": name, "us": round(us / STEPS, 1), "calls": round(count / STEPS, 2)}


def _busiest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["us"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each variant")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    setting = Setting("vit_base_patch16_224", 64, options.device, threads)
    num_prompts = 50
    if options.tiny:
        setting = Setting("test_vit", 2, options.device, threads, image_size=32, compiler="eager")
        num_prompts = 3
    found: list[dict[str, Any]] = []
    for name in NAMES:
        try:
            found.append(measure(setting, name, num_prompts))
        except RuntimeError as error:  # the others' figures shall not be lost
            found.append({"name": name, "error": str(error).partition("\n")[0]})
        write_atomically(options.out, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

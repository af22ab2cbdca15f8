"""Reports: what would run on this machine, how the blocks of a model run, and why not faster."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from ._version import __version__
from .backbones.blocks import fallback_reason, standard_block
from .backends import _dispatch, _measurements, _native
from .forward.fused import can_pool
from .model import AdaptiveViT
from .prompts import AdaptivePrompts

__all__ = ["forward_report", "report"]


def report() -> str:
    """What would run here.

    Versions, devices and backends, each backend with what it is or every reason why it can't run; and the
    implementations of each op with those that "auto" prefers on a GPU, and what was measured of them.
    """
    chosen = os.environ.get(_dispatch.ENVIRONMENT_VARIABLE)
    lines = [
        f"vapt_fast {__version__}",
        f"  python {platform.python_version()}, torch {torch.__version__}, timm {_version('timm')}, "
        f"triton {_version('triton')}",
        f"  devices: {', '.join(_devices())}",
        f"  compiled kernels: {_compiled_kernels()}",
        f"  {_dispatch.ENVIRONMENT_VARIABLE}: {chosen if chosen is not None else 'not set'}",
        "backends",
    ]
    for name, meaning in _dispatch.BACKENDS.items():
        reasons = _dispatch.unavailable_because(name)
        lines.append(f"  {name:<10} {'no:  ' + '; '.join(reasons) if reasons else 'yes: ' + meaning}")
    lines.append("ops")
    for op, implementations in _dispatch.IMPLEMENTATIONS.items():
        lines.append(f"  {op:<16} {', '.join(implementations)}")
        entries = [str(entry) for entry in _measurements.MEASUREMENTS if entry.op == op]
        lines.append(f"    auto: {'; else '.join([*entries, 'torch'])}")
    inheriting = ", ".join(f"sm_{major}{minor}" for major, minor in _measurements.INHERITING)
    lines.append(f"  auto takes the same, though it was not measured there, on {inheriting}, and in float16")
    return "\n".join(lines)


def forward_report(model: AdaptiveViT) -> str:
    """How the blocks of ``model`` run, and why those that are called as they are can't be taken apart."""
    lines: list[tuple[str, list[int]]] = []
    for index, block in enumerate(model.backbone.blocks):
        parts = standard_block(block)
        if parts is None:
            how = f"called as it is, without rewrites: {fallback_reason(block)}"
        else:
            called = parts.called()
            how = "rewritten" + (f", {' and '.join(called)} called" if called else "")
        if index < len(model.prompts.blocks) and isinstance(model.prompts.blocks[index], AdaptivePrompts):
            how += "; prompts pooled" if can_pool(model.prompts, index) else "; prompts called"
        if lines and lines[-1][0] == how:
            lines[-1][1].append(index)
        else:
            lines.append((how, [index]))
    return "\n".join(f"  {_block_range(indices)}: {how}" for how, indices in lines)


def _block_range(indices: list[int]) -> str:
    return f"block {indices[0]}" if len(indices) == 1 else f"blocks {indices[0]} to {indices[-1]}"


def _compiled_kernels() -> str:
    if _native.missing_because():
        return "none, see backend cuda"
    return f"by CUDA {_native.compiled_by()} for {_native.native().architectures.replace(',', ', ')}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *cuda]

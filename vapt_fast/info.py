"""Reports: what would run on this machine, how the blocks of a model run, and why not faster."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from ._version import __version__
from .backbones.blocks import fallback_reason, standard_block
from .backbones.precision import precision_report
from .model import AdaptiveViT
from .ops.backend import BACKENDS, ENVIRONMENT_VARIABLE
from .ops.base import OPS
from .ops.device import (
    compiled_by,
    fp8_unsupported_reasons,
    native_missing_reasons,
    unavailable_reasons,
)
from .ops.measurement import INHERITING

__all__ = ["forward_report", "report", "version_of"]


def report() -> str:
    """What would run here.

    Versions, devices and backends, each backend with what it is or every reason why it can't run; and the
    implementations of each op with those that "auto" prefers on a GPU, and what was measured of them.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    compiled = "none, see backend cuda" if native_missing_reasons() else f"by CUDA {compiled_by()} for sm_90a"
    lines = [
        f"vapt_fast {__version__}",
        f"  python {platform.python_version()}, torch {torch.__version__}, timm {version_of('timm')}, "
        f"triton {version_of('triton') or 'not installed'}",
        f"  devices: {', '.join(_devices())}",
        f"  compiled kernels: {compiled}",
        f"  {ENVIRONMENT_VARIABLE}: {chosen if chosen is not None else 'not set'}",
        "backends",
    ]
    for name, meaning in BACKENDS.items():
        reasons = unavailable_reasons(name)
        lines.append(f"  {name:<10} {'no:  ' + '; '.join(reasons) if reasons else 'yes: ' + meaning}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = fp8_unsupported_reasons(device)
    able = "yes" if device.type == "cuda" else "mimicked, slowly"
    lines.append(f"  FP8 backbones on {device}: {'no: ' + '; '.join(reasons) if reasons else able}")
    lines.append("ops")
    for op in OPS.values():
        lines.append(f"  {op.name:<16} {', '.join(('torch', *op.implementations))}")
        lines.append(f"    auto: {'; else '.join([*map(str, op.measured), 'torch'])}")
    inheriting = ", ".join(f"sm_{major}{minor}" for major, minor in INHERITING)
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
        precision = precision_report(block)
        how += f"; {precision}" if precision else ""
        if index < len(model.prompts.blocks):
            made = model.prompts.blocks[index].report(**model.prompts.shared)
            how += f"; {made}" if made else ""
        if lines and lines[-1][0] == how:
            lines[-1][1].append(index)
        else:
            lines.append((how, [index]))
    return "\n".join(f"  {_block_range(indices)}: {how}" for how, indices in lines)


def _block_range(indices: list[int]) -> str:
    return f"block {indices[0]}" if len(indices) == 1 else f"blocks {indices[0]} to {indices[-1]}"


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *cuda]

"""What would run on this machine, and why not the rest: ``python -m vapt_fast.info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from ._version import __version__
from .backends import _dispatch

__all__ = ["report"]


def report() -> str:
    """What would run here.

    Versions, devices and backends, each backend with what it is or every reason why it can't run; and the
    implementation of each op where the backend is not the same for all.
    """
    chosen = os.environ.get(_dispatch.ENVIRONMENT_VARIABLE)
    lines = [
        f"vapt_fast {__version__}",
        f"  python {platform.python_version()}, torch {torch.__version__}, timm {_version('timm')}, "
        f"triton {_version('triton')}",
        f"  devices: {', '.join(_devices())}",
        f"  {_dispatch.ENVIRONMENT_VARIABLE}: {chosen if chosen is not None else 'not set'}",
        "backends",
    ]
    for name, meaning in _dispatch.BACKENDS.items():
        reasons = _dispatch.unavailable_because(name)
        lines.append(f"  {name:<10} {'no:  ' + '; '.join(reasons) if reasons else 'yes: ' + meaning}")
    lines.append("ops")
    for op in _dispatch.OPS:
        under_triton = "triton" if op in _dispatch.TRITON_OPS else "torch (it has no Triton kernel)"
        measured = _dispatch.AUTO_ON_TRITON.get(op)
        under_auto = (
            f"triton on CUDA ({measured})" if measured else "torch (no measurement is in favour of another)"
        )
        lines.append(f"  {op:<16} triton: {under_triton}; auto: {under_auto}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *cuda]


if __name__ == "__main__":
    print(report())

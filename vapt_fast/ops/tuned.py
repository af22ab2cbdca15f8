"""Launch configurations that were measured on a GPU; they take the place of those that were reasoned out.

``bench/tune.py`` measures them and writes tuned.json: for each compute capability the device and the date,
and for each kernel entries of sizes and what was the fastest for them.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .triton_launch import Config

__all__ = ["TABLE", "tuned"]

TABLE = Path(__file__).parent / "tuned.json"


def tuned(kernel: str, default: Config, **sizes: int) -> Config:
    """The measured configuration of ``kernel`` for ``sizes``, or ``default`` where none was measured.

    An entry serves sizes of the same names, of which none is more than one and a half times smaller or larger
    than its own; the nearest is taken. It may leave out blocks, which are then the default's.
    """
    nearest = min(_entries(kernel), key=lambda entry: _distance(entry, sizes), default=None)
    if nearest is None or _distance(nearest, sizes) > math.log(1.5):
        return default
    return replace(
        default,
        blocks=default.blocks | nearest["blocks"],
        num_warps=nearest["num_warps"],
        num_stages=nearest["num_stages"],
    )


def _distance(entry: dict[str, Any], sizes: dict[str, int]) -> float:
    if entry["sizes"].keys() != sizes.keys():
        return math.inf
    pairs = ((entry["sizes"][name], size) for name, size in sizes.items())
    return max(
        (math.inf if min(known, size) < 1 else abs(math.log(known / size)) for known, size in pairs),
        default=0.0,
    )


@cache
def _entries(kernel: str) -> list[dict[str, Any]]:
    """Those of the GPU that is the current one when they are first asked for; none without."""
    if not torch.cuda.is_available():
        return []
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return json.loads(TABLE.read_text()).get(capability, {}).get("kernels", {}).get(kernel, [])

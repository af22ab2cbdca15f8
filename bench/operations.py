"""The number of floating-point operations of a model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from torch.utils.flop_counter import FlopCounterMode

from vapt_fast.benchmark import Setting, Variant, Workload


@cache
def per_image(setting: Setting, variant: Variant, mode: str) -> int:
    """Count operations of products and convolutions (a multiplication and an addition are two) per image.

    They are counted while the backend runs, with its attention taken apart into products. The kernels of the
    other backends execute the operations of "torch", which are counted in their place.
    """
    workload = Workload(replace(setting, batch=1), replace(variant, precision="float32", attention="math"))
    with FlopCounterMode(display=False) as counter:
        workload.runner(mode)()
    return counter.get_total_flops()

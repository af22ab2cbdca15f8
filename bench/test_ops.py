"""The benchmarks of the ops: each implementation against PyTorch's, checked and timed."""

from __future__ import annotations

from importlib import import_module

import pytest
from harness import Bench, Sizes

from vapt_fast import BackendUnavailableError


def test_op(
    bench: Bench,
    sizes: Sizes,
    op: str,
    num_prompts: int | None,
    rival: str,
    mode: str,
) -> None:
    module = import_module(f"ops.{op}")
    name, _, variant = rival.partition(", ")
    try:
        implementation = module.implementation(name, sizes)
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))
    if variant == "compiled":
        implementation = sizes.compile(implementation)
    group = op if num_prompts is None else f"{op}, P = {num_prompts}"
    bench(group, module.job(sizes, num_prompts or 0), rival, implementation, mode)

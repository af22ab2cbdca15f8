"""The whole model: training step and forward pass of each backend, and of the timm model without prompts."""

from __future__ import annotations

import pytest
from workload import LINEAR_PROBE, MODES, Variant, Workload

BACKENDS = ("reference", "torch")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive(mode, backend, num_prompts, setting, measure, record_memory, models_gate):
    models_gate("adaptive", num_prompts)
    _measure(Variant(backend, "adaptive", num_prompts), mode, setting, measure, record_memory)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_deep(mode, backend, setting, measure, record_memory, models_gate):
    models_gate("deep", 50)
    _measure(Variant(backend, "deep", 50), mode, setting, measure, record_memory)


@pytest.mark.parametrize("mode", MODES)
def test_linear_probe(mode, setting, measure, record_memory):
    """Everything frozen but the head: no prompts, and no backward pass through the blocks."""
    _measure(Variant(LINEAR_PROBE), mode, setting, measure, record_memory)


def _measure(variant, mode, setting, measure, record_memory):
    prompts = (
        "no prompts" if variant.backend == LINEAR_PROBE else f"{variant.kind}, P = {variant.num_prompts}"
    )
    measure(Workload(setting, variant).runner(mode), group=f"{mode}, {prompts}")
    record_memory(variant, mode)

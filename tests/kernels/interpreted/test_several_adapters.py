"""A batch in which each image has an adapter of its own, on the Triton kernels."""

import pytest
from several import STACKABLE, mixed_batch, one_by_one, outcome, several
from tiny import assert_same

from vapt_fast import use_backend

EVERY = ("default", "more", "depthwise", "deep", "kv")


@pytest.mark.parametrize("names", [("default", "default2"), pytest.param(EVERY, marks=pytest.mark.full)])
def test_a_mixed_batch(names):
    model = several(adapters={name: STACKABLE[name.rstrip("2")] for name in names})
    images, given = mixed_batch(model)
    with use_backend("torch"):
        expected = outcome(model, lambda: one_by_one(model, images, given))
    assert_same(outcome(model, lambda: model(images, adapter_names=given)), expected)

"""What a replica makes of the images of a batch before the model computes it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vapt_fast import AdapterStack
from vapt_fast.cuda_graphs.graphs import MAX_GRAPHS
from vapt_fast.serving.options import ServeOptions
from vapt_fast.serving.service import Item, Service


@pytest.mark.skipif(torch.__version__.startswith("2.8"), reason="its fake GPU tensors need a driver")
def test_batches_on_a_gpu_have_few_sizes(tmp_path: Path) -> None:
    """As many as a model has CUDA graphs; each image still gets its own answer."""
    sizes = set()

    def stack(images: torch.Tensor, versions: list[str]) -> torch.Tensor:
        assert len(images) == len(versions)
        sizes.add(len(images))
        return torch.empty(len(images), 3, device="cuda")

    options = ServeOptions(first="", store=tmp_path, capacity=1, max_classes=3, device="cuda")
    service = Service(options, cast(AdapterStack, stack))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for count in range(1, options.batch_size + 1):
            items = [Item(torch.empty(3, 4, 4), "a")] * count
            assert [logits.shape for logits in service._logits(items)] == [(3,)] * count
    assert max(sizes) == options.batch_size
    assert len(sizes) <= MAX_GRAPHS

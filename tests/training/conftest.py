"""Small data sets."""

import pytest
import timm
import torch
from torch.utils.data import TensorDataset
from training_cases import BACKBONE, CLASSES, noise

import vapt_fast.demo  # noqa: F401, gives timm the digits' backbone
from vapt_fast.data import full_data_config
from vapt_fast.training import Splits


@pytest.fixture(scope="session")
def config():
    return full_data_config(timm.get_pretrained_cfg(BACKBONE).to_dict())


@pytest.fixture(scope="session")
def toy():
    """Three classes of noise around three colours: learnable in a few steps."""
    generator = torch.Generator().manual_seed(0)

    def images(count):
        labels = torch.arange(count) % CLASSES
        colours = torch.eye(3)[labels].view(count, 3, 1, 1)
        return TensorDataset(colours + 0.3 * torch.randn(count, 3, 32, 32, generator=generator), labels)

    return Splits(("red", "green", "blue"), images(12), images(9), images(9))


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of 10 small PNG files each, in one folder."""
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(10):
            noise(level - 50, level + 50, index).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"

"""What the examples share: a small ViT that has seen the digits 0 to 4, and images of 5 to 9."""

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from vapt_fast import AdaptiveViT
from vapt_fast.demo.digits import digit_images

BACKBONE = "vit_digits_patch4_32"  # comes with vapt_fast; put any ViT of timm here


def make_model(**options) -> AdaptiveViT:
    return AdaptiveViT(BACKBONE, pretrained=True, num_classes=5, num_prompts=10, **options)


def digits(model: AdaptiveViT, count: int = 300) -> Dataset:
    """The first ``count`` images of the digits 5 to 9, prepared for ``model``, with labels 0 to 4."""
    images, labels = digit_images(range(5, 10))
    transform = model.transform()
    pixels = torch.stack([transform(image) for image in images[:count]])
    return TensorDataset(pixels, torch.tensor(labels[:count]) - 5)


def loader(model: AdaptiveViT, **options) -> DataLoader:
    return DataLoader(digits(model), batch_size=64, shuffle=True, **options)

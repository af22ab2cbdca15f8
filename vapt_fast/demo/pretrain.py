"""Pre-train ``vit_digits_patch4_32`` on the digits 0 to 4: ``python -m vapt_fast.demo.pretrain --help``.

The model learns to name the digit and by how many quarter turns the image was rotated, 20 classes in all.
Rotation makes it look at shape, which is what carries over to digits that it has never seen.

The training is short on purpose. A backbone that has learned more (say, for 20 epochs) tells 5 to 9 apart
well enough for a linear probe, and then no method has much to gain over another.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from .backbone import WEIGHTS, vit_digits_patch4_32
from .digits import OLD_DIGITS, digit_images

__all__ = ["jitter", "pretrain"]

_TURNS = 4  # quarter turns
_BATCH = 32
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_WARMUP = 0.1  # of all steps


def pretrain(epochs: int = 7, seed: int = 0, held_out: int = 0) -> tuple[dict[str, Tensor], float]:
    """Train from scratch; the same seed, number of threads and kind of CPU give the same weights.

    Args:
        epochs: passes over the images of the digits 0 to 4.
        seed: of the initialisation, the order of the images and their augmentation.
        held_out: how many of the images to keep for measuring; 0 trains on all of them.

    Returns:
        The state dict in float16, and the accuracy on the held-out images (NaN without any): digit and
        rotation both right.
    """
    torch.manual_seed(seed)
    model = vit_digits_patch4_32()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # timm's deviation of 0.02 is too small for so narrow a model
            nn.init.xavier_uniform_(module.weight)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, digits = digit_images(OLD_DIGITS)
    pixels, labels = torch.stack([transform(image) for image in images]), torch.tensor(digits)
    order = torch.randperm(len(labels))
    test, train = order[:held_out], order[held_out:]

    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    steps_per_epoch = math.ceil(len(train) / _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=_LEARNING_RATE,
        total_steps=epochs * steps_per_epoch,
        pct_start=_WARMUP,
        cycle_momentum=False,
    )
    model.train()
    for _ in track(range(epochs), description="pre-training"):
        for batch in train[torch.randperm(len(train))].split(_BATCH):
            turned, classes = _turn(pixels[batch], labels[batch], torch.randint(_TURNS, (len(batch),)))
            loss = F.cross_entropy(model(jitter(turned)), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    model.eval()
    accuracy = _accuracy(model, pixels[test], labels[test]) if held_out else math.nan
    return {name: tensor.half() for name, tensor in model.state_dict().items()}, accuracy


def _turn(images: Tensor, labels: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each image of (B, C, H, H) by its number of quarter turns, ``turns`` (B,).

    Returns:
        The images, and their classes (B,), of which each label has four.
    """
    turned = torch.stack([image.rot90(int(n), (1, 2)) for image, n in zip(images, turns, strict=True)])
    return turned, labels * _TURNS + turns


def jitter(images: Tensor, degrees: float = 12.0, scale: float = 0.12, shift: float = 0.12) -> Tensor:
    """Rotate, scale and shift each image of (B, C, H, W) a little; ``shift`` is in half image sides."""
    angle, size, dx, dy = torch.empty(4, len(images)).uniform_(-1, 1)
    angle = angle * math.radians(degrees)
    cos, sin = torch.cos(angle) * (1 + scale * size), torch.sin(angle) * (1 + scale * size)
    rows = torch.stack([cos, -sin, shift * dx, sin, cos, shift * dy], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    # Outside of the image is black like its background, and "border" continues that.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, digits: Tensor) -> float:
    right = []
    for number in range(_TURNS):
        turned, classes = _turn(images, digits, torch.full_like(digits, number))
        right.append(model(turned).argmax(1) == classes)
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train, report, write the weights."""
    parser = argparse.ArgumentParser(description="Pre-train vit_digits_patch4_32 on the digits 0 to 4.")
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS, help="safetensors file (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=0, help="images kept to measure the accuracy on")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, the order of float32 sums and so the weights depend on the machine
    weights, accuracy = pretrain(options.epochs, options.seed, options.held_out)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.output, metadata={"epochs": str(options.epochs), "seed": str(options.seed)})
    if options.held_out:
        print(f"accuracy on {options.held_out} held-out images: {accuracy:.1%}")
    print(f"wrote {options.output} ({options.output.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()

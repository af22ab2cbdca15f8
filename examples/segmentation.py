"""A DPT decoder of segmentation_models_pytorch on a prompted ViT, beside the package's own Segmenter."""

from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from digits import BACKBONE
from torch.utils.data import DataLoader

from vapt_fast.data import full_data_config
from vapt_fast.demo.placed_digits import write_canvases
from vapt_fast.tasks.segmentation import Segmenter, evaluate_pixels, mask_splits

OPTIONS = {"img_size": 64, "num_prompts": 10}


def train(model, dataset, epochs):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.001)
    for epoch in range(epochs):
        for images, masks in DataLoader(dataset, batch_size=16, shuffle=True):
            loss = torch.nn.functional.cross_entropy(model(images), masks)  # -100: no label
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


def main(epochs: int = 5) -> None:
    folder = Path("canvases")
    write_canvases(folder, {"train": 64, "val": 8, "test": 32})  # handwritten digits at random places

    model = Segmenter(BACKBONE, pretrained=True, num_classes=6, decoder="pup", **OPTIONS)
    splits = mask_splits(folder, full_data_config(model.pretrained_cfg), seed=0)
    train(model, splits.train, epochs)
    score = evaluate_pixels(model, splits.test, splits.class_names)
    print(f"Segmenter: mean IoU {score.mean_iou:.1%}")
    model.save_adapter("segmenter", class_names=splits.class_names)

    # Any decoder that takes a timm backbone takes a vapt_ name; this one has "tu-" before it.
    other = smp.DPT(f"tu-vapt_{BACKBONE}", encoder_weights=None, classes=6, **OPTIONS)
    train(other, splits.train, epochs)
    score = evaluate_pixels(other, splits.test, splits.class_names, size=(64, 64))
    print(f"DPT: mean IoU {score.mean_iou:.1%}")


if __name__ == "__main__":
    main()

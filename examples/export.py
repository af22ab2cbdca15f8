"""A model as a file that runs without vapt_fast, and what it computes there."""

import json

import torch
from digits import digits, make_model

from vapt_fast.export import export_model


def main() -> None:
    model = make_model().eval()
    export_model(model, "exported", formats=["pt2"], class_names=["5", "6", "7", "8", "9"])

    images, _ = digits(model, 2).tensors
    program = torch.export.load("exported/model.pt2").module()
    with open("exported/export.json", encoding="utf-8") as file:
        names = json.load(file)["class_names"]
    print([names[index] for index in program(images).argmax(1)])


if __name__ == "__main__":
    main()

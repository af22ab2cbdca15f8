"""Pictures by pictures: by features of a frozen ViT, and of the same after it was adapted to others."""

import torch
from digits import digits, make_model
from torch.utils.data import DataLoader, Subset

from vapt_fast.tasks.retrieval import embed, image_retrieval


def score(model, pictures):
    """Let every picture search for its like among the others."""
    found = image_retrieval(*embed(model, DataLoader(pictures, batch_size=64)), ks=(1, 5))
    print(f"recall@1 {found.recall[1]:.1%}, mAP {found.mean_average_precision:.1%}")


def main(epochs: int = 10) -> None:
    torch.manual_seed(0)
    model = make_model()
    pictures = digits(model, 600)
    known, others = Subset(pictures, range(300)), Subset(pictures, range(300, 600))
    score(model.eval(), others)  # prompts start at zero

    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.2, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for images, labels in DataLoader(known, batch_size=64, shuffle=True):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    score(model.eval(), others)


if __name__ == "__main__":
    main()

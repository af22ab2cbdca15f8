"""Two adapters, trained together in batches in which each image has its own, and served from one stack."""

import torch
from digits import digits, make_model

from vapt_fast import AdapterStack


def main(epochs: int = 10) -> None:
    model = make_model()
    model.add_adapter("odd", num_classes=2)  # beside "default", which tells five digits apart
    images, labels = digits(model).tensors
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.2, momentum=0.9)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            half = len(rows) // 2
            names = ["default"] * half + ["odd"] * (len(rows) - half)
            targets = torch.cat([labels[rows[:half]], (labels[rows[half:]] + 1) % 2])  # 5 is odd, 6 is not
            loss = torch.nn.functional.cross_entropy(model(images[rows], adapter_names=names), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval()
    stack = AdapterStack(model, capacity=10, max_classes=5)
    for name in model.adapters:
        stack.add_adapter(name)
    with torch.no_grad():
        logits = stack(images[:2], ["default", "odd"])
    print(f"digit {logits[0].argmax() + 5}; {('even', 'odd')[logits[1].argmax()]}")


if __name__ == "__main__":
    main()

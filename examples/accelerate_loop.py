"""The same by accelerate: pip install accelerate; accelerate launch examples/accelerate_loop.py."""

import torch
from accelerate import Accelerator
from digits import loader, make_model


def main(epochs: int = 10) -> None:
    accelerator = Accelerator()
    model = make_model()
    optimizer = torch.optim.SGD(model.param_groups(weight_decay=1e-4), lr=0.2, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(model))
    for epoch in range(epochs):
        model.train()
        for images, labels in batches:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).eval().save_adapter("adapter")


if __name__ == "__main__":
    main()

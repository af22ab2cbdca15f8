"""A loop of timm's parts: optimizer, schedule, moving average."""

import torch
from digits import loader, make_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3


def main(epochs: int = 10) -> None:
    torch.manual_seed(0)
    model = make_model()
    batches = loader(model)
    optimizer = create_optimizer_v2(model, "momentum", lr=0.2, weight_decay=1e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=epochs, warmup_epochs=1)
    average = ModelEmaV3(model, decay=0.9)
    for epoch in range(epochs):
        model.train()
        for images, labels in batches:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    average.module.eval().save_adapter("adapter", class_names=["5", "6", "7", "8", "9"])


if __name__ == "__main__":
    main()

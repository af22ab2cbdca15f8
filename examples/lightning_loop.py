"""The same by Lightning: pip install lightning."""

import lightning
import torch
from digits import loader, make_model


class Adapted(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, batch, index):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.param_groups(weight_decay=1e-4), lr=0.2, momentum=0.9)


def main(epochs: int = 10) -> None:
    module = Adapted()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader(module.model))
    module.model.eval().save_adapter("adapter")


if __name__ == "__main__":
    main()

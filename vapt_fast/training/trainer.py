"""Trainer: one model, one recipe, epoch by epoch; training can be stopped and resumed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .loader import LabelledImages, make_loader, seed_cpu
from .loss import cross_entropy, num_right
from .methods import param_groups, trained_state
from .recipe import Recipe

__all__ = ["Epoch", "Trainer", "autocast", "load_trained_state", "seed_everything"]


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch of training.

    Attributes:
        epoch: counted from 1.
        lr: learning rate of the last step.
        train_loss: mean over the images, nats, with dropout and label smoothing.
        train_accuracy: of the same outputs, 0 to 1; share of the pixels in segmentation.
        seconds: wall-clock time.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    seconds: float


class Trainer:
    """A model in training by a recipe.

    Everything random in an epoch (order, augmentation, dropout) starts from (seed, number of the epoch), so
    that no state of random generators needs to outlive an epoch: after ``load_state_dict`` training goes on
    to the same bits as without the stop, on the same machine with the same number of threads.

    Args:
        model: as ``build_model`` makes it; moved to ``device``.
        recipe, train_data: what to train it on, and how.
        device, workers: where to compute, and how many processes read images.

    Attributes:
        epoch: epochs done.
        diverged: the loss is no longer a finite number; there is no point in going on.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        train_data: LabelledImages,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        self.model = model.to(device)
        self.recipe = recipe
        self.epoch = 0
        self.diverged = False
        self._data = train_data
        self._device = torch.device(device)
        self._workers = workers
        self._optimizer = _make_optimizer(model, recipe)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=recipe.amp == "float16")

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or none that is worth it."""
        return self.diverged or self.epoch >= self.recipe.epochs

    def run_epoch(self) -> Epoch:
        """Train on every training image once."""
        started = time.perf_counter()
        epoch_seed = seed_everything(self.recipe.seed, self.epoch)
        batch_size, part = self.recipe.batch_size, (parallel.rank(), parallel.world_size())
        places: dict[str, Any] = {"workers": self._workers, "part": part, "device": self._device}
        loader = make_loader(self._data, batch_size, shuffle_seed=epoch_seed, **places)
        if parallel.rank():
            seed_everything(epoch_seed, parallel.rank())  # dropout of its own
        self.model.train()
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)  # loss, images right
        for index, (images, labels) in enumerate(loader):
            lr = self.recipe.learning_rate(self.epoch * len(loader) + index, len(loader))
            count = min(batch_size, len(self._data) - index * batch_size)
            share = len(range(count)[part[0] :: part[1]]) / count
            totals += self._step(images, labels, lr, share)
        parallel.add_up(totals)
        loss, right = (totals / len(self._data)).tolist()
        self.epoch += 1
        self.diverged = not math.isfinite(loss)
        return Epoch(self.epoch, lr, loss, right, time.perf_counter() - started)

    def _step(self, images: Tensor, labels: Tensor, lr: float, share: float) -> Tensor:
        """Take a step with this process's ``share`` of a batch; 0 for an image that only fills in."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with autocast(self._device, self.recipe.amp):
            logits = self.model(images)
        logits = logits.float()
        loss = cross_entropy(logits, labels, self.recipe.label_smoothing)
        self._optimizer.zero_grad()
        self._scaler.scale(loss if share == 1 else loss * share).backward()
        parallel.add_up_gradients(p for group in self._optimizer.param_groups for p in group["params"])
        if self.recipe.clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip_grad)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        right = num_right(logits.detach(), labels)
        counted = torch.stack([loss.detach().double() * len(labels), right])
        return counted if share else torch.zeros_like(counted)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here: plain numbers and copies of tensors."""
        return {
            "recipe": asdict(self.recipe),
            "epoch": self.epoch,
            "diverged": self.diverged,
            "model": {name: tensor.cpu().clone() for name, tensor in trained_state(self.model).items()},
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state_dict`` was called.

        Raises:
            ValueError: the state belongs to another recipe.
        """
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"the state is of the recipe {state['recipe']}, expected {asdict(self.recipe)}")
        load_trained_state(self.model, state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.epoch, self.diverged = state["epoch"], state["diverged"]

    def start_from(self, trained: dict[str, Tensor], epochs: int) -> None:
        """Go on from a model that was trained for ``epochs``; the optimizer starts anew, without momentum."""
        load_trained_state(self.model, trained)
        self.epoch = epochs


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = param_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.base_lr, betas=(recipe.momentum, 0.999))
    return torch.optim.SGD(groups, lr=recipe.base_lr, momentum=recipe.momentum)


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the tensors of ``trained_state`` back into a model made in the same way."""
    model.load_state_dict({**model.state_dict(), **state})


def seed_everything(seed: int, epoch: int = 0) -> int:
    """Seed Python's, NumPy's and PyTorch's generators by (seed, epoch), and return the seed they got."""
    mixed = seed_cpu(seed, epoch)
    torch.manual_seed(mixed)  # of GPUs too
    return mixed


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Return a context of mixed precision in the dtype ``amp``; None for full precision."""
    return torch.autocast(device.type, getattr(torch, amp or "bfloat16"), enabled=amp is not None)

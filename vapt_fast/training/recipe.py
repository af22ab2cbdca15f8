"""Recipe: the hyper-parameters of one training, and its learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from functools import partial

from ..config import described, option
from .errors import UserError, check_types

__all__ = ["AMP_DTYPES", "OPTIMIZERS", "Recipe"]

AMP_DTYPES = ("bfloat16", "float16")
OPTIMIZERS = ("sgd", "adamw")


_option = partial(option, panel="Training")


@described
@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a training: linear warm-up of the learning rate, then a cosine to zero.

    Raises:
        UserError: a value of the wrong type or out of range.
    """

    base_lr: float = option(
        MISSING,
        "the learning rate at a batch size of 256. The one used is base_lr * batch_size / 256, with either "
        "optimizer",
        panel=None,
    )
    weight_decay: float = option(
        1e-4,
        "for all that is trained but the head's bias. SGD adds this share of the weights to their gradient, "
        "AdamW takes the learning rate times this share off them at each step",
        panel=None,
    )
    optimizer: str = _option("sgd", "SGD with momentum, as in the papers, or AdamW", choices=OPTIMIZERS)
    epochs: int = _option(100, "passes over the training images")
    warmup_epochs: int = _option(10, "epochs in which the learning rate rises, at most half of all")
    batch_size: int = _option(64, "images a step")
    momentum: float = _option(0.9, "momentum of SGD; beta 1 of AdamW, whose beta 2 is 0.999")
    label_smoothing: float = _option(0.0, "share of the target spread over all classes")
    clip_grad: float | None = _option(None, "largest norm of the whole gradient (default: no limit)")
    amp: str | None = _option(None, "mixed precision (default: float32)", choices=AMP_DTYPES)
    seed: int = _option(0, "seed of the split, the initialisation and the training")

    def __post_init__(self) -> None:
        check_types(self)
        for name, positive in (("base_lr", self.base_lr), ("clip_grad", self.clip_grad)):
            if positive is not None and not 0 < positive < math.inf:
                raise UserError(f"{name} must be a positive number, got {positive}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup_epochs < 0:
            raise UserError(f"warmup_epochs must be at least 0, got {self.warmup_epochs}")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.amp not in (None, *AMP_DTYPES):
            raise UserError(f"amp must be one of {AMP_DTYPES} or None, got {self.amp!r}")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2**32), got {self.seed}")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0."""
        peak = self.base_lr * self.batch_size / 256
        steps = self.epochs * steps_per_epoch
        warmup = min(self.warmup_epochs * steps_per_epoch, steps // 2)
        if step < warmup:
            return peak * (step + 1) / warmup  # never 0, which would waste the first step
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

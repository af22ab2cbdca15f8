"""Adapter: the prompts and the head of one task, as a module."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..prompts import Prompts

__all__ = ["BASE", "Adapter", "MissingHead", "check_name", "find", "mean_logits", "trainable_summary"]

BASE = "__base__"
"""The name of the backbone without prompts, which no adapter may have."""


class Adapter(nn.Module):
    """What is learned for one task: the prompts and the head. Its state dict is what an adapter file holds.

    Args:
        prompts: the prompts.
        heads: the classifiers by timm's names, ``head`` and, of a distilled backbone, ``head_dist``.
        num_classes: what the first of them tells apart; None where it says so itself.

    Attributes:
        class_names: a name for each class, None if unknown.
        data_config: how images are prepared, where not as the backbone's ``pretrained_cfg`` says.
        metadata: what the user stored with it.
    """

    head: nn.Module

    def __init__(self, prompts: Prompts, heads: dict[str, nn.Module], num_classes: int | None = None) -> None:
        super().__init__()
        self.head_names: tuple[str, ...] = ()
        self.class_names: tuple[str, ...] | None = None
        self.data_config: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {}
        self.prompts = prompts
        self.set_heads(heads, num_classes)

    def set_heads(self, heads: dict[str, nn.Module], num_classes: int | None = None) -> None:
        """Take other classifiers; the arguments are those of the class."""
        for name in self.head_names:
            delattr(self, name)
        self.head_names = tuple(heads)
        for name, head in heads.items():
            setattr(self, name, head)
        self._num_classes = num_classes

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("head_names", ()):
            self._num_classes = None  # is that of the classifier that is replaced
        super().__setattr__(name, value)

    @property
    def num_classes(self) -> int:
        """How many classes the first classifier tells apart, which users may have replaced; 0 without one.

        Raises:
            ValueError: it is a module that does not say so.
        """
        head = self.heads()[0]
        if isinstance(head, (nn.Identity, MissingHead)):
            return 0
        number, last = getattr(head, "out_features", self._num_classes), head
        while number is None and isinstance(last, nn.Sequential) and len(last):
            last = last[-1]
            number = getattr(last, "out_features", None)
        if number is None:
            raise ValueError(
                f"{self.head_names[0]} must tell its number of classes, got a {type(head).__name__} without "
                f"out_features; set it: model.{self.head_names[0]}.out_features = ..."
            )
        return int(number)

    def heads(self) -> list[nn.Module]:
        """Return the classifiers."""
        return [getattr(self, name) for name in self.head_names]

    def head_classes(self) -> dict[str, str]:
        """Return the name of each classifier's class; "Linear" for all that compute what nn.Linear does."""
        classes = {name: type(getattr(self, name)) for name in self.head_names}
        linears = {cls for cls in classes.values() if getattr(cls, "forward", None) is nn.Linear.forward}
        return {name: "Linear" if cls in linears else cls.__name__ for name, cls in classes.items()}

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the logits (B, num_classes) of what each classifier reads, (B, C); the mean of several."""
        return mean_logits([head(features) for head, features in zip(self.heads(), inputs, strict=True)])


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Return the mean of what several classifiers give."""
    return logits[0] if len(logits) == 1 else sum(logits[1:], logits[0]) / len(logits)


class MissingHead(nn.Module):
    """The place of a backbone's own classifier that nobody has trained."""

    def forward(self, *inputs: Any) -> Tensor:
        """Raise ValueError."""
        raise ValueError(
            "the bare backbone has no classifier that was trained: it was made without weights, or with "
            "another number of classes than they have; ask for its features, or make the model from a timm "
            "model with its own head"
        )


def check_name(name: object) -> str:
    """Return the name of an adapter.

    Raises:
        TypeError: not a str.
        ValueError: empty, that of the bare backbone, or one that a module can't have.
    """
    if not isinstance(name, str):
        raise TypeError(f"name of an adapter must be a str, got {name!r}")
    if not name or "." in name or name == BASE or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name of an adapter must not be empty, contain a dot, or be {BASE!r} or an attribute of "
            f"torch.nn.ModuleDict, got {name!r}"
        )
    return name


def find(adapters: nn.ModuleDict, name: str) -> Adapter:
    """Return the adapter of that name.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in adapters:
        raise ValueError(f"adapter must be one of {tuple(adapters)}, got {name!r}")
    return cast(Adapter, adapters[name])


def trainable_summary(model: nn.Module) -> str:
    """Say how much of ``model`` is trained: "trainable: 123,456 of 86,000,000 parameters (0.14%)"."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"trainable: {trainable:,} of {total:,} parameters ({trainable / max(total, 1):.2%})"

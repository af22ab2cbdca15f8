"""Adapter: the prompts and the head of one task, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..prompts import Prompts

__all__ = ["Adapter", "trainable_summary"]


class Adapter(nn.Module):
    """What is learned for one task: the prompts and the head. Its state dict is what an adapter file holds.

    Args:
        prompts: the prompts.
        heads: the classifiers by timm's names, ``head`` and, of a distilled backbone, ``head_dist``.
        num_classes: what they tell apart, 0 without classifier.
    """

    head: nn.Module

    def __init__(self, prompts: Prompts, heads: dict[str, nn.Module], num_classes: int) -> None:
        super().__init__()
        self.head_names = tuple(heads)
        self.prompts = prompts
        self.set_heads(heads, num_classes)

    def set_heads(self, heads: dict[str, nn.Module], num_classes: int) -> None:
        """Take other classifiers of the same names."""
        self.num_classes = num_classes
        for name, head in heads.items():
            setattr(self, name, head)

    def heads(self) -> list[nn.Module]:
        """Return the classifiers."""
        return [getattr(self, name) for name in self.head_names]

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the logits (B, num_classes) of what each classifier reads, (B, C); the mean of several."""
        logits = [head(features) for head, features in zip(self.heads(), inputs, strict=True)]
        return logits[0] if len(logits) == 1 else sum(logits[1:], logits[0]) / len(logits)


def trainable_summary(model: nn.Module) -> str:
    """Say how much of ``model`` is trained: "trainable: 123,456 of 86,000,000 parameters (0.14%)"."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"trainable: {trainable:,} of {total:,} parameters ({trainable / max(total, 1):.2%})"

"""The protocols of published tables: how each method is trained, what is tried, and with which seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PROTOCOLS", "Protocol", "Training"]


@dataclass(frozen=True)
class Training:
    """How a method is trained.

    Attributes:
        base_lrs, weight_decays: what is tried, each with each; learning rates at a batch size of 256.
        recipe: other numbers of Recipe.
        prompts: options of PromptConfig.
    """

    base_lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """A protocol.

    Attributes:
        seeds: of the trainings that are tested.
        suites: by suite, options of RunOptions.
        train_on_validation: the suites whose last trainings are on the validation images too.
        trainings: by method; those of "" for all others.
    """

    seeds: tuple[int, ...]
    suites: Mapping[str, Mapping[str, Any]]
    train_on_validation: tuple[str, ...]
    trainings: Mapping[str, Training]

    def training(self, method: str) -> Training:
        """Return how a method is trained."""
        return self.trainings.get(method, self.trainings[""])


_DECAYS = (0.01, 0.001, 0.0001, 0.0)
_PROMPT_LRS = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
_ADAMW = {"optimizer": "adamw"}

_PAPER = Protocol(
    seeds=(42, 44, 82, 100, 800),
    suites={
        "vtab": {"normalize": "imagenet", "cache": True},
        "fgvc": {"normalize": "imagenet", "augment": "crop-flip"},
    },
    train_on_validation=("vtab",),
    trainings={
        "": Training(_PROMPT_LRS, _DECAYS),
        "vpt-deep": Training(_PROMPT_LRS, _DECAYS, prompts={"prompt_dropout": 0.1}),
        "full": Training((0.005, 0.001, 0.0005, 0.0001), _DECAYS, _ADAMW),
        # The papers have no grid for LoRA: this one is around the usual 0.001 at a batch size of 64.
        "lora": Training((0.02, 0.01, 0.004, 0.002), _DECAYS, _ADAMW),
    },
)

# Rates of 0.001 and 0.0001 at a batch size of 64, which are scaled with it.
_NEW = Protocol(
    seeds=(18, 45, 25),
    suites={
        "vtab": {"normalize": "model", "cache": True},
        "fgvc": {"normalize": "model", "augment": "random-resized-crop"},
    },
    train_on_validation=("vtab", "fgvc"),
    trainings={"": Training((0.004,), (0.0001,), _ADAMW), "full": Training((0.0004,), (0.0001,), _ADAMW)},
)

PROTOCOLS = {"paper": _PAPER, "adamw": _NEW}
"""``paper``: that of VPT and VAPT, SGD with a grid; ``adamw``: that of Adapter+, AdamW with one recipe."""

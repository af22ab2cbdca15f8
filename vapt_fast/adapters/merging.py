"""Merging adapters: the weighted sum of their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ..arguments import listing, real
from .checks import TRAINING_OPTIONS
from .module import Adapter

__all__ = ["weighted_state"]


def weighted_state(adapters: Mapping[str, Adapter], weights: Sequence[float] | None) -> dict[str, Tensor]:
    """Return the state dict of the weighted sum of ``adapters``, in their dtypes.

    Args:
        adapters: by name, of equal options, shapes and classes.
        weights: a factor for each; None for their mean.

    Raises:
        TypeError, ValueError: no adapters, another number of weights, weights that are not finite, or
            adapters that differ; lists every difference.
    """
    if not adapters:
        raise ValueError("adapters to merge must be one at least, got none")
    if weights is None:
        weights = [1 / len(adapters)] * len(adapters)
    factors = [real(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    if len(factors) != len(adapters) or not all(map(math.isfinite, factors)):
        raise ValueError(f"weights must be {len(adapters)} finite numbers, one an adapter, got {weights!r}")
    first, *others = adapters
    problems = [
        problem for name in others for problem in _differences(first, adapters[first], name, adapters[name])
    ]
    if problems:
        raise ValueError(listing("these adapters can't be merged", problems))
    states = [adapter.state_dict() for adapter in adapters.values()]
    total: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in states[0].items():
            parts = [factor * state[name].double() for factor, state in zip(factors, states, strict=True)]
            total[name] = sum(parts[1:], parts[0]).to(value.dtype)
    return total


def _differences(first: str, one: Adapter, name: str, other: Adapter) -> list[str]:
    own, theirs = asdict(one.prompts.config), asdict(other.prompts.config)
    problems = [
        f"prompts {option}: {first!r} has {own[option]!r}, {name!r} {theirs[option]!r}"
        for option in own
        if option not in TRAINING_OPTIONS and own[option] != theirs[option]
    ]
    for key in ("class_names", "data_config"):
        mine, its = getattr(one, key), getattr(other, key)
        if mine != its:
            problems.append(f"{key}: {first!r} has {mine}, {name!r} {its}")
    shapes = [{key: value.shape for key, value in adapter.state_dict().items()} for adapter in (one, other)]
    problems += [
        f"{key}: {first!r} has {shapes[0].get(key)}, {name!r} {shapes[1].get(key)}"
        for key in sorted(shapes[0].keys() | shapes[1].keys())
        if shapes[0].get(key) != shapes[1].get(key)
    ]
    return problems

"""Arguments as users have them, numpy's and torch's numbers among them, as Python's own."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, SupportsFloat, SupportsIndex, cast

__all__ = ["boolean", "choice", "integer", "listing", "plain", "real", "size_pair"]


def integer(name: str, value: object, minimum: int | None = None) -> int:
    """Return the int that ``value`` is: Python's, numpy's, or an array or tensor without dimensions.

    Raises:
        TypeError: not an integer; a bool is none.
        ValueError: smaller than ``minimum``.
    """
    if isinstance(value, bool) or _kind(value) not in (None, "integer"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def real(name: str, value: object) -> float:
    """Return the float that ``value`` is: Python's, numpy's, or an array or tensor without dimensions.

    Raises:
        TypeError: not a real number; a bool is none.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number and _kind(value) not in ("integer", "real"):
        raise TypeError(f"{name} must be a float, got {value!r}")
    return float(cast(SupportsFloat, value))


def boolean(name: str, value: object) -> bool:
    """Return the bool that ``value`` is, Python's or numpy's.

    Raises:
        TypeError: not a bool; 0 and 1 are none.
    """
    if not isinstance(value, bool) and _kind(value) != "bool":
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return bool(value)


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return the one of ``choices`` that ``value`` is.

    Raises:
        TypeError: not a str.
        ValueError: none of them.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, one of {choices}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def size_pair(name: str, value: Any) -> tuple[int, int]:
    """Return the (height, width) that ``value`` is: two positive integers, or one for both.

    Raises:
        TypeError: not one or two integers.
        ValueError: not positive.
    """
    given = value.tolist() if hasattr(value, "tolist") else value
    sides = given if isinstance(given, (tuple, list)) else (given, given)
    try:
        height, width = (integer(name, side) for side in sides)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be (height, width) in pixels, got {value!r}") from None
    if min(height, width) < 1:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return height, width


def plain(value: Any) -> Any:
    """Return ``value`` with Python's numbers in the place of numpy's and torch's; all else stays.

    Dicts, lists and tuples are gone through.
    """
    if type(value) is dict:
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.item() if _kind(value) in ("bool", "integer", "real") else value


def listing(summary: str, problems: Iterable[str]) -> str:
    """Return the message of an error that has several reasons, one line each."""
    return "\n  - ".join([f"{summary}:", *problems])


def _kind(value: object) -> str | None:
    """What a number of numpy or torch is: "bool", "integer", "real" or "other"; None for anything else."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return None
    if getattr(value, "ndim", None) != 0:
        return "other"
    name = str(dtype).removeprefix("torch.")
    for kind, beginnings in (("bool", "bool"), ("integer", ("int", "uint")), ("real", ("float", "bfloat"))):
        if name.startswith(beginnings):
            return kind
    return "other"

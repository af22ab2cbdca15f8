"""UserError, the mistakes that users can correct, and checks that raise it."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from ..arguments import plain

__all__ = ["DivergedError", "UserError", "check_types", "printable"]

# Control characters, undecodable bytes of file names (surrogates), and what else would end a line.
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}


class UserError(ValueError):
    """A mistake in the arguments or the files of a run; one line: which, what was given, what is expected."""


class DivergedError(UserError):
    """Training diverged: the losses, or what the model gives, are no longer finite numbers."""


def printable(text: str | os.PathLike[str]) -> str:
    r"""Return a name, a path or a message as one line for any terminal: "a\nb", "\udcff" escaped."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNPRINTABLE
        else character
        for character in str(text)
    )


def check_types(options: Any) -> None:
    """Check that every field of a dataclass has the type that it is annotated with, or the like of numpy.

    Raises:
        UserError: one has not; the message names it.
    """
    hints = get_type_hints(type(options))
    for option in fields(options):
        value = plain(getattr(options, option.name))
        object.__setattr__(options, option.name, value)  # the dataclass is frozen
        if not _is_a(value, hints[option.name]):
            raise UserError(f"{option.name} must be {option.type}, got {value!r}")


def _is_a(value: object, hint: Any) -> bool:
    """Whether ``value`` has a type: a plain one, a list or dict of such, or a union."""
    container, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if container is list:
        return isinstance(value, list) and all(_is_a(item, inner[0]) for item in value)
    if container is dict:
        return isinstance(value, dict) and all(_is_a(key, inner[0]) for key in value)
    if inner:
        return any(_is_a(value, option) for option in inner)
    return isinstance(value, hint)

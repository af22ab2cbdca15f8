"""The options of the prompts on the command line, derived from PromptConfig and the kinds there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, Literal

from ..config import KINDS, PromptConfig
from ..training import UserError
from .options import MODEL, PROMPTS, option

__all__ = ["PROMPT_OPTIONS", "prompt_value", "with_prompt_options"]

PROMPT_OPTIONS = [field for field in fields(PromptConfig) if not field.name.startswith("kind")]

_METHODS = (*dict.fromkeys(cls.method for cls in KINDS.values()), "linear", "full")
_OTHER_NAMES = ", ".join(f"{kind} for {cls.method}" for kind, cls in KINDS.items() if kind != cls.method)

# The methods are those of the registered kinds, so no type checker can know them.
_METHOD: Any = Annotated[
    Literal[tuple(dict.fromkeys([*_METHODS, *KINDS]))],
    option(f"What to train. The kinds of PromptConfig are other names: {_OTHER_NAMES}.", MODEL),
]


def prompt_value(field: Field, given: Any) -> Any:
    """Return the value of an option of PromptConfig from that of the command, where numbers may be text."""
    if not isinstance(given, str) or field.metadata["choices"]:
        return given
    if given == "none" and "None" in str(field.type):
        return None
    several = "Sequence" in str(field.type)
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 or (several and numbers):
        return numbers if len(numbers) > 1 else numbers[0]
    flag = "--" + field.name.replace("_", "-")
    other = "one for each block, as 10,10,0" if several else "'none'"
    raise UserError(f"{flag} must be an integer or {other}, got {given!r}")


def with_prompt_options(command: Callable) -> inspect.Signature:
    """Return the signature of ``command``, with PromptConfig's options in place of its ``**prompts``."""
    signature = inspect.signature(command, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    own = [p.replace(annotation=_METHOD) if p.name == "method" else p for p in own]
    return signature.replace(parameters=[*own, *map(_parameter, PROMPT_OPTIONS)])


def _parameter(field: Field) -> inspect.Parameter:
    kind = {"bool": bool, "float": float, "int": int}.get(str(field.type), str)
    help, choices, flags = (field.metadata[key] for key in ("help", "choices", "flags"))
    names = [f"--{field.name.replace('_', '-')}", *flags] if flags else []
    described = option(f"{help[0].upper()}{help[1:]}.", PROMPTS, *names)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default if kind is not str else str(field.default),
        annotation=Annotated[Literal[choices] if choices else kind, described],
    )

"""The options of ``vapt-fast train``, derived from those of a run, its recipe and its prompts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from ..config import KINDS, PromptConfig
from ..training import METHODS, Recipe, RunOptions, UserError
from ..training.methods import method_name
from ..training.suites import is_suite_data

__all__ = ["ARGUMENTS", "flag_of", "is_given", "run_options", "value_of", "with_flags", "with_run_options"]

_OWNERS = (RunOptions, Recipe, PromptConfig)

ARGUMENTS: dict[str, tuple[type, Field]] = {
    option.metadata["name"] or option.name: (owner, option)
    for owner in _OWNERS
    for option in fields(owner)
    if option.metadata.get("panel")
}
"""By the command's argument, the dataclass and the field that it sets."""

_OTHER_NAMES = ", ".join(f"{kind} for {cls.method}" for kind, cls in KINDS.items() if kind != cls.method)


def with_run_options(
    command: Callable, leave_out: Collection[str] = (), *, defaults: bool = True
) -> inspect.Signature:
    """Return the signature of ``command``, with ARGUMENTS but for some in place of its ``**given``.

    Without ``defaults`` the help names none: the command has others.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    added = [_parameter(name, *of, defaults) for name, of in ARGUMENTS.items() if name not in leave_out]
    return signature.replace(parameters=[*own, *added])


def _parameter(name: str, owner: type, option: Field, defaults: bool) -> inspect.Parameter:
    choices, default, help = option.metadata["choices"], option.default, option.metadata["help"]
    kind: Any = option.metadata["type"] or get_type_hints(owner)[option.name]
    if owner is PromptConfig and kind not in (bool, float, int):
        kind, default = str, str(default)  # numbers, which ``value_of`` reads
    if name == "method":
        # Those of the registered kinds, so no type checker can know them.
        choices = tuple(dict.fromkeys([*METHODS, *KINDS]))
        help += f". The kinds of PromptConfig are other names: {_OTHER_NAMES}"
    if choices:
        literal: Any = Literal[choices]
        kind = literal | None if default is None else literal
    if not defaults:
        help = help.partition(" (default: ")[0]
    described = typer.Option(
        *option.metadata["flags"],
        help=f"{help[0].upper()}{help[1:]}.",
        show_default=defaults,
        rich_help_panel=option.metadata["panel"],
    )
    annotation = Annotated[kind, described]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def run_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of RunOptions from the command's ``given``, which may be some of ARGUMENTS."""
    by_owner: dict[type, dict[str, Any]] = {owner: {} for owner in _OWNERS}
    for name, value in given.items():
        owner, option = ARGUMENTS[name]
        by_owner[owner][option.name] = value_of(name, value)
    options = by_owner[RunOptions]
    data = options.get("data", "digits")
    if data != "digits" and not is_suite_data(data):
        options["data"] = str(Path(data).resolve())
    for path in ("root", "weights"):
        if options.get(path) is not None:
            options[path] = str(options[path].resolve())
    if "method" in options:
        options["method"] = method_name(options["method"])
    for candidates in ("base_lrs", "weight_decays"):
        if candidates in options:
            options[candidates] = list(options[candidates]) if options[candidates] else None
    return {**options, "recipe": by_owner[Recipe], "prompts": by_owner[PromptConfig]}


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def value_of(name: str, given: Any) -> Any:
    """Return the value of a field from that of the command's argument, where numbers of prompts are text."""
    owner, option = ARGUMENTS[name]
    if owner is not PromptConfig or not isinstance(given, str) or option.metadata["choices"]:
        return given
    if given == "none" and "None" in str(option.type):
        return None
    several = "Sequence" in str(option.type)
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 or (several and numbers):
        return numbers if len(numbers) > 1 else numbers[0]
    other = "one for each block, as 10,10,0" if several else "'none'"
    raise UserError(f"{flag_of(name)} must be an integer or {other}, got {given!r}")


def flag_of(name: str) -> str:
    """Return how an argument is given on the command line."""
    return "--" + name.replace("_", "-")


def with_flags(message: str, leave_out: Collection[str] = ()) -> str:
    """Return an error's message with the flags of ARGUMENTS, but for some, in the place of the fields' names.

    A name of one word ("data", "test") is that of an option only where the message begins with it. What is
    quoted or part of a path stays.
    """
    given = {name: option for name, (_, option) in ARGUMENTS.items() if name not in leave_out}
    flags = {option.name: flag_of(name) for name, option in given.items()} | {"base_lr": flag_of("lr")}

    def flag(found: re.Match[str]) -> str:
        name = found[0]
        return flags[name] if "_" in name or found.start() == 0 else name

    return re.sub(rf"(?<![\w/.'\"-])({'|'.join(flags)})(?![\w/'\"-]|\.\w)", flag, message)

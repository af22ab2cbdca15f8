"""PromptConfig: every option of the prompts, declared once and checked when a config is made."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

from .activations import ACTIVATIONS
from .arguments import boolean, choice, integer, real

__all__ = ["KINDS", "PromptConfig", "described", "explain_unexpected", "option", "split_options"]

KINDS: dict[str, Any] = {}
"""The kinds of prompts by name, each a class; ``vapt_fast.prompts.register_kind`` adds to them."""

Check = Callable[[str, Any], Any]


def option(
    default: Any,
    help: str,
    check: Check | None = None,
    *,
    choices: Sequence[str] | None = None,
    panel: str | None = "Prompts",
    flags: Sequence[str] = (),
    name: str | None = None,
    type: Any = None,
) -> Any:
    """Return a field of a dataclass of options, from which everything about the option derives.

    Args:
        default: its default.
        help: what it means, for ``help()`` of the dataclass and the command line.
        check: called with the name and the value; returns the value as it is kept, or raises.
        choices: all values that are allowed, if they are few.
        panel: where the command line's help lists it; None if it is not on the command line.
        flags: its names on the command line; none for ``--name``.
        name: that of the command's argument, if another than the field's.
        type: that on the command line, if another than the field's.
    """
    metadata = {"help": help, "check": check, "choices": choices, "panel": panel, "flags": flags}
    return field(default=default, metadata=metadata | {"name": name, "type": type})


def _optional(check: Check) -> Check:
    def check_unless_none(name: str, value: object) -> Any:
        return None if value is None else check(name, value)

    return check_unless_none


def _between(name: str, value: object, *, with_1: bool) -> float:
    number = real(name, value)
    if not 0.0 <= number <= 1.0 or (number == 1.0 and not with_1):
        raise ValueError(f"{name} must be in [0, 1{']' if with_1 else ')'}, got {number}")
    return number


def _kind(name: str, value: object) -> str:
    kinds = tuple(KINDS)
    if not isinstance(value, str) or value in kinds:
        return choice(name, value, kinds)
    of_method = [kind for kind, cls in KINDS.items() if cls.method == value]
    hint = f"that method's kind is {of_method[0]!r}" if of_method else "register a kind of your own first"
    raise ValueError(f"{name} must be one of {kinds}, got {value!r}; {hint}")


def _num_prompts(name: str, value: object) -> int | tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(integer(f"{name}[{i}]", number, minimum=0) for i, number in enumerate(value))
    try:
        return integer(name, value, minimum=0)
    except TypeError as error:
        raise TypeError(f"{error}; expected an int, or a sequence with one int a block") from None


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a mapping from names to values, got {value!r}")
    return dict(value)


def _choice_option(default: str, help: str, choices: Sequence[str]) -> Any:
    return option(default, help, partial(choice, choices=tuple(choices)), choices=tuple(choices))


_at_least_0 = partial(integer, minimum=0)
_size = _optional(partial(integer, minimum=1))
_share = partial(_between, with_1=True)
_rate = partial(_between, with_1=False)


Options = TypeVar("Options", bound=type)


def described(cls: Options) -> Options:
    """Return a dataclass whose docstring ends with the help of its options."""
    lines = (f"{option.name}: {option.metadata['help']}." for option in fields(cls))
    filled = (textwrap.fill(line, 110, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in lines)
    cls.__doc__ = "\n".join([f"{cls.__doc__}", "    Attributes:", *filled])
    return cls


@described
@dataclass(frozen=True)
class PromptConfig:
    """How prompts are made and where they go.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range; the message names the option, what was given and what is expected.
    """

    kind: str = option(
        "adaptive",
        'how prompts are made: "adaptive" computes those of each block from the image\'s own patch tokens '
        '(VAPT, arXiv 2501.18936, section 4); "deep" learns a table for every block (VPT-deep, Jia et al. '
        '2022); "shallow" learns one table, placed before block 0, whose tokens then travel through all '
        'blocks (VPT-shallow); "fourier" transforms the tables of "deep" (VFPT); "kv" learns keys and values '
        "for each block's attention (prefix tuning); or a kind of your own, see vapt_fast.prompts",
        _kind,
        panel=None,
    )
    num_prompts: int | Sequence[int] = option(
        10,
        "number P of prompts: one for all blocks, or one for each block; 0 for all makes a linear probe",
        _num_prompts,
        flags=("--num-prompts", "--prompts"),
    )
    static_depth: int = option(
        1, "number of first blocks whose prompts are a learned table (adaptive prompts only)", _at_least_0
    )
    conv_kernel: int | None = option(
        2, "side K of the K x K convolution over the patch grid; none for no convolution", _size
    )
    conv_padding: int = option(
        0, "zero padding of that convolution on each side, in patches, smaller than K", _at_least_0
    )
    conv_shared: bool = option(
        True, "one kernel shared by all channels; otherwise one a channel (depthwise)", boolean
    )
    projector_dim: int | None = option(
        8, "width r of the feature projector's bottleneck; none for no projector", _size
    )
    projector_shared: bool = option(True, "one projector for all blocks; otherwise one a block", boolean)
    projector_activation: str = _choice_option(
        "relu",
        "activation of the projector; gelu is exact, softmax is over the r features",
        tuple(ACTIVATIONS),
    )
    projector_dropout: float = option(0.1, "dropout rate on the r features", _rate)
    projector_scale_learnable: bool = option(
        False, "learn the factor of the projector's branch, which starts at 1", boolean
    )
    prompt_dropout: float = option(0.0, "dropout rate on learned tables", _rate)
    channel_dropout: float = option(
        0.1, "rate at which whole (image, channel) planes are dropped after the convolution", _rate
    )
    pool_prompts: bool = option(
        False,
        "average the prompts of the last block together with the patch tokens, as the public MAE variant "
        "does; needs a backbone with average pooling",
        boolean,
    )
    add_table: bool = option(
        False, "add a learned table to the computed prompts (adaptive prompts only)", boolean
    )
    fourier_share: float = option(
        1.0,
        "share of the prompts that are the Fourier transform of their table (fourier prompts only)",
        _share,
    )
    fourier_dims: str = _choice_option(
        "all",
        "transform over the sequence of prompts, over the channels, or over both (fourier prompts only)",
        ("all", "sequence", "channel"),
    )
    kind_options: Mapping[str, Any] = field(
        default_factory=dict,
        hash=False,
        metadata={"help": "the own options of a kind from outside this package", "check": _mapping},
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = option.metadata["check"](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, value)  # the dataclass is frozen
        KINDS[self.kind].check_config(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> PromptConfig:
        """Return the config with these options; unknown names are a TypeError that lists the known ones."""
        known = [option.name for option in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown prompt options {unknown}, expected some of {known}")
        return cls(**options)

    def as_keywords(self) -> dict[str, Any]:
        """Return the options as keywords for timm.create_model, with 0 for None, which it would drop."""
        return {name: 0 if value is None else value for name, value in asdict(self).items()}

    def num_prompts_by_block(self, depth: int) -> tuple[int, ...]:
        """Return the number of prompts of each of ``depth`` blocks.

        Raises:
            ValueError: ``num_prompts`` has another number of entries.
        """
        if isinstance(self.num_prompts, int):
            return (self.num_prompts,) * depth
        if len(self.num_prompts) != depth:
            raise ValueError(
                f"num_prompts must have one number for each of the backbone's {depth} blocks, got "
                f"{len(self.num_prompts)}: {self.num_prompts}"
            )
        return tuple(self.num_prompts)


def split_options(
    prompts: PromptConfig | None, options: Mapping[str, Any], base: PromptConfig | None = None
) -> tuple[PromptConfig, dict[str, Any]]:
    """Return the options of the prompts, and all others.

    timm.create_model drops keywords that are None, so 0 says it for the two options where None matters:
    ``conv_kernel=0`` means no convolution and ``projector_dim=0`` no projector.

    Args:
        prompts: all options of the prompts, None if ``options`` has them.
        options: keywords of any sort.
        base: what ``options`` change; None for the defaults.

    Raises:
        TypeError: ``prompts`` is not a PromptConfig, or there are options of the prompts beside it.
        TypeError, ValueError: as PromptConfig raises.
    """
    names = {option.name for option in fields(PromptConfig)}
    own = {name: value for name, value in options.items() if name in names}
    if prompts is None:
        optional = (option.name for option in fields(PromptConfig) if option.metadata["check"] is _size)
        own |= {name: None for name in optional if own.get(name) == 0}
        prompts = PromptConfig(**own) if base is None else replace(base, **own)
    elif not isinstance(prompts, PromptConfig):
        raise TypeError(f"prompts must be a PromptConfig, got {type(prompts).__name__}")
    elif own:
        raise TypeError(
            f"options of the prompts must be given as keywords or as prompts=PromptConfig(...), got both: "
            f"{sorted(own)} beside prompts"
        )
    return prompts, {name: value for name, value in options.items() if name not in names}


# Options of timm's that people mean when they mistype one.
_TIMM_OPTIONS = ("num_classes", "img_size", "in_chans", "global_pool", "drop_rate", "patch_size", "embed_dim")


def explain_unexpected(error: TypeError, options: Collection[str], backbone: str) -> TypeError | None:
    """What is wrong, if ``error`` is timm's about one of ``options`` that it does not know; else None."""
    match = re.search(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'", str(error))
    if match is None or match[1] not in options:
        return None
    name, own = match[1], [field.name for field in fields(PromptConfig)]
    known = [*own, "backend", "backbone_precision", "pretrained", *_TIMM_OPTIONS]
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return TypeError(
        f"{name!r} is an option neither of the prompts nor of timm's {backbone}{meant} The prompts' options "
        f"are {own}"
    )

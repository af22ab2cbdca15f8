"""The kinds of prompts, one a file: parameters, dropouts, literal formula, rewritten form. See ``base``."""

from .adaptive import AdaptivePrompts
from .base import BlockPrompts, Geometry, Masks, NoPrompts, Prompts, register_kind
from .deep import StaticPrompts
from .fourier import FourierPrompts
from .kv import KeyValuePrompts
from .plain import KeysValues, PlainProjector, PlainPrompts, Pooling
from .projector import Projector
from .shallow import ShallowPrompts

__all__ = [
    "AdaptivePrompts",
    "BlockPrompts",
    "FourierPrompts",
    "Geometry",
    "KeyValuePrompts",
    "KeysValues",
    "Masks",
    "NoPrompts",
    "PlainProjector",
    "PlainPrompts",
    "Pooling",
    "Projector",
    "Prompts",
    "ShallowPrompts",
    "StaticPrompts",
    "register_kind",
]

"""The stateless ops that VAPT is made of, for people who build their own modules."""

from .ops import *  # noqa: F403 (these are its public names)
from .ops import __all__ as __all__

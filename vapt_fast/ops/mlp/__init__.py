"""mlp: the MLP of a frozen block."""

from .op import mlp as mlp

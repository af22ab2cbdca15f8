"""add_norm: add a branch to the tokens and normalise the sum."""

from .op import add_norm as add_norm

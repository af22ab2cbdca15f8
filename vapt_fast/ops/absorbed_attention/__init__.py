"""absorbed_attention: the attention of a few queries that never makes the keys and values of the tokens."""

from .op import absorbed_attention as absorbed_attention

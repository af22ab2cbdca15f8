"""prompt_pool: normalise the tokens once, for the block and for the prompts, and pool them into prompts."""

from .op import prompt_pool as prompt_pool

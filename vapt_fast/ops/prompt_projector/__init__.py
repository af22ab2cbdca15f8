"""prompt_projector: from pooled prompts to what a block reads."""

from .op import prompt_projector as prompt_projector

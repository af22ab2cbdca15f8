"""The ops in ordinary PyTorch operations: the definition, and what runs on every device PyTorch has."""

from .attention import (
    absorbed_attention,
    prompt_attention,
    prompt_attention_cudnn,
    prompt_attention_flash,
    why_not_prompt_attention_cudnn,
    why_not_prompt_attention_flash,
)
from .mlp import mlp
from .norm import add_norm
from .pool import prompt_pool
from .projector import prompt_projector

__all__ = [
    "absorbed_attention",
    "add_norm",
    "mlp",
    "prompt_attention",
    "prompt_attention_cudnn",
    "prompt_attention_flash",
    "prompt_pool",
    "prompt_projector",
    "why_not_prompt_attention_cudnn",
    "why_not_prompt_attention_flash",
]

"""The ops in ordinary PyTorch operations: the definition, and what runs on every device PyTorch has."""

from .attention import cls_attention, prompt_attention
from .pool import prompt_pool
from .projector import prompt_projector

__all__ = ["cls_attention", "prompt_attention", "prompt_pool", "prompt_projector"]

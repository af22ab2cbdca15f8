"""Launchers of the Triton kernels in vapt_fast.kernels: they allocate and launch, nothing else."""

from .mlp import mlp, why_not_mlp
from .prompt_attention import prompt_attention, prompt_attention_packed, why_not_prompt_attention
from .prompt_pool import prompt_pool, why_not_prompt_pool

__all__ = [
    "mlp",
    "prompt_attention",
    "prompt_attention_packed",
    "prompt_pool",
    "why_not_mlp",
    "why_not_prompt_attention",
    "why_not_prompt_pool",
]

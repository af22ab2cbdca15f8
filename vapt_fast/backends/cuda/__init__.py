"""Launchers of the CUDA kernels in vapt_fast._C: they allocate and launch, nothing else."""

from .prompt_attention import prompt_attention, prompt_attention_packed, why_not_prompt_attention
from .prompt_pool import prompt_pool, why_not_prompt_pool

__all__ = [
    "prompt_attention",
    "prompt_attention_packed",
    "prompt_pool",
    "why_not_prompt_attention",
    "why_not_prompt_pool",
]

"""Launchers of the Triton kernels in vapt_fast.kernels: they allocate and launch, nothing else."""

from .absorbed_attention import absorbed_attention, why_not_absorbed_attention
from .add_norm import add_norm, why_not_add_norm
from .mlp import mlp, why_not_mlp
from .prompt_attention import prompt_attention, prompt_attention_packed, why_not_prompt_attention
from .prompt_pool import prompt_pool, why_not_prompt_pool
from .prompt_projector import prompt_projector, why_not_prompt_projector

__all__ = [
    "absorbed_attention",
    "add_norm",
    "mlp",
    "prompt_attention",
    "prompt_attention_packed",
    "prompt_pool",
    "prompt_projector",
    "why_not_absorbed_attention",
    "why_not_add_norm",
    "why_not_mlp",
    "why_not_prompt_attention",
    "why_not_prompt_pool",
    "why_not_prompt_projector",
]

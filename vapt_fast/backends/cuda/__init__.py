"""Launchers of the CUDA kernels in vapt_fast._C: they allocate and launch, nothing else."""

from .prompt_attention import prompt_attention, prompt_attention_packed, why_not_prompt_attention

__all__ = ["prompt_attention", "prompt_attention_packed", "why_not_prompt_attention"]

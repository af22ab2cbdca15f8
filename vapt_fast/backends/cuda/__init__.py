"""Launchers of the CUDA kernels in vapt_fast._C: they allocate and launch, nothing else."""

from .prompt_pool import prompt_pool, why_not_prompt_pool

__all__ = ["prompt_pool", "why_not_prompt_pool"]

"""Launchers of the Triton kernels in vapt_fast.kernels: they allocate and launch, nothing else."""

from .prompt_pool import prompt_pool

__all__ = ["prompt_pool"]

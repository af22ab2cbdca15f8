"""The stateless ops that VAPT is made of; ``base.py`` says how those with kernels, the folders, are made."""

from .absorbed_attention import absorbed_attention
from .add_norm import add_norm
from .mlp import mlp
from .prompt_attention import prompt_attention, prompt_attention_packed
from .prompt_matrices import prompt_matrices
from .prompt_pool import prompt_pool
from .prompt_projector import prompt_projector

__all__ = [
    "absorbed_attention",
    "add_norm",
    "mlp",
    "prompt_attention",
    "prompt_attention_packed",
    "prompt_matrices",
    "prompt_pool",
    "prompt_projector",
]

"""Explanations of a model with prompts: what they are made of, what attends to them, what it looks at.

All numbers are those of the literal method in eval mode, whatever backend the model runs on.
"""

from .attention import Attention, attention_weights, rollout
from .contributions import Contributions, pooled_contributions, prompt_maps
from .grad_cam import grad_cam, reshape_transform, target_layers
from .picture import explain_picture
from .scores import Score, deletion, energy, insertion, mask_iou, pointing_game, to_pixels
from .tracing import BlockInputs, prompt_values, trace

__all__ = [
    "Attention",
    "BlockInputs",
    "Contributions",
    "Score",
    "attention_weights",
    "deletion",
    "energy",
    "explain_picture",
    "grad_cam",
    "insertion",
    "mask_iou",
    "pointing_game",
    "pooled_contributions",
    "prompt_maps",
    "prompt_values",
    "reshape_transform",
    "rollout",
    "target_layers",
    "to_pixels",
    "trace",
]

"""The feature projector of adaptive prompts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..config import PromptConfig
from ..modules import is_plain, remember_forward
from .base import call, stored_shape
from .plain import PlainProjector

__all__ = ["Projector"]

OFFICIAL = "transformer.deep_prompt_embeddings_mlp"


class Projector(nn.Module):
    """The feature projector, a bottleneck C -> r -> C without biases: ``down``, ``up`` and a ``scale``.

    ``scale`` is a parameter of (1,) where ``projector_scale_learnable``, else the number 1.0.
    """

    def __init__(self, config: PromptConfig, dim: int) -> None:
        super().__init__()
        self.activation = config.projector_activation
        width = config.projector_dim
        assert width is not None
        self.down = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(width, dim, bias=False)
        self.scale = nn.Parameter(torch.empty(1)) if config.projector_scale_learnable else 1.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``down`` and ``up`` anew, and set a learnable scale to 1."""
        self.down.reset_parameters()
        self.up.reset_parameters()
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)

    def forward(self, prompts: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return prompts + scale * up(mask * activation(down(prompts))), (B, P, C), in the prompts' dtype."""
        with torch.autocast(prompts.device.type, enabled=False):
            features = ACTIVATIONS[self.activation](call(self.down, prompts))
            if mask is not None:
                features = features * mask
            return prompts + self.scale * call(self.up, features)

    def is_plain(self) -> bool:
        """Whether the weights of ``down`` and ``up`` may be read instead of calling them."""
        return all(is_plain(part, nn.Linear) and part.bias is None for part in (self.down, self.up))

    def plain(self) -> PlainProjector:
        """Return the weights as plain tensors."""
        return PlainProjector(self.down.weight, self.up.weight.t() * self.scale, self.activation)

    def official_names(self, number: int | None = None) -> dict[str, str]:
        """Return the public implementation's names of the tensors; ``number`` is that of its own block."""
        prefix = OFFICIAL if number is None else f"{OFFICIAL}.{number}"
        names = {"down.weight": f"{prefix}.block.0.weight", "up.weight": f"{prefix}.block.2.weight"}
        return names | ({"scale": f"{prefix}.scale"} if isinstance(self.scale, nn.Parameter) else {})

    @staticmethod
    def official_options(state: Mapping[str, Tensor]) -> dict[str, object]:
        """Return the options that the tensors of a state dict of the public implementation tell."""
        shared = f"{OFFICIAL}.block.0.weight" in state
        projector = OFFICIAL if shared else f"{OFFICIAL}.0"
        if f"{projector}.block.0.weight" not in state:
            return {"projector_dim": None}
        down = stored_shape(state, f"{projector}.block.0.weight", 2)
        return {
            **({"projector_dim": down[0]} if down else {}),
            "projector_shared": shared,
            "projector_scale_learnable": f"{projector}.scale" in state,
        }


remember_forward(Projector)

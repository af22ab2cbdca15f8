"""Learned tables of which a share is Fourier-transformed: VFPT (Zeng et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Masks, register_kind
from .deep import StaticPrompts
from .plain import PlainPrompts

__all__ = ["FourierPrompts"]

DIMS = {"all": (-2, -1), "sequence": (-2,), "channel": (-1,)}


@register_kind("fourier", method="vfpt", title="VFPT")
class FourierPrompts(StaticPrompts):
    """The real part of the discrete Fourier transform of a learned table (P, C), for each block.

    The first ``fourier_share`` of the P rows (rounded) are transformed among themselves, without
    normalisation, over the prompts, the channels or both (``fourier_dims``); the others stay as they are.
    """

    token_table = None  # its rows are no prompts

    def forward(self, patches: Tensor | None = None, masks: Masks | None = None, **shared: Any) -> Tensor:
        """Return the prompts (1, P, C), or (B, P, C) with dropout, which acts on the table."""
        table = super().forward(patches, masks)
        rows, others = table.tensor_split([round(self.config.fourier_share * self.num_prompts)], dim=1)
        if rows.shape[1] == 0:
            return table
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        transformed = torch.fft.fftn(rows, dim=DIMS[self.config.fourier_dims]).real
        return torch.cat([transformed.to(others.dtype), others], dim=1)

    def plain(self) -> PlainPrompts | None:
        """Return the transformed table; None with dropout, which acts before the transform."""
        return None if self.rate(self.config.prompt_dropout) else PlainPrompts(self.num_prompts, self()[0])

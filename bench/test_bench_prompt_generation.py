"""Prompt generation alone: tokens (B, T, C) to prompts (B, P, C), and the tokens as the block reads them.

The block's own LayerNorm is part of the job on both sides, because the rewrite shares its statistic with the
prompts' LayerNorm. The torch backend builds its matrix for one block here, in a model for all blocks at once.
"""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from agreement import largest_error
from torch import Tensor
from workload import SEED, Setting, make_trained_like

from vapt_fast import PromptConfig, reference
from vapt_fast.backbone import grid_size, patch_size
from vapt_fast.dropout import draw_masks
from vapt_fast.functional import prompt_matrices, prompt_pool, prompt_projector
from vapt_fast.prompts import Prompts

BLOCK_EPS = 1e-6


class Generation:
    """Parameters, dropout masks and tokens of one adaptive block, in float32 as in every model."""

    def __init__(self, setting: Setting, num_prompts: int) -> None:
        torch.set_num_threads(setting.threads)
        torch.manual_seed(SEED)
        model = timm.create_model(setting.model)
        self.grid, self.num_prefix, dim = grid_size(model), model.num_prefix_tokens, model.embed_dim
        self.config = PromptConfig(num_prompts=num_prompts, static_depth=0)
        self.prompts = Prompts(self.config, dim=dim, depth=1, grid=self.grid, patch_size=patch_size(model))
        make_trained_like(self.prompts)
        self.prompts.to(setting.device)
        (self.block,) = self.prompts.blocks
        dtype = torch.promote_types(setting.compute_dtype, torch.float32)
        (self.masks,) = draw_masks(self.prompts, setting.batch, dtype, torch.device(setting.device))
        num_tokens = self.num_prefix + self.grid[0] * self.grid[1]
        tokens = torch.randn(setting.batch, num_tokens, dim, device=setting.device)
        self.tokens = tokens.to(setting.compute_dtype).requires_grad_()
        self.synchronize = setting.synchronize
        # What comes back from the block, one gradient for each output.
        self.gradients = [torch.randn_like(output) for output in self._literal()]

    def _literal(self) -> tuple[Tensor, Tensor]:
        """Normalised tokens (B, T, C) and prompts (B, P, C), as the paper says it."""
        prompts = reference.adaptive_prompts(
            self.tokens[:, self.num_prefix :],
            self.block,
            self.prompts.projector,
            self.grid,
            self.masks,
            self.config,
        )
        return F.layer_norm(self.tokens, self.tokens.shape[-1:], eps=BLOCK_EPS), prompts

    def _rewritten(self) -> tuple[Tensor, Tensor]:
        """The same by the rewritten ops."""
        block, projector = self.block, self.prompts.projector
        matrices = prompt_matrices(block.token_projection.weight[None], block.kernel[:, 0], self.grid)
        normed, pooled = prompt_pool(
            self.tokens,
            matrices[0],
            block.norm.weight,
            block.norm.bias,
            num_prefix=self.num_prefix,
            eps=BLOCK_EPS,
            prompt_eps=block.norm.eps,
        )
        prompts = prompt_projector(
            pooled,
            block.token_projection.bias,
            projector.down.weight,
            projector.up.weight,
            channel_mask=self.masks.channels,
            feature_mask=self.masks.features,
        )
        return normed, prompts

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        return {"reference": self._literal, "torch": self._rewritten}[backend]()

    @torch.no_grad()
    def forward(self, backend: str) -> None:
        self.run(backend)
        self.synchronize()

    def forward_and_backward(self, backend: str) -> None:
        self.prompts.zero_grad(set_to_none=True)
        self.tokens.grad = None
        torch.autograd.backward(self.run(backend), self.gradients)
        self.synchronize()

    def outputs(self, backend: str) -> dict[str, Tensor]:
        """Outputs and all gradients, by name."""
        outputs = dict(zip(("normalised tokens", "prompts"), self.run(backend), strict=True))
        self.forward_and_backward(backend)
        leaves = dict(self.prompts.named_parameters()) | {"tokens": self.tokens}
        gradients = {f"gradient of {name}": leaf.grad.clone() for name, leaf in leaves.items()}
        return {name: output.detach() for name, output in outputs.items()} | gradients


@pytest.mark.parametrize("mode", ["forward", "forward_and_backward"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_prompt_generation(mode, backend, num_prompts, setting, measure, rounds, benchmark):
    generation = Generation(setting, num_prompts)
    benchmark.extra_info["largest_error"] = largest_error(
        generation.outputs("torch"), generation.outputs("reference"), setting.compute_dtype
    )
    group = f"prompt generation, {mode.replace('_', ' ')}, P = {num_prompts}"
    # One run takes milliseconds, not seconds.
    measure(partial(getattr(generation, mode), backend), group=group, rounds=10 * rounds)

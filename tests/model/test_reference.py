"""The reference path against the definition of the method, written once more in loops over numbers."""

import math

import pytest
import torch
from torch import nn

from vapt_fast import AdaptiveViT, PromptConfig, use_backend
from vapt_fast.prompts import AdaptivePrompts, Geometry, Masks, Prompts, StaticPrompts

ACTIVATIONS = {
    "relu": lambda v: [max(x, 0.0) for x in v],
    "gelu": lambda v: [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in v],
    "sigmoid": lambda v: [1 / (1 + math.exp(-x)) for x in v],
    "softmax": lambda v: [math.exp(x) / sum(map(math.exp, v)) for x in v],
    "identity": lambda v: v,
}


def by_hand(patches, block, projector, grid, config, channel_mask, feature_mask):
    """Prompts of one image, patches (N, C) as nested lists, computed number by number."""
    height, width = grid
    dim = patches.shape[1]
    gamma, beta = block.norm.weight.tolist(), block.norm.bias.tolist()
    z = []
    for row in patches.tolist():
        mean = sum(row) / dim
        var = sum((x - mean) ** 2 for x in row) / dim
        z.append(
            [g * (x - mean) / math.sqrt(var + 1e-5) + b for x, g, b in zip(row, gamma, beta, strict=True)]
        )

    def pixel(c, y, x):
        return z[y * width + x][c] if 0 <= y < height and 0 <= x < width else 0.0

    planes = []
    for c in range(dim):
        if block.kernel is None:
            plane = [pixel(c, y, x) for y in range(height) for x in range(width)]
        else:
            kernel = block.kernel[0 if config.conv_shared else c, 0].tolist()
            size, pad = len(kernel), config.conv_padding
            plane = [
                sum(
                    kernel[i][j] * pixel(c, y + i - pad, x + j - pad)
                    for i in range(size)
                    for j in range(size)
                )
                for y in range(height + 2 * pad - size + 1)
                for x in range(width + 2 * pad - size + 1)
            ]
        planes.append([v * channel_mask[c] for v in plane])

    weight, bias = block.token_projection.weight.tolist(), block.token_projection.bias.tolist()
    prompts = []
    for p in range(config.num_prompts):
        t = [sum(w * v for w, v in zip(weight[p], planes[c], strict=True)) + bias[p] for c in range(dim)]
        if projector is not None:
            down, up = projector.down.weight.tolist(), projector.up.weight.tolist()
            hidden = ACTIVATIONS[config.projector_activation](
                [sum(w * v for w, v in zip(row, t, strict=True)) for row in down]
            )
            hidden = [h * m for h, m in zip(hidden, feature_mask[p], strict=True)]
            scale = float(torch.as_tensor(projector.scale).detach())
            t = [v + scale * sum(w * h for w, h in zip(up[c], hidden, strict=True)) for c, v in enumerate(t)]
        prompts.append(t)
    return torch.tensor(prompts, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_kernel": None},
        {"conv_kernel": 3, "conv_padding": 1},
        {"conv_kernel": 3, "conv_shared": False},
        {"conv_kernel": 3, "conv_padding": 2, "conv_shared": False},
        {"projector_dim": None},
        {"projector_shared": False, "projector_scale_learnable": True},
        *[{"projector_activation": name} for name in ACTIVATIONS],
    ],
    ids=str,
)
def test_adaptive_prompts_are_the_definition(options):
    torch.manual_seed(0)
    grid, dim, batch = (3, 4), 6, 2
    config = PromptConfig(num_prompts=3, **{"projector_dim": 4, **options})
    prompts = Prompts(config, Geometry(dim, 2, grid, (4, 4))).double()
    for parameter in prompts.parameters():
        nn.init.normal_(parameter)
    block = prompts.blocks[1]
    projector = block.projector or prompts.shared.get("projector")
    patches = torch.randn(batch, 12, dim, dtype=torch.float64)
    channels = torch.randint(0, 2, (batch, 1, dim)).double() / 0.5
    features = torch.randint(0, 2, (batch, 3, 4)).double() / 0.5
    masks = Masks(channels=channels, features=features if projector is not None else None)
    result = prompts.compute(1, patches, masks)
    for image in range(batch):
        expected = by_hand(
            patches[image],
            block,
            projector,
            grid,
            config,
            channels[image, 0].tolist(),
            features[image].tolist(),
        )
        torch.testing.assert_close(result[image], expected, rtol=1e-12, atol=1e-12)


def test_initialisation():
    torch.manual_seed(0)
    config = PromptConfig(num_prompts=64, conv_shared=False, static_depth=2)
    prompts = Prompts(config, Geometry(512, 3, (7, 7), (16, 16)))
    bound = math.sqrt(6 / (3 * 16 * 16 + 512))
    for static in prompts.blocks[:2]:
        assert isinstance(static, StaticPrompts)
        assert bound * 0.99 < static.table.abs().max() < bound
        assert abs(static.table.mean()) < bound / 50
    adaptive = prompts.blocks[2]
    assert isinstance(adaptive, AdaptivePrompts)
    assert not adaptive.token_projection.weight.any()
    assert not adaptive.token_projection.bias.any()
    assert abs(adaptive.kernel.std() - 1) < 0.05
    assert abs(adaptive.kernel.mean()) < 0.05
    assert prompts.projector.down.weight.abs().max() <= 1 / math.sqrt(512)
    assert prompts.projector.scale == 1.0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_first_adaptive_prompts_are_zero_and_so_are_their_gradients(backend):
    torch.manual_seed(0)
    model = AdaptiveViT("test_vit", prompts=PromptConfig(), num_classes=3)
    with use_backend(backend):
        model(torch.randn(2, 3, *model._image_size)).square().sum().backward()
    first_table, *adaptive = model.prompts.blocks
    assert first_table.table.grad.any()
    for block in adaptive:
        assert not block.kernel.grad.any()
        assert block.token_projection.weight.grad.any()
        assert torch.isfinite(block.token_projection.weight.grad).all()
    assert not model.prompts.projector.up.weight.grad.any()


def test_prompts_are_thrown_away_after_each_block():
    """Another table for block 3 changes nothing before block 3, and everything from there on."""
    torch.manual_seed(0)
    model = AdaptiveViT("test_vit", prompts=PromptConfig(kind="deep", num_prompts=2)).eval()
    images = torch.randn(1, 3, *model._image_size)
    with use_backend("reference"), torch.no_grad():
        before = model.forward_intermediates(images, intermediates_only=True)
        nn.init.normal_(model.prompts.blocks[3].table)
        after = model.forward_intermediates(images, intermediates_only=True)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new) == (index < 3)

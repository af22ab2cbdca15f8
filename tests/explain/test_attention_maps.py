"""Attention weights against timm's own, and the rollout against its definition."""

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_same, tiny_images, tiny_model
from torch.overrides import TorchFunctionMode

from vapt_fast import PromptConfig, explain, use_backend

pytestmark = pytest.mark.full

VIT = "vit_tiny_patch16_224"

ARCHITECTURES = {
    "vit": (VIT, {}),
    "query and key norms": (VIT, {"qk_norm": True, "scale_attn_norm": True}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "attention pooling, no prefix": ("vit_base_patch16_siglip_224", {}),
    "rotary": ("eva02_tiny_patch14_224", {}),
    "rotary by block": ("vit_small_patch16_rope_mixed_224", {}),
    "grouped queries": ("vit_base_patch16_sapiens2", {}),
    "relative positions": ("beit_base_patch16_224", {}),
    "naflex": ("naflexvit_base_patch16_map", {}),
}


def weights_of_timm(model, images):
    """What timm's attentions multiply the values by, (B, h, T + P, T + P) of each block."""
    found, handles = [], []
    for block in model.backbone.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda m, a, out: found.append(out)))
    with use_backend("reference"):
        model(images)
    for handle in handles:
        handle.remove()
    for block in model.backbone.blocks:
        block.attn.fused_attn = True
    return found


@pytest.mark.parametrize("kind", ["adaptive", "shallow"])
@pytest.mark.parametrize(("name", "options"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_weights_are_those_of_timm(name, options, kind):
    prompts = PromptConfig(kind=kind, num_prompts=3, projector_dim=4)
    model = tiny_model(name, prompts=prompts, **options)
    images = tiny_images(model)
    found = explain.attention_weights(model, images)
    prefix = model.num_prefix_tokens
    for index, expected in enumerate(weights_of_timm(model, images)):
        tokens = [*range(prefix), *range(prefix + 3, expected.shape[-1])]
        assert_same(
            found[index]._asdict(),
            {
                "to_prompts": expected[:, :, tokens, prefix : prefix + 3],
                "to_tokens": expected[:, :, tokens][..., tokens],
            },
        )


class SharesOfTheLast(TorchFunctionMode):
    """What the last three keys get in each call of PyTorch's attention: their values are 1, others 0."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            ones = torch.zeros_like(v)
            ones[..., -3:, :] = 1
            self.found.append(function(q, k, ones, **kwargs).mean(-1))
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "name", [VIT, "vit_base_patch16_sapiens2", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
)
def test_learned_keys_take_their_share(name):
    model = tiny_model(name, prompts=PromptConfig(kind="kv", num_prompts=3))
    images = tiny_images(model)
    with use_backend("reference"), torch.no_grad(), SharesOfTheLast() as shares:
        model(images)
    found = explain.attention_weights(model, images)
    for index, attention in found.items():
        assert_same({"share": attention.to_prompts.sum(-1)}, {"share": shares.found[index]})


@pytest.mark.parametrize("kind", ["adaptive", "deep", "shallow", "kv"])
def test_rows_sum_to_one(kind):
    model = tiny_model(VIT, prompts=PromptConfig(kind=kind, num_prompts=4)).train()
    found = explain.attention_weights(model, tiny_images(model))
    assert sorted(found) == [0, 1, 2]
    for to_prompts, to_tokens in found.values():
        assert (to_prompts.shape, to_tokens.shape) == ((2, 2, 7, 4), (2, 2, 7, 7))
        assert to_prompts.min() > 0
        total = to_prompts.sum(-1) + to_tokens.sum(-1)
        assert_same({"sum": total}, {"sum": torch.ones_like(total)})


def test_chosen_blocks():
    model = tiny_model(VIT)
    images = tiny_images(model)
    everything = explain.attention_weights(model, images)
    chosen = explain.attention_weights(model, images, [-1, 0])
    assert sorted(chosen) == [0, 2]
    assert_same(chosen[2]._asdict(), everything[2]._asdict())
    with pytest.raises(ValueError, match="the model has 3 blocks, got 3"):
        explain.attention_weights(model, images, [3])


@pytest.mark.parametrize("name", ["vit_base_patch16_18x2_224", "vit_base_patch16_rpn_224"])
def test_blocks_that_cannot_be_taken_apart(name):
    model = tiny_model(name)
    with pytest.raises(NotImplementedError, match="the attention of block 0 can't be taken apart: it is a"):
        explain.attention_weights(model, tiny_images(model))


# ---- rollout


def rollout_by_definition(model, images, spread):
    """One image and one block at a time, in loops over rows and prompts."""
    attention, maps = explain.attention_weights(model, images), explain.prompt_maps(model, images)
    prefix, result = model.num_prefix_tokens, []
    for image in range(len(images)):
        product = None
        for index, (to_prompts, to_tokens) in attention.items():
            mixing = to_tokens[image].mean(0).clone()
            for prompt, share in enumerate(to_prompts[image].mean(0).unbind(1)):
                if spread and index in maps:
                    patches = maps[index][image, prompt].flatten()
                    mixing[:, prefix:] += torch.outer(share, patches / patches.sum())
            mixing = torch.stack(
                [
                    (row / row.sum() + unit) / 2
                    for row, unit in zip(mixing, torch.eye(len(mixing)), strict=True)
                ]
            )
            product = mixing if product is None else mixing @ product
        pooled = range(1 + hasattr(model.backbone, "dist_token"))
        rows = product[pooled] if model.global_pool == "token" else product[prefix:]
        result.append(rows.mean(0)[prefix:].reshape(model.grid))
    return torch.stack(result)


@pytest.mark.parametrize("prompts", ["spread", "drop"])
@pytest.mark.parametrize(
    "name",
    [VIT, "beit_base_patch16_224", "vit_base_patch16_siglip_224", "deit_tiny_distilled_patch16_224"],
)
def test_rollout_is_its_definition(name, prompts):
    model = tiny_model(name)
    model.backbone.norm.register_forward_hook(lambda *_: None)  # somebody looks at the features
    images = tiny_images(model)
    found = explain.rollout(model, images, prompts=prompts)
    assert_same({"map": found}, {"map": rollout_by_definition(model, images, prompts == "spread")})


def test_rollout_spreads_all_attention_to_adaptive_prompts():
    """Then shares of all tokens, prefix included, are the whole."""
    model = tiny_model("vit_base_patch16_siglip_224", prompts=PromptConfig(num_prompts=3, static_depth=0))
    images = tiny_images(model)
    shares = explain.rollout(model, images)
    assert_same({"sum": shares.sum((1, 2))}, {"sum": torch.ones(2, dtype=torch.float64)})
    assert (shares - explain.rollout(model, images, prompts="drop")).abs().max() > 1e-4


def test_rollout_takes_one_of_two_words():
    model = tiny_model(VIT)
    with pytest.raises(ValueError, match="prompts must be one of"):
        explain.rollout(model, tiny_images(model), prompts="keep")

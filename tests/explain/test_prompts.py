"""Prompts by block, and which patches shape them."""

import pytest
import torch
from tiny import assert_same, randomize, tiny_backbone, tiny_images, tiny_model
from torch import nn

from vapt_fast import AdaptiveViT, PromptConfig, explain
from vapt_fast.prompts import KeysValues

VIT = "vit_tiny_patch16_224"
CONVOLUTIONS = {
    "shared": {},
    "none": {"conv_kernel": None},
    "padding": {"conv_kernel": 3, "conv_padding": 2},
    "depthwise": {"conv_shared": False, "conv_kernel": 3, "conv_padding": 1},
    "own projector": {"projector_shared": False},
    "added table": {"add_table": True},
}


def model_of(kind="adaptive", name=VIT, **options):
    return tiny_model(name, prompts=PromptConfig(kind=kind, num_prompts=3, projector_dim=4, **options))


# ---- prompt values


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["adaptive", "deep", "shallow", "fourier", "kv"])
def test_prompt_values_are_what_the_blocks_get(kind, training):
    """Those of each block, computed by its module from the tokens that enter it; nothing is dropped."""
    model = model_of(kind).train(training)
    images = tiny_images(model)
    values = model.prompt_values(images)
    assert model.training == training
    assert len(values) == 3
    for index, (value, inputs) in enumerate(zip(values, explain.trace(model, images), strict=True)):
        expected = model.prompts.compute(index, inputs.tokens[:, -6:])
        if expected is None:
            assert value is None
        elif isinstance(expected, KeysValues):
            assert_same(value._asdict(), expected._asdict())
        else:
            assert value.shape == expected.shape
            assert_same({"value": value}, {"value": expected})
    assert (values[1] is None) == (kind == "shallow")
    per_image = [value for value in values if isinstance(value, torch.Tensor) and len(value) == 2]
    assert len(per_image) == (2 if kind == "adaptive" else 0)


def test_blocks_without_prompts_have_none():
    model = tiny_model(VIT, prompts=PromptConfig(num_prompts=(0, 2, 0)))
    values = model.prompt_values(tiny_images(model))
    assert [None if value is None else value.shape[1] for value in values] == [None, 2, None]


def test_prompts_are_those_of_the_active_adapter():
    model = model_of()
    model.add_adapter("second", num_classes=4, kind="deep", num_prompts=5)
    images = tiny_images(model)
    assert model.prompt_values(images)[1].shape == (2, 3, 32)
    model.set_adapter("second")
    assert_same(
        {"table": model.prompt_values(images)[1][0]}, {"table": model.prompts.blocks[1].table.detach()}
    )
    assert explain.prompt_maps(model, images) == {}
    with model.disable_adapter():
        assert model.prompt_values(images) == [None] * 3


def test_tokens_that_enter_the_blocks():
    model = model_of()
    images = tiny_images(model)
    after = model.forward_intermediates(
        images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )
    traced = explain.trace(model, images)
    for inputs, (patches, prefix) in zip(traced[1:], after[:-1], strict=True):
        assert inputs.positions.num_extra == 3
        tokens = torch.cat([inputs.tokens[:, :1], inputs.tokens[:, 4:]], dim=1)
        assert_same({"tokens": tokens}, {"tokens": torch.cat([prefix, patches], dim=1)})


def test_prompt_values_are_differentiable():
    model = model_of()
    values = model.prompt_values(tiny_images(model))
    values[2].square().sum().backward()
    for index in (0, 1, 2):
        assert all(p.grad.abs().max() > 0 for p in model.prompts.blocks[index].parameters())


def test_images_that_do_not_fit_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match="images must be"):
        model.prompt_values(tiny_images(model)[..., :-16])


# ---- which patches shape them


def pooled_literally(model, images, index):
    """The prompts before the projector, taken from the literal forward pass."""
    found = []
    projector = model.prompts.blocks[index].projector or model.prompts.projector
    handle = projector.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model.prompt_values(images)
    handle.remove()
    first = next(i for i, block in enumerate(model.prompts.blocks) if hasattr(block, "projector"))
    return found[0 if len(found) == 1 else index - first]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("block", [1, -1])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_contributions_sum_to_the_pooled_prompts(options, block, centred):
    model = model_of(**options)
    images = tiny_images(model)
    found = explain.pooled_contributions(model, images, block, centred=centred)
    assert found.patches.shape == (2, 3, 6, 32)
    assert_same({"pooled": found.pooled}, {"pooled": pooled_literally(model, images, block % 3)})


def test_a_contribution_is_what_the_patch_changes():
    """Replace the normalised patch by the average one: the prompt loses the centred contribution."""
    model = model_of(conv_kernel=3, conv_padding=1)
    images = tiny_images(model)
    found = explain.pooled_contributions(model, images, 2, centred=True)
    block = model.prompts.blocks[2]
    z = block.norm(explain.trace(model, images)[2].tokens[:, -6:])
    block.norm = nn.Identity()
    for patch in range(6):
        changed = z.clone()
        changed[:, patch] = z.mean(1)
        before, after = (block(tokens, projector=lambda prompts, mask: prompts) for tokens in (z, changed))
        assert_same({"change": before - after}, {"change": found.patches[:, :, patch]})


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_maps_are_the_norms_of_contributions(options, centred):
    model = model_of(**options)
    images = tiny_images(model)
    maps = explain.prompt_maps(model, images, centred=centred)
    assert sorted(maps) == [1, 2]
    for index, found in maps.items():
        assert found.shape == (2, 3, 2, 3)
        contributions = explain.pooled_contributions(model, images, index, centred=centred)
        assert_same({"map": found.flatten(2)}, {"map": contributions.patches.norm(dim=3)})


@pytest.mark.parametrize("conv", [{}, {"conv_kernel": None}, {"conv_kernel": 3, "conv_padding": 1}])
def test_maps_are_of_the_right_patches(conv):
    """A projection that looks at one place gives a map that is zero out of the convolution's reach."""
    backbone = tiny_backbone(VIT, img_size=128)
    model = AdaptiveViT(backbone, num_prompts=2, **conv).double().eval()
    with torch.no_grad():
        for block in model.prompts.blocks[1:]:
            block.token_projection.weight[:, 10] = 1.0
    maps = explain.prompt_maps(model, tiny_images(model))
    reach = 1 if model.config.conv_kernel is None else model.config.conv_kernel**2
    for found in maps.values():
        assert ((found > 0).flatten(2).sum(2) == reach).all()


def test_maps_of_a_model_in_16_bits():
    """The sums over positions are in float32, whatever the weights are in."""
    model = model_of()
    images = tiny_images(model)
    expected = explain.prompt_maps(model, images)[1].float()
    found = explain.prompt_maps(model.bfloat16(), images.bfloat16())[1]
    torch.testing.assert_close(found, expected, atol=0.05 * expected.max().item(), rtol=0)
    parts = explain.pooled_contributions(model, images.bfloat16(), 1)
    assert parts.patches.dtype == torch.float32


def test_other_prompts_have_no_maps():
    model = model_of("deep")
    images = tiny_images(model)
    assert explain.prompt_maps(model, images) == {}
    with pytest.raises(ValueError, match=r"those are \[\]"):
        explain.pooled_contributions(model, images, 1)


@pytest.mark.parametrize("block", [0, 3, -4])
def test_a_block_that_has_no_adaptive_prompts(block):
    model = model_of()
    with pytest.raises(ValueError, match="block must be"):
        explain.pooled_contributions(model, tiny_images(model), block)


def test_weights_that_are_not_all_of_the_function_are_refused():
    model = model_of()
    handle = model.prompts.blocks[1].token_projection.register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(NotImplementedError, match=r"prompts\.blocks\[1\] has hooks"):
        explain.prompt_maps(model, tiny_images(model))
    handle.remove()
    randomize(model.prompts, 5)
    assert explain.prompt_maps(model, tiny_images(model))

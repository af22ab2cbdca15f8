"""Grad-CAM against an own derivation and against pytorch-grad-cam."""

import numpy as np
import pytest
import torch
from tiny import assert_same, tiny_backbone, tiny_images, tiny_model

from vapt_fast import AdaptiveViT, PromptConfig, explain, use_backend

pytestmark = pytest.mark.full

VIT = "vit_tiny_patch16_224"
NAMES = [VIT, "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224"]


def wide_model(name=VIT, kind="adaptive", **options):
    """Of 20 patches, so that maps have something to show."""
    size = {"img_size": (64, 80)} if "patch16" in name else {"img_size": (56, 70)}
    model = tiny_model(name, prompts=PromptConfig(kind=kind, num_prompts=3), **size, **options)
    return model, tiny_images(model, batch=3)


@pytest.mark.parametrize("kind", ["adaptive", "deep", "shallow", "fourier"])
@pytest.mark.parametrize("block", [-1, 1])
@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_pytorch_grad_cam(name, block, kind):
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = wide_model(name, kind)
    model, images = model.float(), images.float()
    with grad_cam.GradCAM(
        model,
        explain.target_layers(model, block),
        reshape_transform=explain.reshape_transform(model),
    ) as cam:
        for targets in ([0, 1, 2], None):
            chosen = None if targets is None else [ClassifierOutputTarget(target) for target in targets]
            expected = cam(images, targets=chosen)
            found = explain.to_pixels(explain.grad_cam(model, images, targets, block=block), images.shape[2:])
            assert expected.max() > 0.9  # not all of it is zero
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_maps_follow_the_formula(name, backend):
    """By finite differences: the gradient of the logit along a shift of one channel of all patches."""
    model, images = wide_model(name)
    layer = model.backbone.blocks[1].norm1
    shifted, kept = {}, []

    def shift(module, args, output):
        kept.append(output.detach())
        output = output.clone()
        for channel, amount in shifted.items():
            output[:, -20:, channel] += amount
        return output

    handle = layer.register_forward_hook(shift)
    gradients = []
    with torch.no_grad(), use_backend("reference"):
        model(images)
        for channel in range(32):
            ends = []
            for amount in (1e-4, -1e-4):
                shifted = {channel: amount}
                ends.append(model(images)[:, 2])
            gradients.append((ends[0] - ends[1]) / 2e-4 / 20)  # mean over the patches
    handle.remove()
    maps = torch.einsum("bnc,cb->bn", kept[0][:, -20:], torch.stack(gradients)).relu()
    maps = (maps - maps.amin(1, True)) / (1e-7 + (maps - maps.amin(1, True)).amax(1, True))
    with use_backend(backend):
        found = explain.grad_cam(model, images, 2, block=1)
    assert_same({"maps": found.flatten(1)}, {"maps": maps}, tolerance=1e-6)


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_of_which_nothing_learns(inference):
    """Neither prompts nor a parameter that requires a gradient; the caller wants no gradients either."""
    model = AdaptiveViT(tiny_backbone(VIT, img_size=64), num_prompts=0).double()
    images = tiny_images(model)
    expected = explain.grad_cam(model, images, 1)
    assert expected.amax() > 0.9
    model.requires_grad_(False)
    with torch.inference_mode(inference), torch.no_grad():
        assert_same({"maps": explain.grad_cam(model, images, 1)}, {"maps": expected})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_left_as_it_was(checkpointing):
    model, images = wide_model()
    expected = explain.grad_cam(model, images, 1)
    model.train()
    model.set_grad_checkpointing(checkpointing)
    found = explain.grad_cam(model, images, 1)
    assert_same({"maps": found}, {"maps": expected})
    assert not found.requires_grad
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model():
    model, images = wide_model()
    expected = explain.grad_cam(model, images, 1)
    model.compile(backend="eager", fullgraph=True)
    model(images)
    assert_same({"maps": explain.grad_cam(model, images, 1)}, {"maps": expected})


def test_targets():
    model, images = wide_model()
    by_class = [explain.grad_cam(model, images, number) for number in range(3)]
    predicted = model(images).argmax(1)
    expected = torch.stack([by_class[number][row] for row, number in enumerate(predicted.tolist())])
    for targets in (None, predicted, predicted.tolist()):
        assert_same({"maps": explain.grad_cam(model, images, targets)}, {"maps": expected})


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (3, ValueError, "classes below 3, got 3"),
        (-1, ValueError, "at least 0"),
        ([0, 1], ValueError, "one an image, 3, got 2"),
        ("cat", ValueError, "targets"),
        (1.5, TypeError, "targets must be an int"),
    ],
)
def test_targets_that_are_none(targets, error, message):
    model, images = wide_model()
    with pytest.raises((error, TypeError), match=message):
        explain.grad_cam(model, images, targets)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_do_not_exist():
    model, images = wide_model()
    with pytest.raises(ValueError, match="block must be in"):
        explain.grad_cam(model, images, block=3)
    with pytest.raises(ValueError, match="must be one with a norm1"):
        explain.target_layers(tiny_model("vit_base_patch16_18x2_224"))


def test_learned_keys_and_values_are_refused():
    model = tiny_model(VIT, prompts=PromptConfig(kind="kv", num_prompts=3))
    with pytest.raises(NotImplementedError, match="learned keys and values"):
        explain.grad_cam(model, tiny_images(model))

"""A small real experiment: every backend learns alike, and nothing but the adapter ever changes."""

import pytest
import torch
import torch.nn.functional as F
from timm.data import create_transform

from vapt_fast import AdaptiveViT, PromptConfig, adapters, use_backend
from vapt_fast.demo import digit_images

STEPS = 50


@pytest.fixture(scope="module")
def digits():
    images, labels = digit_images(range(5, 10))
    transform = create_transform((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    return torch.stack([transform(image) for image in images[:10]]), torch.tensor(labels[:10]) - 5


def train(backend, digits, steps, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = AdaptiveViT(
        "vit_digits_patch4_32", pretrained=True, prompts=PromptConfig(**options), num_classes=5
    ).to(dtype)
    optimizer = torch.optim.SGD(model.param_groups(weight_decay=1e-4), lr=0.1, momentum=0.9)
    images, labels = digits
    losses = []
    with use_backend(backend):
        for _ in range(steps):
            loss = F.cross_entropy(model(images.to(dtype)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, torch.tensor(losses)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"kind": "deep", "prompt_dropout": 0.1}, marks=pytest.mark.full)],
    ids=["adaptive", "deep"],
)
def test_loss_curves_agree(digits, options):
    """All dropouts on, the same seed: the backends draw the same masks, so the curves coincide."""
    _, expected = train("reference", digits, STEPS, torch.float64, **options)
    _, actual = train("torch", digits, STEPS, torch.float64, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    assert expected[-1] < 0.5 * expected[0]
    _, single = train("torch", digits, STEPS, torch.float32, **options)
    torch.testing.assert_close(single, expected.float(), rtol=1e-2, atol=1e-2)


def test_the_backbone_is_the_same_after_100_steps(digits):
    torch.manual_seed(0)
    fresh = AdaptiveViT("vit_digits_patch4_32", pretrained=True, num_classes=5)
    model, _ = train("torch", digits, 100)
    assert adapters.backbone_fingerprint(model) == adapters.backbone_fingerprint(fresh)
    before = fresh.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name

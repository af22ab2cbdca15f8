"""The patch embedding as a product: what timm's module gives, or a call of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vapt_fast.backbones.patches import embed_patches

Change = Callable[[PatchEmbed], Any]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 48), {}),
        ((32, 48), {"img_size": (32, 48)}),
        ((32, 48), {"bias": False, "norm_layer": nn.LayerNorm}),
        ((32, 48), {"flatten": False, "output_fmt": "NHWC"}),
        ((32, 64), {"img_size": (32, 48), "strict_img_size": False}),
        ((32, 48), {"img_size": (32, 48), "dynamic_img_pad": True, "strict_img_size": False}),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gives_the_numbers_of_the_module(
    size: tuple[int, int],
    options: dict[str, Any],
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    patches = PatchEmbed(**{"img_size": None, "patch_size": (8, 16), "embed_dim": 20, **options}).double()
    images = torch.randn(3, 3, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    expected = patches(images)
    wanted = torch.autograd.grad(expected.cos().sum(), [images, *patches.parameters()])
    with monkeypatch.context() as context:
        context.setattr(PatchEmbed, "__call__", None)  # so a call raises
        actual = embed_patches(patches, images)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(actual.cos().sum(), [images, *patches.parameters()])
    torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=1e-12)


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Change] = {
    "an overlapping convolution": lambda p: setattr(p, "proj", nn.Conv2d(3, 8, 16, stride=8, padding=4)),
    "groups": lambda p: setattr(p, "proj", nn.Conv2d(3, 9, 16, stride=16, groups=3)),
    "a dilated convolution": lambda p: setattr(p, "proj", nn.Conv2d(3, 8, 8, stride=8, dilation=2)),
    "another stride": lambda p: setattr(p.proj, "stride", (8, 8)),
    "another class": lambda p: setattr(p, "proj", Doubling(3, 8, 16, stride=16)),
    "a hook on the convolution": lambda p: p.proj.register_forward_hook(lambda m, args, out: out * 2),
    "a hook": lambda p: p.register_forward_hook(lambda m, args, out: out * 2),
    "another layout": lambda p: setattr(p, "flatten", False),
    "padding": lambda p: (setattr(p, "img_size", None), setattr(p, "dynamic_img_pad", True)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_calls_what_is_more_than_a_product(change: str) -> None:
    torch.manual_seed(0)
    patches = PatchEmbed(img_size=(32, 48), patch_size=16, embed_dim=8)
    CHANGES[change](patches)
    images = torch.randn(2, 3, 32, 41 if change == "padding" else 48)
    assert torch.equal(embed_patches(patches, images), patches(images))


def test_a_wrong_size_is_refused_as_by_the_module() -> None:
    patches = PatchEmbed(img_size=(32, 48), patch_size=16, embed_dim=8)
    with pytest.raises(AssertionError, match="doesn't match model"):
        embed_patches(patches, torch.zeros(1, 3, 32, 64))

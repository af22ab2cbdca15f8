"""Suggestions for a mistyped backbone are near it, exist and are supported."""

import pytest
import timm

import vapt_fast  # noqa: F401, gives timm the vapt_* names
from vapt_fast.names import similar_names


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
        ("vit_tiny_patch16_244", "vit_tiny_patch16_224"),
        ("deit3_base_patch16_24", "deit3_base_patch16_224"),
        ("vapt_vit_bse_patch16_224", "vit_base_patch16_224"),
        ("vit_digit", "vit_digits_patch4_32"),
        ("vit_base_patch16_224.augreg_in21", "vit_base_patch16_224.augreg_in21k"),
        ("vit_bse_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
    ],
)
def test_what_was_meant_comes_first(given, meant):
    assert similar_names(given)[0] == meant


@pytest.mark.parametrize(
    "given", ["swin_base_patch4_window7_224", "resnet5", "hiera_base_24", "vit_bs.x", ""]
)
def test_only_supported_models_are_suggested(given):
    for name in similar_names(given, count=20):
        architecture = name.partition(".")[0]
        assert timm.is_model(f"vapt_{architecture}") or architecture == "vit_digits_patch4_32"


def test_at_most_as_many_as_asked_for():
    assert len(similar_names("vit_base_patch16_22", count=3)) == 3

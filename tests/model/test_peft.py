"""LoRA by PEFT in the backbone and in the prompts: the literal method's numbers and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft_import import peft
from tiny import assert_alike, assert_same, randomize, run, tiny_images, tiny_model
from torch import nn

from vapt_fast import AdaptiveViT, PromptConfig

if peft is None:
    pytest.skip("needs peft", allow_module_level=True)

VIT = "vit_base_patch16_224"
PROMPTS = PromptConfig(num_prompts=3, projector_dim=4, projector_dropout=0.3, channel_dropout=0.3)
TARGETS = {
    "qkv": ["qkv"],
    "proj": ["attn.proj"],
    "fc1": ["fc1"],
    "fc2 of the last block": r"blocks\.2\.mlp\.fc2",
    "all": "all-linear",
}
PROMPT_TARGETS = {
    "token_projection": ["token_projection"],
    "down": ["down"],
    "up": ["up"],
    "all": ["token_projection", "down", "up"],
}


def lora(targets: list[str] | str, dropout: float = 0.0, **options: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=dropout, **options)


def learned(module: nn.Module) -> None:
    """LoRA layers that have learned something: half of their weights start at zero."""
    for i, part in enumerate(module.modules()):
        for name in ("lora_A", "lora_B"):
            if hasattr(part, name):
                randomize(getattr(part, name), i)


@pytest.fixture
def model() -> AdaptiveViT:
    return tiny_model(VIT, prompts=PROMPTS, init_values=0.5).train()


def check(model: AdaptiveViT) -> None:
    """The same numbers and gradients in training and in eval mode."""
    images = tiny_images(model)
    for mode in (True, False):
        model.train(mode)
        assert_alike(run(model, images), run(model, images, "reference"))


def assert_has_effect(model: AdaptiveViT, before: dict) -> None:
    after = run(model.eval(), tiny_images(model))
    assert (after["logits"] - before["logits"]).abs().max() > 1e-6
    model.train()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("targets", TARGETS)
def test_in_the_backbone(model: AdaptiveViT, targets: str, dropout: float) -> None:
    images = tiny_images(model)
    before = run(model.eval(), images)
    adapted = peft.get_peft_model(model.backbone, lora(TARGETS[targets], dropout))
    learned(model.backbone)
    assert_has_effect(model, before)
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    check(model)
    with adapted.disable_adapter():
        assert_same({"logits": run(model.eval(), images)["logits"]}, {"logits": before["logits"]})
    unmerged = run(model.eval(), images)["logits"]
    adapted.merge_adapter()
    assert_same({"logits": run(model, images)["logits"]}, {"logits": unmerged})
    check(model)
    adapted.unmerge_adapter()
    assert adapted.merge_and_unload() is model.backbone
    assert_same({"logits": run(model, images)["logits"]}, {"logits": unmerged})
    check(model)


def test_dropout_of_lora_is_on_in_training(model: AdaptiveViT) -> None:
    peft.inject_adapter_in_model(lora(["qkv"], 0.4), model.backbone)
    learned(model.backbone)
    model.train()
    model.prompts.eval()
    images = tiny_images(model)
    logits = [run(model, images, seed=seed)["logits"] for seed in (0, 1)]
    assert (logits[0] - logits[1]).abs().max() > 1e-6
    model.eval()
    logits = [run(model, images, seed=seed)["logits"] for seed in (0, 1)]
    assert_same({"": logits[0]}, {"": logits[1]}, 0.0)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "lora_bias": True}], ids=str)
def test_other_kinds(model: AdaptiveViT, options: dict) -> None:
    peft.inject_adapter_in_model(lora(["qkv", "fc1"], **options), model.backbone)
    learned(model.backbone)
    check(model)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "OFTConfig"])
def test_other_methods(model: AdaptiveViT, kind: str) -> None:
    options = {"IA3Config": {"feedforward_modules": ["fc1"]}, "OFTConfig": {"oft_block_size": 4}}
    config = getattr(peft, kind)(target_modules=["qkv", "fc1"], **options.get(kind, {}))
    peft.inject_adapter_in_model(config, model.backbone)
    for i, parameter in enumerate(model.backbone.parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.data = parameter.data.double()
    check(model)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("targets", PROMPT_TARGETS)
def test_in_the_prompts(targets: str, shared: bool, dropout: float) -> None:
    prompts = PromptConfig(num_prompts=3, projector_dim=4, projector_shared=shared)
    model = tiny_model(VIT, prompts=prompts).train()
    images = tiny_images(model)
    before = run(model.eval(), images)
    peft.inject_adapter_in_model(lora(PROMPT_TARGETS[targets], dropout), model.prompts)
    learned(model.prompts)
    assert_has_effect(model, before)
    check(model)


def test_of_the_whole_model(model: AdaptiveViT) -> None:
    """PEFT's wrapper around the AdaptiveViT, which trains prompts and head too, as copies."""
    images = tiny_images(model)
    config = lora(["qkv"], modules_to_save=["prompts", "head"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    inner = adapted.get_base_model()
    learned(inner)
    check(inner)
    inner.train()
    output = run(inner, images)
    trained = {name for name, tensor in output.items() if name != "logits"}
    assert any("lora_A" in name for name in trained)
    assert any("prompts.modules_to_save" in name for name in trained)
    assert any("head.modules_to_save" in name for name in trained)
    torch.manual_seed(0)
    assert_same({"": adapted(images)}, {"": output["logits"]}, 0.0)


def test_step(model: AdaptiveViT) -> None:
    """Training moves LoRA layers, prompts and head, and the next call sees it."""
    peft.inject_adapter_in_model(lora(["qkv", "fc1"]), model.backbone)
    model.train()
    images = tiny_images(model)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    for _ in range(2):
        before = run(model, images)["logits"]
        optimizer.step()
        after = run(model, images)
        assert (after["logits"] - before).abs().max() > 1e-6
        assert_same(after, run(model, images, "reference"))


def test_an_adapters_folder_is_none_of_pefts(tmp_path: Path) -> None:
    """PEFT reads files of the same name; it says what they are instead of loading them."""
    tiny_model(VIT).save_adapter(tmp_path)
    with pytest.raises(KeyError, match="VAPT"):
        peft.PeftConfig.from_pretrained(str(tmp_path))
    with pytest.raises(KeyError, match="VAPT"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), str(tmp_path))

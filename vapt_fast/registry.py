"""timm's names with a prefix: ``timm.create_model("vapt_vit_base_patch16_224", num_prompts=50)``.

Importing vapt_fast registers ``vapt_<name>`` for every timm architecture of a supported family. The tags are
those of the backbone's pre-trained weights, so ``timm.list_pretrained("vapt_*")`` lists what can be adapted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    load_pretrained,
    register_model,
    split_model_name_tag,
)
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet

from .backbones import timm_modules
from .config import PromptConfig
from .data import DATA_KEYS
from .model import AdaptiveViT
from .source import PREFIX

# timm's sources of whole models
PUBLISHED = ("hf-hub", "local-dir")

# timm's habit: an entrypoint is an attribute of its module and listed in __all__ (register_model appends it),
# and its pre-trained configs are in default_cfgs.
__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}


def _entrypoint(name: str) -> Callable[..., AdaptiveViT | FeatureGetterNet]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        prompts: PromptConfig | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = 3,
        **options: Any,
    ) -> AdaptiveViT | FeatureGetterNet:
        if features_only:
            model = create(pretrained, pretrained_cfg, prompts, **options)
            return _features_of(cast(AdaptiveViT, model), out_indices)
        options = {key: value for key, value in options.items() if value is not None}
        if isinstance(pretrained_cfg, PretrainedCfg):
            pretrained_cfg = asdict(pretrained_cfg)
        if isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") in PUBLISHED:
            return _published(name, pretrained_cfg, pretrained, prompts, options)
        tagged = name
        if isinstance(pretrained_cfg, str) and pretrained_cfg:
            tagged = f"{name}.{pretrained_cfg}"
        elif pretrained_cfg:
            options["pretrained_cfg"] = _backbone_cfg(pretrained_cfg)
        return AdaptiveViT(tagged, prompts=prompts, pretrained=pretrained, **options)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = (
        f"{name} with prompts, as an AdaptiveViT. Takes the options of PromptConfig (or ``prompts=``, a "
        "PromptConfig), ``backend=`` and whatever timm takes for the backbone. conv_kernel=0 means no "
        "convolution and projector_dim=0 no projector. With ``features_only=True`` it gives the patch tokens "
        "(B, C, H, W) after the blocks ``out_indices``, or after that many of the last, and has no head."
    )
    return create


def _features_of(model: AdaptiveViT, out_indices: int | Sequence[int]) -> FeatureGetterNet:
    """Return the model as timm's ``features_only`` has it: without head and what follows the last index."""
    indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
    features: Any = FeatureGetterNet(model, out_indices=indices)
    features.pretrained_cfg = features.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return features


def _published(
    name: str,
    cfg: dict[str, Any],
    pretrained: bool,
    prompts: PromptConfig | None,
    options: dict[str, Any],
) -> AdaptiveViT:
    """A whole AdaptiveViT as timm's save_for_hf or push_to_hf_hub wrote it.

    Args:
        name: timm's name of the backbone's architecture.
        cfg: timm's description of what was published.
        pretrained: load the tensors, of the backbone too.
        prompts, options: as for AdaptiveViT; ``options`` has also what timm adds.
    """
    saved = options.pop("pretrained_model_args", {})
    size = options.get("img_size")
    if saved.get("img_size") is not None:
        options["img_size"] = saved["img_size"]
    tagged = f"{name}.{cfg.get('tag')}"
    tagged = tagged if tagged in get_arch_pretrained_cfgs(name) else name
    known = timm.get_pretrained_cfg(tagged)
    own = {} if known is None else known.to_dict()
    own |= {key: cfg[key] for key in (*DATA_KEYS, "fixed_input_size") if cfg.get(key) is not None}
    model = AdaptiveViT(tagged, prompts=prompts, pretrained_cfg=own, **options)
    if pretrained:
        load_pretrained(
            model,
            cfg,
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            cache_dir=options.get("cache_dir"),
        )
    if size is not None:
        model.set_input_size(size)
    return model


def _backbone_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """A pre-trained config that timm looked up under our name, as the backbone's own."""
    return {**cfg, "architecture": (cfg.get("architecture") or "").removeprefix(PREFIX) or None}


def register(name: str) -> None:
    """Make ``"vapt_" + name`` a name of timm's; all architectures of timm's own that are supported have one.

    Args:
        name: of an architecture that timm knows, without a tag: one of your own, after timm's register_model.

    Raises:
        ValueError: timm doesn't know it, or it has the prefix already.
    """
    if name.startswith(PREFIX):
        raise ValueError(f"name must be that of a backbone, without {PREFIX!r}, got {name!r}")
    if not timm.is_model(name):
        raise ValueError(f"timm knows no architecture {name!r}: pass it to timm's register_model first")
    cfgs = get_arch_pretrained_cfgs(name)  # by name and tag, the default first
    if cfgs:
        by_tag = {split_model_name_tag(tagged)[1]: cfg for tagged, cfg in cfgs.items()}
        has_weights = any(cfg.has_weights for cfg in by_tag.values())
        default_cfgs[PREFIX + name] = DefaultCfg(deque(by_tag), by_tag, has_weights)
    globals()[PREFIX + name] = register_model(_entrypoint(name))


for _name in timm.list_models(module=timm_modules()):
    register(_name)

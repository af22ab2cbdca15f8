"""timm's names with a prefix: ``timm.create_model("vapt_vit_base_patch16_224", num_prompts=50)``.

Importing vapt_fast registers ``vapt_<name>`` for every timm architecture of a supported family. The tags are
those of the backbone's pre-trained weights, so ``timm.list_pretrained("vapt_*")`` lists what can be adapted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    register_model,
    split_model_name_tag,
)

from .config import PromptConfig
from .names import TIMM_MODULES
from .vit import AdaptiveViT

PREFIX = "vapt_"

# timm's habit: an entrypoint is an attribute of its module and listed in __all__ (register_model appends it),
# and its pre-trained configs are in default_cfgs.
__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}


def _entrypoint(name: str) -> Callable[..., AdaptiveViT]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        prompts: PromptConfig | None = None,
        **options: Any,
    ) -> AdaptiveViT:
        names = {field.name for field in fields(PromptConfig)} & options.keys()
        chosen = {key: options.pop(key) for key in names}
        # timm.create_model drops keywords that are None, so 0 says it for the two options where None matters.
        chosen |= {key: None for key in ("conv_kernel", "projector_dim") if chosen.get(key) == 0}
        options = {key: value for key, value in options.items() if value is not None}
        tagged = name
        if isinstance(pretrained_cfg, str) and pretrained_cfg:
            tagged = f"{name}.{pretrained_cfg}"
        elif pretrained_cfg:
            options["pretrained_cfg"] = _backbone_cfg(pretrained_cfg)
        config = replace(PromptConfig() if prompts is None else prompts, **chosen)
        return AdaptiveViT(tagged, prompts=config, pretrained=pretrained, **options)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = (
        f"{name} with prompts, as an AdaptiveViT. Takes the options of PromptConfig (or ``prompts=``, a "
        "PromptConfig), ``backend=`` and whatever timm takes for the backbone. conv_kernel=0 means no "
        "convolution and projector_dim=0 no projector."
    )
    return create


def _backbone_cfg(cfg: PretrainedCfg | dict[str, Any]) -> dict[str, Any]:
    """A pre-trained config that timm looked up under our name, as the backbone's own."""
    cfg = asdict(cfg) if isinstance(cfg, PretrainedCfg) else dict(cfg)
    return {**cfg, "architecture": (cfg.get("architecture") or "").removeprefix(PREFIX) or None}


def _register(name: str) -> None:
    cfgs = get_arch_pretrained_cfgs(name)  # by name and tag, the default first
    if cfgs:
        by_tag = {split_model_name_tag(tagged)[1]: cfg for tagged, cfg in cfgs.items()}
        has_weights = any(cfg.has_weights for cfg in by_tag.values())
        default_cfgs[PREFIX + name] = DefaultCfg(deque(by_tag), by_tag, has_weights)
    globals()[PREFIX + name] = register_model(_entrypoint(name))


for _name in timm.list_models(module=TIMM_MODULES):
    _register(_name)

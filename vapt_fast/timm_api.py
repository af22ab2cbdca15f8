"""What AdaptiveViT has of timm's models: attributes, intermediate tokens, groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .adapters import Adapter
from .arguments import choice
from .backbones import TimmViT, grid_size, normed_tokens, pool
from .config import PromptConfig
from .source import PREFIX, rebuild_args

__all__ = ["TimmModel"]


class TimmModel(nn.Module):
    """The part of AdaptiveViT that has what timm's models have, most of it passed on from the backbone.

    AdaptiveViT adds the attributes and methods that are declared here without a value.
    """

    backbone: TimmViT
    adapters: nn.ModuleDict
    active_adapter: str
    grad_checkpointing: bool
    _image_size: tuple[int, int]
    _run: Callable[..., Any]
    check_images: Callable[[Tensor], None]

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, T, C) to pooled features (B, C), as the backbone pools."""
        return pool(self.backbone, x, pool_type)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Tokens after chosen blocks, without prompts, in timm's forms.

        Args:
            x: images (B, in_chans, height, width).
            indices: the last n blocks if an int, all if None, else these blocks.
            return_prefix_tokens: pairs of (patch tokens, prefix tokens) instead of patch tokens, where the
                backbone has prefix tokens.
            norm: apply the backbone's final norm to each.
            stop_early: don't run the blocks after the last chosen one.
            output_fmt: "NCHW" for (B, C, H, W), "NLC" for (B, N, C).
            intermediates_only: leave out the final tokens.
            output_dict: a dict with the keys ``image_intermediates``, ``image_features`` (the final tokens)
                and, with ``return_prefix_tokens``, ``image_intermediates_prefix``.

        Returns:
            The list of intermediates, or (final tokens after the norm (B, T, C), that list); or the dict.
        """
        choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.backbone.blocks), indices)
        taps: dict[int, Any] = dict.fromkeys(take)
        self.check_images(x)

        def finish(backbone: TimmViT, tokens: Tensor, extra: int) -> Any:
            num_prefix = backbone.num_prefix_tokens
            prefixes, intermediates = [], []
            for index in take:
                tapped = backbone.norm(taps[index]) if norm else taps[index]
                prefix, patches = tapped.tensor_split([num_prefix], dim=1)
                if output_fmt == "NCHW":
                    patches = torch.unflatten(patches.transpose(1, 2), 2, self.grid).contiguous()
                prefixes.append(prefix)
                intermediates.append(patches)
            with_prefixes = return_prefix_tokens and num_prefix > 0
            final = None if intermediates_only else normed_tokens(backbone, tokens, extra)
            if output_dict:
                outputs = {"image_intermediates": intermediates}
                outputs |= {"image_intermediates_prefix": prefixes} if with_prefixes else {}
                return outputs if intermediates_only else outputs | {"image_features": final}
            if with_prefixes:
                intermediates = list(zip(intermediates, prefixes, strict=True))
            return intermediates if intermediates_only else (final, intermediates)

        return self._run(x, finish, taps=taps, num_blocks=last + 1 if stop_early else None)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """DINO's form of ``forward_intermediates``: the last n blocks, or these blocks."""
        return self.forward_intermediates(
            x,
            n if isinstance(n, int) else list(n),
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    @property
    def _adapter(self) -> Adapter:
        raise NotImplementedError

    @property
    def config(self) -> PromptConfig:
        """The options of the prompts of the active adapter."""
        return self._adapter.prompts.config

    @property
    def num_classes(self) -> int:
        """The number of classes of the active adapter's head; 0 without a head."""
        return self._adapter.num_classes

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W), patches along each side of the image."""
        return grid_size(self.backbone, self._image_size)

    @property
    def backbone_args(self) -> dict[str, Any]:
        """Keywords for ``timm.create_model`` that make this backbone again, head and input size included."""
        return rebuild_args(
            self.backbone,
            num_classes=self.num_classes,
            in_chans=self.backbone.in_chans,
            global_pool=self.global_pool,
            img_size=list(self._image_size),
        )

    @property
    def global_pool(self) -> str:
        """How the tokens become one vector for the head, in timm's words."""
        return self.backbone.global_pool

    @property
    def num_features(self) -> int:
        """The number of channels of ``forward_features``."""
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        """The number of channels that the head is given."""
        return self.backbone.head_hidden_size

    @property
    def embed_dim(self) -> int:
        """The number of channels of a token, C."""
        return self.backbone.embed_dim

    @property
    def in_chans(self) -> int:
        """The number of channels of an image."""
        return self.backbone.in_chans

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens before the patches: CLS, registers."""
        return self.backbone.num_prefix_tokens

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's description of each block's output, with the names of this model's modules."""
        return [{**info, "module": f"backbone.{info['module']}"} for info in self.backbone.feature_info]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the backbone's weights: mean, std, input size, interpolation, ..."""
        cfg = dict(getattr(self.backbone, "pretrained_cfg", None) or {})
        cfg["input_size"] = (self.backbone.in_chans, *self._image_size)
        if cfg.get("architecture"):
            cfg["architecture"] = PREFIX + cfg["architecture"]
        prefixes = {"first_conv": "backbone.", "classifier": f"adapters.{self.active_adapter}."}
        for key, prefix in prefixes.items():
            names = cfg.get(key)
            if isinstance(names, str):
                cfg[key] = prefix + names
            elif names:
                cfg[key] = tuple(prefix + name for name in names)
        return cfg

    default_cfg = pretrained_cfg

    # What timm's save_for_hf and push_to_hf_hub keep to make a model again. timm.create_model also sets it,
    # to what it was called with, but the model knows better.
    @property
    def _model_args(self) -> dict[str, Any]:
        return {**self.backbone_args, **self.config.as_keywords()}

    @_model_args.setter
    def _model_args(self, value: dict[str, Any]) -> None:
        pass

    @property
    def _traits(self) -> dict[str, Any]:
        traits = {**getattr(self.backbone, "_traits", {}), "img_size": self._image_size}
        return traits | {"first_conv": self.pretrained_cfg.get("first_conv")}

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers don't decay. All of them are frozen here."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters by depth, for layer-wise rates; prompts go with their block."""

        def within_backbone(patterns: Any) -> Any:
            if isinstance(patterns, str):
                return rf"^backbone\.(?:{patterns.replace('^', '')})"
            return [(within_backbone(pattern), group) for pattern, group in patterns]

        groups = {name: within_backbone(it) for name, it in self.backbone.group_matcher(coarse).items()}
        prompts = r"^adapters\.[^.]+\.prompts\."
        groups["blocks"] += [(rf"{prompts}blocks\.(\d+)", None), (rf"{prompts}(?!blocks\.)", (99999,))]
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, or keep them."""
        self.grad_checkpointing = enable

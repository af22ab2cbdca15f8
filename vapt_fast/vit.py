"""AdaptiveViT: a frozen timm Vision Transformer with learned prompts, in timm's own habits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import timm
import torch
from timm.layers import global_pool_nlc
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from . import adapters, reference, schedule
from .arguments import integer, plain
from .backbone import (
    check_image_size,
    check_supported,
    grid_size,
    head_names,
    image_size,
    num_pooled_rows,
    patch_size,
    remove_prompts,
    set_image_size,
    similar_names,
)
from .backends import _dispatch
from .config import PromptConfig, explain_unexpected, split_options
from .data import eval_transform, full_data_config
from .dropout import draw_masks
from .frozen import PreparedWeights
from .prompts import AdaptivePrompts, Prompts
from .resize import resize_token_projection
from .source import PREFIX, backbone_source, check_state_names, rebuild_args

__all__ = ["AdaptiveViT"]

AVERAGING = ("avg", "avgmax", "max")


class AdaptiveViT(nn.Module):
    """A frozen timm Vision Transformer whose blocks are given prompts: VAPT, VPT-deep or VPT-shallow.

    Only the prompts and the head learn. The backbone stays in eval mode, also during training: its dropout,
    drop path and the like are off (the head's own dropout is not). On a low-precision backbone the prompts
    stay in float32 unless the model is converted as a whole.

    Args:
        backbone: the name of a timm model, as ``"vit_base_patch16_224.augreg_in21k"``, or a timm model, which
            is used as it is and whose parameters are frozen.
        prompts: the options of the prompts. None to give them as keywords (``num_prompts=50``); VAPT's
            defaults for all others.
        backend: "auto", "reference", "torch", "triton", "cuda" or "kernels"; see vapt_fast.use_backend. None
            leaves the choice to the environment variable VAPT_FAST_BACKEND, then "auto".
        pretrained: load the backbone's pre-trained weights; only with a name.
        options: those of PromptConfig; with a name, anything ``timm.create_model`` takes (``num_classes``,
            ``img_size``, ``in_chans``, ``global_pool``, ``drop_rate``, ...); with a timm model, only
            ``num_classes`` and ``global_pool``.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: options that contradict each other or the backbone.
        NotImplementedError: a backbone of a family that is not supported.
        vapt_fast.BackendUnavailable: ``backend`` can't run here.

    Attributes:
        prompts: the learnable parameters, a Prompts module (``prompts.*`` in the state dict).
        backbone: the timm model with its head (``backbone.*`` in the state dict).
        config: the PromptConfig.
        backend: what was asked for.
        backbone_name: timm's name of the backbone with its tag; None if it has none.
        backbone_source: where it comes from; see vapt_fast.source.backbone_source.
        adapter_metadata: what the user stored with the adapter that was loaded last.
        class_names: a name for each class, as stored with the adapter that was loaded last; None if unknown.
        data_config: how images are prepared, where not as the backbone's ``pretrained_cfg`` says.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        prompts: PromptConfig | None = None,
        backend: str | None = None,
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        config, options = split_options(prompts, options)
        if backend is not None:
            _dispatch.check_backend(backend)
        by_name, timm_options = isinstance(backbone, str), plain(options)
        model = _make_backbone(backbone, pretrained, timm_options)
        _check_pooling(config, model.global_pool, getattr(model, "attn_pool", None) is not None)

        self.config = config
        self.backend = backend
        self.backbone_source = backbone_source(model, timm_options, pretrained if by_name else None)
        self.backbone_name = self.backbone_source["name"]
        self.adapter_metadata: dict[str, Any] = {}
        self.class_names: tuple[str, ...] | None = None
        self.data_config: dict[str, Any] = {}
        self.grad_checkpointing = False
        self._image_size = image_size(model)
        self._prepared = PreparedWeights()
        # The head comes last of all parameters, inside the backbone: timm's gradient clipping counts on it.
        self.prompts = Prompts(
            config,
            dim=model.embed_dim,
            depth=len(model.blocks),
            grid=grid_size(model, self._image_size),
            patch_size=patch_size(model),
        ).to(next(model.parameters()).device)
        self.backbone = model
        self._freeze()
        self.train()

    # ---- what is learned

    def _freeze(self) -> None:
        self.backbone.requires_grad_(False)
        for name in head_names(self.backbone):
            getattr(self.backbone, name).requires_grad_(True)

    def train(self, mode: bool = True) -> AdaptiveViT:
        """Training mode for prompts and head; the frozen backbone stays in eval mode. Returns self."""
        super().train(mode)
        self.backbone.eval()
        for name in ("head_drop", *head_names(self.backbone)):
            getattr(self.backbone, name).train(mode)
        return self

    def named_adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What an adapter holds, prompts and head, by its names in the state dict."""
        prefixes = ("prompts.", *(f"backbone.{name}." for name in head_names(self.backbone)))
        return ((name, p) for name, p in self.named_parameters() if name.startswith(prefixes))

    def adapter_state(self) -> dict[str, Tensor]:
        """What an adapter holds, parameters and buffers, by the names in its file: prompts.*, head.*."""
        prefixes = ("prompts.", *(f"backbone.{name}." for name in head_names(self.backbone)))
        state = self.state_dict(keep_vars=True)
        return {
            name.removeprefix("backbone."): value
            for name, value in state.items()
            if name.startswith(prefixes)
        }

    def transform(self) -> Any:
        """From a PIL image to the tensor (in_chans, H, W) that the model takes; see vapt_fast.data."""
        return eval_transform(full_data_config(self.pretrained_cfg, self.data_config))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to give to an optimizer."""
        return (p for p in self.parameters() if p.requires_grad)

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimizer, as in the papers: everything decays but the head's bias.

        timm's own grouping exempts all 1-d parameters instead.
        """
        exempt = {f"backbone.{name}.bias" for name in head_names(self.backbone)}
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if name not in exempt], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
        ]

    def trainable_summary(self) -> str:
        """One line: how many parameters learn, of how many."""
        return adapters.trainable_summary(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters learn, of how many."""
        print(self.trainable_summary())

    # ---- forward

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to logits (B, num_classes).

        Differentiable in everything that requires a gradient. The dtype of the result is that of the same
        timm model without prompts, also under autocast.

        Raises:
            TypeError, ValueError: images of a wrong type, dtype, number of channels, size or device.
        """
        tokens, extra = self._forward_tokens(images, num_rows=num_pooled_rows(self.backbone))
        if extra and not self.config.pool_prompts:
            tokens = self._strip(tokens, extra)
        return self.forward_head(self.backbone.norm(tokens))

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the final norm, without prompts: (B, T, C)."""
        tokens, extra = self._forward_tokens(images)
        return self.backbone.norm(self._strip(tokens, extra))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, C) to logits (B, num_classes), or to pooled features where ``pre_logits``."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, T, C) to pooled features (B, C), as the backbone pools."""
        for name in ("pool", "_pool"):
            if hasattr(self.backbone, name):
                return getattr(self.backbone, name)(x, pool_type)
        kind = self.global_pool if pool_type is None else pool_type
        return global_pool_nlc(x, kind, num_prefix_tokens=self.num_prefix_tokens)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
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

        Returns:
            The list of intermediates, or (final tokens after the norm (B, T, C), that list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.backbone.blocks), indices)
        taps: dict[int, Any] = dict.fromkeys(take)
        tokens, extra = self._forward_tokens(x, taps=taps, num_blocks=last + 1 if stop_early else None)
        num_prefix = self.backbone.num_prefix_tokens
        outputs = []
        for index in take:
            tapped = self.backbone.norm(taps[index]) if norm else taps[index]
            prefix, patches = tapped.tensor_split([num_prefix], dim=1)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, self.grid).contiguous()
            outputs.append((patches, prefix) if return_prefix_tokens and num_prefix else patches)
        if intermediates_only:
            return outputs
        return self.backbone.norm(self._strip(tokens, extra)), outputs

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
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def _forward_tokens(
        self,
        images: Tensor,
        *,
        num_rows: int | None = None,
        num_blocks: int | None = None,
        taps: dict[int, Any] | None = None,
    ) -> tuple[Tensor, int]:
        self._check_images(images)
        weight = next(self.parameters())
        masks = draw_masks(
            self.prompts, images.shape[0], torch.promote_types(weight.dtype, torch.float32), images.device
        )
        options = {
            "num_blocks": num_blocks,
            "taps": taps,
            "checkpointing": self.grad_checkpointing and torch.is_grad_enabled(),
        }
        backend = _dispatch.resolve(self.backend)
        if backend == "reference":
            return reference.forward_tokens(self.backbone, self.prompts, images, masks, **options)
        return schedule.forward_tokens(
            self.backbone,
            self.prompts,
            images,
            masks,
            self._prepared,
            backend=backend,
            num_rows=num_rows,
            **options,
        )

    def _strip(self, tokens: Tensor, extra: int) -> Tensor:
        return remove_prompts(tokens, self.backbone.num_prefix_tokens, extra)

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        channels = self.backbone.in_chans
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must be (B, in_chans={channels}, height, width), got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images must be of a floating dtype, got {images.dtype}; normalise them as the backbone's "
                "pretrained_cfg says"
            )
        parameter = next(self.backbone.parameters())
        device = parameter.device
        if images.dtype != parameter.dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(
                f"images must be of the backbone's dtype {parameter.dtype}, got {images.dtype}; convert "
                "them, or run under torch.autocast"
            )
        if images.device != device:
            raise ValueError(f"images must be on the model's device {device}, got {images.device}")
        check_image_size(self.backbone, tuple(images.shape[-2:]), self._image_size)

    # ---- geometry and head

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

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Take images of another size from now on.

        The backbone's position embeddings and the prompts' projections over the positions are resampled.
        Projections that change their size are new parameters: make the optimizer after this call.

        Args:
            img_size: (height, width) in pixels; None leaves it.
            patch_size: (height, width) in pixels; None leaves it.

        Raises:
            ValueError: a size the backbone or the prompts' convolution can't take; nothing is changed.
        """
        old_grid = self.grid
        new_size = set_image_size(self.backbone, self._image_size, img_size, patch_size, self._check_grid)
        self._image_size = new_size
        if self.grid != old_grid:
            for block in self.prompts.blocks:
                if isinstance(block, AdaptivePrompts):
                    block.token_projection = resize_token_projection(
                        block.token_projection, self.config, old_grid, self.grid
                    )

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if self.config.kind == "adaptive":
            self.config.conv_output(grid)

    def get_classifier(self) -> Any:
        """The head: a module, or two for a distilled backbone."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none), and another pooling if given.

        Raises:
            TypeError, ValueError: not a number of classes, or a pooling that the backbone can't do.
        """
        _reset_classifier(self.backbone, self.config, num_classes, global_pool)
        self.class_names = None
        self._freeze()
        self.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, with their prompts; returns the indices kept."""
        take = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        self.prompts.blocks = self.prompts.blocks[: len(self.backbone.blocks)]
        self._prepared.clear()
        return take

    # ---- timm's habits

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def global_pool(self) -> str:
        return self.backbone.global_pool

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.backbone.head_hidden_size

    @property
    def embed_dim(self) -> int:
        return self.backbone.embed_dim

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.num_prefix_tokens

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [{**info, "module": f"backbone.{info['module']}"} for info in self.backbone.feature_info]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the backbone's weights: mean, std, input size, interpolation, ..."""
        cfg = dict(getattr(self.backbone, "pretrained_cfg", None) or {})
        cfg["input_size"] = (self.backbone.in_chans, *self._image_size)
        if cfg.get("architecture"):
            cfg["architecture"] = PREFIX + cfg["architecture"]
        for key in ("first_conv", "classifier"):
            names = cfg.get(key)
            if isinstance(names, str):
                cfg[key] = f"backbone.{names}"
            elif names:
                cfg[key] = tuple(f"backbone.{name}" for name in names)
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
        groups["blocks"] += [(r"^prompts\.blocks\.(\d+)", None), (r"^prompts\.projector", (99999,))]
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, or keep them."""
        self.grad_checkpointing = enable

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptiveViT:
        self._prepared.clear()
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of every module; the weights of a timm model are refused with advice."""
        check_state_names(state_dict, self.backbone)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared.clear()
        super()._load_from_state_dict(*args, **kwargs)

    # ---- adapters

    def save_adapter(
        self,
        folder: str | PathLike,
        *,
        metadata: dict[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        include_backbone: bool = False,
    ) -> None:
        """Write prompts and head to ``folder``; see vapt_fast.adapters.save."""
        adapters.save(
            self,
            folder,
            metadata=metadata,
            class_names=class_names,
            data_config=data_config,
            include_backbone=include_backbone,
        )

    def load_adapter(self, folder: str | PathLike, *, check_backbone: bool = True) -> None:
        """Read prompts and head from ``folder``; see vapt_fast.adapters.load."""
        adapters.load(self, folder, check_backbone=check_backbone)

    @classmethod
    def from_adapter(
        cls,
        folder: str | PathLike,
        *,
        backbone: nn.Module | str | None = None,
        weights: str | PathLike | None = None,
        check_backbone: bool = True,
        backend: str | None = None,
    ) -> AdaptiveViT:
        """The model of the adapter in ``folder``, in eval mode; see vapt_fast.adapters.build."""
        return adapters.build(
            cls,
            folder,
            backbone=backbone,
            weights=weights,
            check_backbone=check_backbone,
            backend=backend,
        )


def _make_backbone(backbone: str | nn.Module, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if isinstance(backbone, AdaptiveViT):
        raise TypeError("backbone must be a timm model without prompts, got an AdaptiveViT")
    if isinstance(backbone, str):
        if backbone.startswith("vapt_"):
            raise ValueError(
                f"backbone must be the name of a timm model without prompts, got {backbone!r}; "
                f"use {backbone.removeprefix('vapt_')!r} here, or timm.create_model({backbone!r})"
            )
        if options.get("features_only"):
            raise ValueError("features_only=True has no prompts; use AdaptiveViT.forward_intermediates()")
        if not timm.is_model(backbone.partition(".")[0]) and ":" not in backbone:
            raise ValueError(
                f"backbone {backbone!r} is no timm model; similar names: {similar_names(backbone)}"
            )
        try:
            model = timm.create_model(backbone, pretrained=pretrained, **options)
        except TypeError as error:
            explained = explain_unexpected(error, options, backbone)
            if explained is None:
                raise
            raise explained from error
        if isinstance(model, AdaptiveViT):
            raise ValueError(
                f"backbone {backbone!r} is a model with prompts already; make it by "
                f"timm.create_model({backbone!r}, {pretrained=})"
            )
        check_supported(model)
        return model
    check_supported(backbone)
    backbone.num_classes = integer("backbone.num_classes", backbone.num_classes)
    if pretrained:
        raise ValueError("pretrained=True needs the name of a backbone; a timm model keeps its own weights")
    unknown = sorted(set(options) - {"num_classes", "global_pool"})
    if unknown:
        raise TypeError(
            f"options {unknown} need the name of a backbone; the timm model is used as it is, and takes "
            "num_classes, global_pool and the options of PromptConfig only"
        )
    if options:
        num_classes = options.get("num_classes", backbone.num_classes)
        _reset_classifier(backbone, None, num_classes, options.get("global_pool"))
    return backbone


def _reset_classifier(
    model: nn.Module, config: PromptConfig | None, num_classes: int, global_pool: str | None
) -> None:
    num_classes = integer("num_classes", num_classes, minimum=0)
    if global_pool is not None and config is not None:
        _check_pooling(config, global_pool, global_pool == "map")
    before = model.num_classes
    try:
        model.reset_classifier(num_classes, global_pool)
    except AssertionError as error:
        name = type(model).__name__
        model.num_classes = before  # which timm has changed by then
        raise ValueError(f"global_pool={global_pool!r} does not suit {name}: {error}") from error


def _check_pooling(config: PromptConfig, global_pool: str, attention_pool: bool) -> None:
    if config.pool_prompts and (global_pool not in AVERAGING or attention_pool):
        raise ValueError(
            f"pool_prompts=True needs a backbone with global_pool in {AVERAGING}, got {global_pool!r}"
        )

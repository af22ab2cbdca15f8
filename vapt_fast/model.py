"""AdaptiveViT: a frozen timm Vision Transformer with learned prompts, in timm's own habits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters, explain, initialisation
from .adapters import mixing
from .arguments import plain
from .backbones import (
    TimmViT,
    check_image_size,
    head_inputs,
    image_size,
    normed_tokens,
    num_pooled_rows,
    remove_prompts,
    set_image_size,
    take_heads,
)
from .backbones.precision import precision_of, set_precision
from .config import PromptConfig, split_options
from .creation import make_backbone, reset_head
from .cuda_graphs import Graphs, check_choice
from .data import eval_transform, full_data_config
from .forward import fused, reference
from .modules import call_within, weights_of
from .ops.backend import BACKENDS, check_backend, resolve
from .peft_api import DEFAULT_ADAPTER, AdapterModel, check_pooling
from .source import backbone_source, check_state_names

__all__ = ["DEFAULT_ADAPTER", "AdaptiveViT"]


class AdaptiveViT(AdapterModel):
    """A frozen timm Vision Transformer whose blocks are given prompts: VAPT, VPT-deep or VPT-shallow.

    Only the prompts and the head learn. The backbone stays in eval mode, also during training: its dropout,
    drop path and the like are off (the head's own dropout is not). On a low-precision backbone the prompts
    stay in float32 unless the model is converted as a whole.

    A timm model that is given stays as it is: this model has modules, parameters and a head of its own, and
    shares but the memory of the frozen weights. So several models over one backbone cost its memory once and
    are independent, as long as nobody changes the frozen weights in place.

    In the state dict, ``backbone.*`` are timm's names of everything but the head. What is learned is under
    ``adapters.NAME.prompts.*`` and ``adapters.NAME.head.*`` (and ``head_dist.*``, of a distilled backbone);
    the NAME of the first adapter is "default".

    Args:
        backbone: the name of a timm model, as ``"vit_base_patch16_224.augreg_in21k"``, or a timm model.
        prompts: the options of the prompts. None to give them as keywords (``num_prompts=50``); VAPT's
            defaults for all others.
        backend: "auto", "reference", "torch", "triton" or "cuda"; see vapt_fast.use_backend. None
            leaves the choice to the environment variable VAPT_FAST_BACKEND, then "auto".
        cuda_graphs: whether calls on a GPU that come again and again are captured as CUDA graphs, with their
            backward pass; see vapt_fast.use_cuda_graphs. None leaves the choice to the environment variable
            VAPT_FAST_CUDA_GRAPHS, then does it wherever it is safe.
        backbone_precision: "fp8" computes the products of the Linears in standard blocks in 8 bits,
            "fp8-gradients" those of the backward pass too; see the attribute. None: in the weights' dtype.
        pretrained: load the backbone's pre-trained weights; only with a name.
        options: those of PromptConfig; with a name, anything ``timm.create_model`` takes (``num_classes``,
            ``img_size``, ``in_chans``, ``global_pool``, ``drop_rate``, ...); with a timm model, only
            ``num_classes`` and ``global_pool``.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: options that contradict each other or the backbone.
        NotImplementedError: a backbone of a family that is not supported.
        vapt_fast.BackendUnavailableError: ``backend`` can't run here.

    Attributes:
        backbone: the timm model, without head.
        adapters: what is learned, by name; the first one is "default".
        active_adapter: the name of the one that is used where no other is named.
        prompts, head: those of the active adapter; both may be replaced.
        config: its PromptConfig.
        backend, cuda_graphs: what was asked for.
        backbone_name: timm's name of the backbone with its tag; None if it has none.
        backbone_source: where it comes from; see vapt_fast.source.backbone_source.
        adapter_metadata: what the user stored with the active adapter.
        class_names: a name for each of its classes, as stored with it; None if unknown.
        data_config: how images are prepared for it, where not as the backbone's ``pretrained_cfg`` says.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        prompts: PromptConfig | None = None,
        backend: str | None = None,
        cuda_graphs: bool | None = None,
        backbone_precision: str | None = None,
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        config, options = split_options(prompts, options)
        if backend is not None:
            check_backend(backend)
        timm_options = plain(options)
        model, came_with = make_backbone(backbone, pretrained, timm_options)
        set_precision(model.blocks, backbone_precision)
        check_pooling(config, model.global_pool, getattr(model, "attn_pool", None) is not None)

        self.backend = backend
        self.cuda_graphs = check_choice(cuda_graphs)
        self._cuda_graphs = Graphs()
        known = pretrained if isinstance(backbone, str) else None
        self.backbone_source = backbone_source(model, timm_options, known)
        self.backbone_name = self.backbone_source["name"]
        self.grad_checkpointing = False
        self._image_size = image_size(model)
        self.backbone = model
        self._init_adapters(config, came_with)
        self.train()

    @property
    def backbone_precision(self) -> str | None:
        """The precision of the products with frozen weights: None (theirs), "fp8" or "fp8-gradients".

        It may be assigned. "fp8" is e4m3, for the Linears of standard blocks whose sizes are multiples of
        16: weights with a scale for each output, quantised anew in each call; activations with one for each
        token; sums in float32; results rounded to bfloat16. Their gradients are computed with the weights as
        they are, with "fp8-gradients" in e4m3 too. All else is as it was: prompts, pooling, attention, norms,
        head, state dict; and the keys and values that the last block never makes. It needs a GPU of compute
        capability 8.9, elsewhere a call raises NotImplementedError; a CPU mimics it, slowly.
        ``vapt_fast.info.forward_report`` says which Linears it is used for.
        """
        return precision_of(self.backbone.blocks)

    @backbone_precision.setter
    def backbone_precision(self, precision: str | None) -> None:
        set_precision(self.backbone.blocks, precision)

    # ---- what is learned

    def train(self, mode: bool = True) -> AdaptiveViT:
        """Training mode for what is learned; the frozen backbone stays in eval mode. Returns self.

        Modules of other libraries in the backbone that learn, such as LoRA layers, train too.
        """
        super().train(mode)
        self.backbone.eval()
        self.backbone.head_drop.train(mode)
        for module in self.backbone.modules():
            foreign = type(module).__module__.partition(".")[0] not in ("timm", "torch", "vapt_fast")
            if foreign and any(parameter.requires_grad for parameter in module.parameters()):
                module.train(mode)
        return self

    def transform(self) -> Any:
        """The function that turns a PIL image into the tensor (in_chans, H, W) that the model takes.

        As in ``vapt-fast predict``, EXIF's orientation, transparency and 16 bits count; see vapt_fast.pixels.
        """
        return eval_transform(full_data_config(self.pretrained_cfg, self.data_config))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to give to an optimizer."""
        return (p for p in self.parameters() if p.requires_grad)

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimizer, as in the papers: everything decays but the head's bias (all, of several).

        timm's own grouping exempts all 1-d parameters instead.
        """
        learned: Any = self.adapters.values()
        named = [of for adapter in learned for head in adapter.heads() for of in head.named_parameters()]
        exempt = {id(parameter) for name, parameter in named if name.rpartition(".")[2] == "bias"}
        trainable = list(self.trainable_parameters())
        return [
            {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": weight_decay},
            {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
        ]

    trainable_summary = adapters.trainable_summary

    def print_trainable_parameters(self) -> None:
        """Print how many parameters learn, of how many."""
        print(self.trainable_summary())

    # ---- forward

    def forward(self, images: Tensor, adapter_names: Sequence[str] | Tensor | None = None) -> Tensor:
        """Images (B, in_chans, height, width) to logits (B, num_classes).

        Differentiable in everything that requires a gradient. The dtype of the result is that of the same
        timm model without prompts, also under autocast.

        Args:
            images: the images.
            adapter_names: the adapter of each image: B names, ``"__base__"`` for the bare backbone; or
                integers (B,) on the images' device, the places of the adapters in ``model.adapters``, -1 for
                the bare backbone; one out of range fails an assertion of the GPU. None for the active
                adapter. A batch for several adapters is computed as one; see vapt_fast.adapters.mixing. Its
                logits have as many columns as the largest head (in use; with integers, of all), and -inf in
                those that an image's own head does not have; see ``class_counts``.

        Raises:
            TypeError, ValueError: images of a wrong type, dtype, number of channels, size or device;
                adapters that are unknown, or not one an image.
        """
        backend = resolve(self.backend)
        self.check_images(images)
        if adapter_names is not None and not self._num_disabled:
            return mixing.logits(self, images, adapter_names, backend)
        # Graphs don't know the bare backbone's classifier, which is none of the model's modules.
        if torch.compiler.is_compiling() or self._num_disabled:
            return self._logits(images, backend)
        return self._cuda_graphs(_LOGITS[backend], self, images, preferred=self.cuda_graphs)

    def _logits(self, images: Tensor, backend: str) -> Tensor:
        """The logits by the active adapter for all images."""
        return self._adapter(self._head_inputs(images, backend, self._adapter.prompts))

    def _head_inputs(self, images: Tensor, backend: str, prompts: Any, **options: Any) -> tuple[Tensor, ...]:
        """What each head reads, (B, C)."""
        pool_prompts = prompts.config.pool_prompts

        def finish(backbone: TimmViT, tokens: Tensor, extra: int) -> tuple[Tensor, ...]:
            if not pool_prompts:
                tokens = remove_prompts(tokens, backbone.num_prefix_tokens, extra)
            return head_inputs(backbone, backbone.norm(tokens))

        num_rows = num_pooled_rows(self.backbone)
        return self._run(images, finish, backend, prompts=prompts, num_rows=num_rows, **options)

    def forward_features(self, images: Tensor, adapter_names: Sequence[str] | Tensor | None = None) -> Tensor:
        """All tokens after the final norm, without prompts, (B, T, C); the arguments as in ``forward``."""
        self.check_images(images)
        if adapter_names is not None and not self._num_disabled:
            return mixing.features(self, images, adapter_names, resolve(self.backend))
        return self._run(images, normed_tokens)

    def class_counts(self, adapter_names: Sequence[str]) -> list[int]:
        """The number of classes of each of these adapters: how many logits of a mixed batch are an image's.

        Raises:
            ValueError: an unknown adapter, or one whose head does not tell a number of classes.
        """
        return [self.find_adapter(name).num_classes for name in adapter_names]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, C) to logits (B, num_classes), or to pooled features where ``pre_logits``."""
        if pre_logits:
            return self.backbone.forward_head(x, pre_logits=True)
        return self._adapter(head_inputs(self.backbone, x))

    init_from_data = initialisation.init_from_data

    def _run(
        self,
        images: Tensor,
        finish: Callable[[TimmViT, Tensor, int], Any],
        backend: str | None = None,
        *,
        prompts: Any = None,
        masks: list[Any] | None = None,
        num_rows: int | None = None,
        **options: Any,
    ) -> Any:
        """``finish`` of the backbone, the tokens after the last block and the number of prompts among them.

        ``prompts`` are those of the active adapter if None; without ``masks`` they are drawn. All of it runs
        within calls of the prompts and of the backbone, so that hooks on them that gather or move parameters
        surround every use.
        """
        options["checkpointing"] = self.grad_checkpointing and torch.is_grad_enabled()
        backend = backend or resolve(self.backend)
        forward_tokens: Callable[..., tuple[Tensor, int]]
        if backend == "reference":
            forward_tokens = partial(reference.forward_tokens, **options)
        else:
            forward_tokens = partial(fused.forward_tokens, backend=backend, num_rows=num_rows, **options)

        def within_prompts(prompts: Any, images: Tensor) -> Any:
            dtype = torch.promote_types(images.dtype, torch.float32)
            drawn = masks
            if drawn is None:
                drawn = prompts.draw_masks(images.shape[0], dtype=dtype, device=images.device)

            def within_backbone(backbone: TimmViT, images: Tensor) -> Any:
                return finish(backbone, *forward_tokens(backbone, prompts, images, drawn))

            return call_within(self.backbone, within_backbone, images)

        prompts = self.prompts if prompts is None else prompts
        return prompts(images, within_prompts)

    prompt_values = explain.prompt_values

    def check_images(self, images: Tensor) -> None:
        """Raise TypeError or ValueError for images that ``forward`` can't take."""
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
        (weight,) = weights_of(self.backbone, most=1)
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"images must be of the backbone's dtype {weight.dtype}, got {images.dtype}; convert "
                "them, or run under torch.autocast"
            )
        if images.device != weight.device and not weight.is_meta:  # weights that wait elsewhere are meta
            raise ValueError(f"images must be on the model's device {weight.device}, got {images.device}")
        check_image_size(self.backbone, (images.shape[-2], images.shape[-1]), self._image_size)

    # ---- geometry and head

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
        learned: Any = self.adapters.values()

        def check_grid(grid: tuple[int, int]) -> None:
            for adapter in learned:
                adapter.prompts.check_grid(grid)

        self._image_size = set_image_size(self.backbone, self._image_size, img_size, patch_size, check_grid)
        if self.grid != old_grid:
            for adapter in learned:
                adapter.prompts.resize(self.grid)

    def get_classifier(self) -> Any:
        """The head: a module, or two for a distilled backbone."""
        heads = self._adapter.heads()
        return heads[0] if len(heads) == 1 else tuple(heads)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none), and another pooling if given. Nothing else is changed.

        Raises:
            TypeError, ValueError: not a number of classes, or a pooling that the backbone can't do.
        """
        if global_pool is not None:
            learned: Any = self.adapters.values()
            for adapter in learned:
                check_pooling(adapter.prompts.config, global_pool, global_pool == "map")
        num_classes = reset_head(self.backbone, num_classes, global_pool)
        self._active.set_heads(take_heads(self.backbone), num_classes)
        self._active.class_names = None
        self.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, with their prompts; returns the indices kept."""
        take = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        learned: list[Any] = [*self.adapters.values(), self._base]
        for adapter in learned:
            adapter.prompts.prune(len(self.backbone.blocks))
        if prune_head:
            for adapter in learned:
                adapter.set_heads({name: nn.Identity() for name in adapter.head_names})
        return take

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of every module; the weights of a timm model are refused with advice."""
        check_state_names(state_dict, self.backbone)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> AdaptiveViT:
        self._cuda_graphs.clear()  # moved tensors would be kept where they were
        super()._apply(*args, **kwargs)
        self._base._apply(*args, **kwargs)
        return self

    def cuda_graph_report(self) -> str:
        """The kinds of calls that were made, a line for each: its graphs and their memory, or why none."""
        return self._cuda_graphs.report()


def _logits(model: AdaptiveViT, images: Tensor, backend: str) -> Tensor:
    return model._logits(images, backend)


# By backend: the function that a CUDA graph is made of.
_LOGITS = {name: partial(_logits, backend=name) for name in BACKENDS}

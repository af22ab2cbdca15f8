"""What AdaptiveViT has of PEFT's models: several adapters by name, one of them active, or one an image."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from . import adapters
from .adapters import BASE, Adapter, MissingHead, check_name, find, weighted_state
from .arguments import integer
from .backbones import patch_size, take_heads
from .config import PromptConfig, split_options
from .creation import make_heads
from .modules import is_plain, weights_of
from .prompts import Geometry, Prompts
from .timm_api import TimmModel

__all__ = ["DEFAULT_ADAPTER", "AdapterModel", "check_pooling"]

AVERAGING = ("avg", "avgmax", "max")
DEFAULT_ADAPTER = "default"


class AdapterModel(TimmModel):
    """The part of AdaptiveViT that holds adapters.

    AdaptiveViT adds the attributes that are declared here without a value.
    """

    _base: Adapter
    _num_disabled: int

    def _init_adapters(self, config: PromptConfig, came_with: dict[str, nn.Module] | None) -> None:
        """Make the first adapter; ``came_with`` are the classifiers that the backbone came with."""
        num_classes = integer("backbone.num_classes", self.backbone.num_classes)
        heads, device = take_heads(self.backbone), weights_of(self.backbone, most=1)[0].device
        base: dict[str, nn.Module] = {name: MissingHead() for name in heads}
        empty = Prompts(PromptConfig(num_prompts=0), self._geometry())
        # Not as a submodule: it is neither trained nor saved.
        self.__dict__["_base"] = Adapter(empty, base if came_with is None else came_with)
        self._num_disabled = 0
        self.active_adapter = DEFAULT_ADAPTER
        prompts = Prompts(config, self._geometry()).to(device)
        # The head comes last of all parameters: timm's gradient clipping counts on it.
        self.adapters = nn.ModuleDict({DEFAULT_ADAPTER: Adapter(prompts, heads, num_classes)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._num_disabled = 0  # a copy that was made within disable_adapter is in none

    def _geometry(self) -> Geometry:
        blocks = self.backbone.blocks
        return Geometry(self.embed_dim, len(blocks), self.grid, patch_size(self.backbone), blocks)

    @property
    def _active(self) -> Adapter:
        """The active adapter, within ``disable_adapter`` too."""
        return cast(Adapter, self.adapters[self.active_adapter])

    @property
    def _adapter(self) -> Adapter:
        """The active adapter; the bare backbone within ``disable_adapter``."""
        return self._base if self._num_disabled else self._active

    @property
    def _changeable(self) -> Adapter:
        """The active adapter, to be changed, which must not happen to the bare backbone."""
        if self._num_disabled:
            raise ValueError(
                "within disable_adapter the model is the bare backbone, which can't be changed; assign "
                f"before or after it, or to model.adapters[{self.active_adapter!r}]"
            )
        return self._active

    # ---- the active adapter

    @property
    def prompts(self) -> Prompts:
        """The prompts of the active adapter; assigning, which disable_adapter forbids, replaces them."""
        return self._adapter.prompts

    @property
    def head(self) -> nn.Module:
        """The head of the active adapter; assigning, which disable_adapter forbids, replaces it.

        A new one takes features (B, head_hidden_size). What is no module is a TypeError; a Linear of another
        width, or a Sequential that begins with one, a ValueError.
        """
        return self._adapter.head

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """A name for each class of the active adapter, as stored with it; None if unknown."""
        return self._adapter.class_names

    @class_names.setter
    def class_names(self, names: tuple[str, ...] | None) -> None:
        self._changeable.class_names = names

    @property
    def data_config(self) -> dict[str, Any]:
        """How images are prepared for the active adapter, where not as ``pretrained_cfg`` says."""
        return self._adapter.data_config

    @data_config.setter
    def data_config(self, config: dict[str, Any]) -> None:
        self._changeable.data_config = config

    @property
    def adapter_metadata(self) -> dict[str, Any]:
        """What the user stored with the active adapter."""
        return self._adapter.metadata

    @adapter_metadata.setter
    def adapter_metadata(self, metadata: dict[str, Any]) -> None:
        self._changeable.metadata = metadata

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would register a module of that name beside the property, where nobody reads it.
        if "adapters" in self.__dict__.get("_modules", ()) and name in ("prompts", *self._adapter.head_names):
            if name != "prompts":
                self._check_head(name, value)
            setattr(self._changeable, name, value)
        else:
            super().__setattr__(name, value)

    def _check_head(self, name: str, head: object) -> None:
        """Refuse a head that can't take the features, as far as that is certain before it is called.

        Raises:
            TypeError: not a module.
            ValueError: a Linear of another width, or modules in a row that begin with one.
        """
        if not isinstance(head, nn.Module):
            raise TypeError(
                f"{name} must be a module, got {head!r}; for a model without classifier, assign nn.Identity()"
            )
        first = head
        while is_plain(first, nn.Sequential) and (parts := list(first.children())):
            first = parts[0]
        width = self.head_hidden_size
        if is_plain(first, nn.Linear) and first.in_features != width:
            raise ValueError(
                f"{name} must take features of width {width} (model.head_hidden_size), got a Linear with "
                f"in_features={first.in_features}"
            )

    def named_adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the active adapter by the names in its file, ``prompts.*`` and ``head.*``."""
        return self._adapter.named_parameters()

    def adapter_state(self) -> dict[str, Tensor]:
        """What the file of the active adapter holds: its parameters and buffers themselves, by name."""
        return self._adapter.state_dict(keep_vars=True)

    # ---- several adapters

    def set_adapter(self, name: str) -> None:
        """Make another adapter the active one. What requires gradients stays as it is.

        Raises:
            ValueError: there is no such adapter.
        """
        find(self.adapters, name)
        self.active_adapter = name

    def add_adapter(
        self,
        name: str,
        config: PromptConfig | None = None,
        *,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        """Add an untrained adapter, trainable and not active.

        Args:
            name: of the adapter.
            config: the options of its prompts. None for those of the active adapter with the changes in
                ``options``.
            num_classes: of its head; None for as many as the active adapter has.
            options: options of PromptConfig.

        Raises:
            TypeError, ValueError: not a new name, or options that contradict each other or the backbone;
                nothing is added.
            NotImplementedError: the backbone can't take prompts of this kind.
        """
        if check_name(name) in self.adapters:
            raise ValueError(f"adapter {name!r} exists already; delete_adapter({name!r}) first")
        if config is None:
            config, others = split_options(None, options, self._active.prompts.config)
            if others:
                raise TypeError(f"options must be those of PromptConfig, got {sorted(others)}")
        elif options or not isinstance(config, PromptConfig):
            raise TypeError(f"config must be a PromptConfig, alone, got {config!r} and {options}")
        number = self._active.num_classes if num_classes is None else num_classes
        self.adapters[name] = self.make_adapter(config, number)

    def make_adapter(self, config: PromptConfig, num_classes: int) -> Adapter:
        """Return an untrained adapter that suits the model, on its device and in the active one's dtype.

        Raises:
            TypeError, ValueError, NotImplementedError: as ``add_adapter``.
        """
        number = integer("num_classes", num_classes, minimum=0)
        return Adapter(self.make_prompts(config), self._make_heads(number), number).train(self.training)

    def make_prompts(self, config: PromptConfig) -> Prompts:
        """Return untrained prompts that suit the model, on its device and in the active ones' dtype.

        Raises:
            ValueError, NotImplementedError: as ``add_adapter``.
        """
        check_pooling(config, self.global_pool, getattr(self.backbone, "attn_pool", None) is not None)
        prompts = Prompts(config, self._geometry()).to(weights_of(self.backbone, most=1)[0].device)
        if known := weights_of(self._active.prompts, most=1):
            prompts.to(dtype=known[0].dtype)
        return prompts

    def _make_heads(self, num_classes: int) -> dict[str, nn.Module]:
        """Return new classifiers by name."""
        return make_heads(self.backbone, num_classes)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; if it was the active one, the first of the others is from now on.

        Raises:
            ValueError: there is no such adapter, or no other.
        """
        find(self.adapters, name)
        others = [other for other in self.adapters if other != name]
        if not others:
            raise ValueError(f"adapter {name!r} is the only one, and a model has one at least")
        if self.active_adapter == name:
            self.active_adapter = others[0]
            warnings.warn(
                f"adapter {name!r} was the active one and is deleted: {others[0]!r} is active now",
                stacklevel=2,
            )
        del self.adapters[name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model is the bare backbone, with the classifier that it came with.

        It holds for all threads; ``adapter_names=["__base__", ...]`` holds for one call. A head of another
        number of classes than the pre-trained one is nobody's: then logits raise ValueError, features don't.
        """
        self._num_disabled += 1
        try:
            yield
        finally:
            self._num_disabled -= 1

    def find_adapter(self, name: str) -> Adapter:
        """Return the adapter of that name; ``"__base__"`` has no prompts, and the backbone's own classifier.

        Raises:
            ValueError: there is none; lists those there are.
        """
        return self._base if name == BASE else find(self.adapters, name)

    def add_weighted_adapter(self, names: Sequence[str], weights: Sequence[float] | None, name: str) -> None:
        """Add the weighted sum of adapters of equal options, parameter by parameter; not made active.

        A learned table of the sum is the sum of the tables. Computed prompts are not the sum of the prompts:
        they are products of parameters (norm, kernel, projection, projector), and attention and what follows
        are not linear either. So it is a guess, as for the weights of any network: good for adapters that
        were trained from the same start, to be checked on data for all others. The logits' heads are summed
        too, so that the classes must be the same.

        Args:
            names: of the adapters.
            weights: a factor for each; None for their mean.
            name: of the new adapter.

        Raises:
            TypeError, ValueError: not a new name, no adapters, another number of weights, weights that are
                not finite, or adapters of other options, shapes or classes; nothing is added.
        """
        if check_name(name) in self.adapters:
            raise ValueError(f"adapter {name!r} exists already; delete_adapter({name!r}) first")
        summed = [find(self.adapters, each) for each in names]
        state = weighted_state(dict(zip(names, summed, strict=True)), weights)
        adapter = copy.deepcopy(summed[0])
        adapter.metadata = {}
        adapter.load_state_dict(state)
        self.adapters[name] = adapter

    # ---- files

    save_adapter = adapters.save
    push_adapter = adapters.push
    load_adapter = adapters.load
    from_adapter = classmethod(adapters.build)


def check_pooling(config: PromptConfig, global_pool: str, attention_pool: bool) -> None:
    """Raise ValueError for prompts that the backbone's pooling can't average."""
    if config.pool_prompts and (global_pool not in AVERAGING or attention_pool):
        raise ValueError(
            f"pool_prompts=True needs a backbone with global_pool in {AVERAGING}, got {global_pool!r}"
        )

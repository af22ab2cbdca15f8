"""AdapterStack: a model that serves many adapters, each image by its own, from one set of tensors."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import integer
from ..backbones.blocks import standard_block
from ..config import PromptConfig
from ..cuda_graphs import Graphs
from ..data import eval_transform, full_data_config
from ..ops.backend import BACKENDS, resolve
from ..prompts.layout import Facts, Layout, small_tensor
from ..prompts.mixed import MixedPrompts
from .checks import backbone_problems
from .file import AdapterError, read
from .hub import local_folder
from .loading import check_fit, new_adapter
from .mixing import (
    Heads,
    assert_range,
    check_index,
    check_names,
    has_plain_heads,
    head_fields,
    head_row,
    plain_adapter,
)
from .module import BASE, Adapter, check_name

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["AdapterInfo", "AdapterStack"]


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter beside its numbers.

    Attributes:
        num_classes: of its head.
        class_names: a name for each, None if unknown.
        data_config: how images are prepared, where not as the backbone's ``pretrained_cfg`` says.
        metadata: what the user stored with it.
        prompts: the options of its prompts.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    data_config: dict[str, Any]
    metadata: dict[str, Any]
    prompts: PromptConfig

    @classmethod
    def of(cls, adapter: Adapter) -> AdapterInfo:
        """Return what is known of ``adapter``."""
        known = (adapter.class_names, adapter.data_config, adapter.metadata)
        return cls(adapter.num_classes, *known, adapter.prompts.config)


class AdapterStack(nn.Module):
    """A model in eval mode that serves many adapters of one backbone, each image by its own.

    The adapters are rows of tensors that are allocated once, for ``capacity`` adapters of at most the
    reserved sizes. So adding, replacing and removing one changes numbers, but no shape and no address: code
    that was compiled and graphs that were captured go on. Nothing of an adapter requires a gradient; to train
    several in one batch, call an AdaptiveViT with ``adapter_names``.

    Calls and changes may come from several threads: a call sees each adapter as before or after a change,
    never half of both.

    Args:
        model: its backbone, precision, backend and ``cuda_graphs`` are used; its own adapters are not, see
            ``add_adapter``. It is put into eval mode.
        capacity: how many adapters there may be.
        prompts: the options of the prompts to make room for; smaller ones fit too. None for the model's own.
        max_classes: of the largest head; None for as many as the model has.

    Raises:
        TypeError, ValueError: arguments out of range, or prompts that can't share a batch: those that travel
            or are pooled, and kinds from outside without ``plain``.
        NotImplementedError: the backbone's blocks, or its heads, can't be computed for several adapters.
    """

    _rows: Tensor
    _heads: Tensor
    _counts: Tensor
    _lengths: Tensor

    def __init__(
        self,
        model: AdaptiveViT,
        *,
        capacity: int,
        prompts: PromptConfig | Sequence[PromptConfig] | None = None,
        max_classes: int | None = None,
    ) -> None:
        super().__init__()
        number = integer("capacity", capacity, minimum=1)
        most = model.num_classes if max_classes is None else max_classes
        classes = integer("max_classes", most, minimum=1)
        prompts = model.config if prompts is None else prompts
        configs = [prompts] if isinstance(prompts, PromptConfig) else list(prompts)
        if not configs or not all(isinstance(config, PromptConfig) for config in configs):
            raise TypeError(f"prompts must be one PromptConfig or several, got {prompts!r}")
        reserved = [model.make_adapter(config, classes) for config in configs]
        _check_blocks(model)
        plain = [self._plain(model, adapter) for adapter in reserved]
        self.model = model
        self._grid = model.grid
        self._layout = Layout.of(plain, model.embed_dim, math.prod(model.grid), varying=True)
        self._head_fields = head_fields(reserved[0], classes)
        self._max_classes = classes
        self._infos: dict[str, AdapterInfo] = {}
        self._places: dict[str, int] = {}
        self._lock = threading.RLock()
        self._cuda_graphs = Graphs()
        like = next(model.backbone.parameters())
        row = torch.promote_types(like.dtype, torch.float32)
        for tensor in reserved[0].prompts.parameters():
            row = torch.promote_types(row, tensor.dtype)
        head = torch.zeros_like(head_row(reserved[0], self._head_fields, like).detach())
        buffers = {
            "rows": self._layout.row([], like.new_empty(0, dtype=row)).expand(number + 1, -1).clone(),
            "heads": head.expand(number + 1, -1).clone(),
            "counts": torch.zeros(number + 1, dtype=torch.long, device=like.device),
            **self._layout.facts([[]] * (number + 1), like.device)._asdict(),
        }
        for name, buffer in buffers.items():
            self.register_buffer(f"_{name}", buffer, persistent=False)
        base = model.find_adapter(BASE)
        self._has_base = has_plain_heads(base) and base.num_classes <= classes
        if self._has_base:
            self._heads[0] = head_row(base, self._head_fields, self._heads).detach()
            self._counts[0] = base.num_classes
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def train(self, mode: bool = True) -> AdapterStack:
        """Stay in eval mode. Returns self."""
        super().train(False)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> AdapterStack:
        self._cuda_graphs.clear()
        super()._apply(*args, **kwargs)
        return self

    # ---- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._places)

    @property
    def capacity(self) -> int:
        """How many adapters there may be."""
        return len(self._rows) - 1

    @property
    def max_classes(self) -> int:
        """The number of classes of the largest head: the columns of the logits."""
        return self._max_classes

    @property
    def bytes_per_adapter(self) -> int:
        """The memory that one adapter takes, in bytes."""
        return sum(buffer[0].numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def info(self, name: str) -> AdapterInfo:
        """What is known of an adapter; ValueError if there is none of that name."""
        return self._infos[self._known(name)]

    def transform(self, name: str) -> Any:
        """From a PIL image to the tensor that the adapter takes; see vapt_fast.data."""
        return eval_transform(full_data_config(self.model.pretrained_cfg, self.info(name).data_config))

    def places(self, names: Sequence[str]) -> Tensor:
        """Return where the adapters of these names stand, integers as ``forward`` takes them.

        They are good until an adapter is deleted. Raises TypeError or ValueError for what are no names.
        """
        return small_tensor(self._find(names, len(names)), self._rows.device)

    def add_adapter(self, name: str, adapter: Adapter | None = None) -> None:
        """Add a copy of an adapter, or replace the one of that name by it.

        Args:
            name: of the adapter here.
            adapter: of a model with the same backbone; None for ``model.adapters[name]``.

        Raises:
            TypeError, ValueError: not a name, no such adapter in the model, or one of another backbone.
            AdapterError: it does not fit what is reserved, or all places are taken; nothing is changed.
        """
        check_name(name)
        adapter = self.model.find_adapter(name) if adapter is None else adapter
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter must be one of a model's adapters, got {type(adapter).__name__}")
        self._write(name, copy.deepcopy(adapter))  # to be put into eval mode

    def load_adapter(self, folder: str | os.PathLike[str], *, name: str, check_backbone: bool = True) -> None:
        """Add the adapter in ``folder``, or replace the one of that name by it; see vapt_fast.adapters.load.

        Raises:
            AdapterNotFoundError: a file is missing.
            AdapterError: damaged files, or an adapter for another backbone or beyond what is reserved, or all
                places are taken; lists every mismatch, and nothing is changed.
            TypeError, ValueError: not a name.
        """
        check_name(name)
        file = read(local_folder(folder))
        check_fit(file, backbone_problems(self.model, file, check_backbone))
        self._write(name, new_adapter(self.model, file))

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; ValueError if there is none of that name."""
        with self._lock, torch.no_grad():
            place = self._places.pop(self._known(name))
            del self._infos[name]
            for buffer in (self._rows, self._heads, self._counts, self._lengths):
                buffer[place] = 0

    def _known(self, name: str) -> str:
        if name not in self._places:
            raise ValueError(f"adapter must be one of {self.adapters}, got {name!r}")
        return name

    @staticmethod
    def _plain(model: AdaptiveViT, adapter: Adapter) -> Any:
        config = adapter.prompts.config
        plain = plain_adapter(model, adapter.eval(), torch.float32)
        if plain is None:
            raise ValueError(
                f"adapters in one batch can't have prompts that travel or are pooled, modules with hooks, or "
                f"a kind without plain tensors, got kind {config.kind!r}, pool_prompts={config.pool_prompts}"
            )
        return plain

    def _write(self, name: str, adapter: Adapter) -> None:
        for block in adapter.prompts.blocks:
            if getattr(block, "grid", self._grid) != self._grid:
                raise ValueError(
                    f"adapters in one batch must be of one backbone, but one is for {block.grid} patches and "
                    f"the stack for {self._grid}"
                )
        with torch.no_grad():
            plain = self._plain(self.model, adapter)
            problems = list(self._layout.problems(plain))
            if adapter.num_classes > self.max_classes:
                problems.append(f"num_classes: {adapter.num_classes}, reserved are {self.max_classes}")
            if not has_plain_heads(adapter):
                problems.append("head: more than a Linear, or one with hooks")
            rows = None
            if not problems:
                row = self._layout.row(plain, self._rows)
                rows = row, head_row(adapter, self._head_fields, self._heads)
            with self._lock:
                free = set(range(1, len(self._rows))) - set(self._places.values())
                place = self._places.get(name, min(free, default=0))
                if not place:
                    problems.append(f"all {self.capacity} places are taken; delete_adapter(...) first")
                if problems or rows is None:
                    raise AdapterError(f"adapter {name!r} does not fit into the stack", problems)
                self._rows[place], self._heads[place] = rows
                self._counts[place] = adapter.num_classes
                facts = self._layout.facts([plain], self._rows.device)
                for key, fact in facts._asdict().items():
                    getattr(self, f"_{key}")[place] = fact[0]
                self._places[name], self._infos[name] = place, AdapterInfo.of(adapter)

    # ---- forward

    def forward(self, images: Tensor, adapter_names: Sequence[str] | Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to logits (B, max_classes), -inf beyond an image's own classes.

        Args:
            images: the images; differentiable.
            adapter_names: the adapter of each image: B names, ``"__base__"`` for the bare backbone; or
                integers (B,) on the images' device, of ``places``, 0 for the bare backbone. Compiled code
                takes integers: with names it would be compiled for each choice of them.

        Raises:
            TypeError, ValueError: images that the model can't take, not one known adapter an image, or a
                model in training mode or whose image size was changed.
            NotImplementedError: blocks that were given hooks or other modules meanwhile.
        """
        self.model.check_images(images)
        _check_blocks(self.model)  # which may have got hooks since
        if self.model.grid != self._grid:
            raise ValueError(
                f"model must have the {self._grid[0]}x{self._grid[1]} patches that its stack was made for, "
                f"got {self.model.grid[0]}x{self.model.grid[1]}; make another stack after set_input_size()"
            )
        if self.model.training:
            raise ValueError("model must be in eval mode, as its stack is: call model.eval()")
        backend = resolve(self.model.backend)
        if backend == "reference":
            raise ValueError(
                "backend 'reference' computes adapter by adapter: call an AdaptiveViT with adapter_names"
            )
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else self._lock:
            if isinstance(adapter_names, Tensor):
                places = check_index(adapter_names, images, *self._range)
            else:
                places = small_tensor(self._find(adapter_names, len(images)), images.device)
            if compiling:
                return self._logits(images, places, backend)
            return self._cuda_graphs(_LOGITS[backend], self, images, places, preferred=self.model.cuda_graphs)

    def _find(self, names: Sequence[str], count: int) -> list[int]:
        known = (BASE, *self._places) if self._has_base else self.adapters
        return [self._places.get(name, 0) for name in check_names(names, count, known)]

    @property
    def _range(self) -> tuple[int, int]:
        """From where to where places are; the bare backbone's may be none."""
        return (0 if self._has_base else 1), len(self._rows)

    def _logits(self, images: Tensor, places: Tensor, backend: str) -> Tensor:
        assert_range(places, *self._range)
        facts = Facts(*(getattr(self, f"_{name}") for name in Facts._fields))
        prompts = MixedPrompts(self._layout, self._rows, facts, places)
        heads = Heads(self.max_classes, self._head_fields, self._heads, self._counts, varying=True)
        return heads(self.model._head_inputs(images, backend, prompts), places)


# By backend: the function that a CUDA graph is made of.
_LOGITS = {name: partial(AdapterStack._logits, backend=name) for name in BACKENDS}


def _check_blocks(model: AdaptiveViT) -> None:
    if any(standard_block(block) is None for block in model.backbone.blocks):
        raise NotImplementedError(
            "the backbone has blocks that can't be computed for several adapters: other modules than timm's, "
            "or hooks"
        )

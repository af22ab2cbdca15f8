"""Loading an adapter into a model, and making the model for one, as AdaptiveViT's methods do."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import PromptConfig
from ..names import create_backbone
from ..ops.backend import BackendUnavailableError
from ..prompts import Prompts
from ..source import HEADS, LOCAL_ARGS, is_local, load_weights
from .checks import backbone_problems, head_problems, prompt_problems, tensor_problems
from .file import AdapterError, AdapterFile, read, read_backbone, unreadable
from .hub import add_backbone, local_folder
from .module import BASE, Adapter, MissingHead, check_name

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["build", "check_fit", "load", "new_adapter", "read_config"]

_log = logging.getLogger("vapt_fast")

NO_PROMPTS = PromptConfig(num_prompts=0)  # those of a model until what its adapter asks for is checked

Made = TypeVar("Made", bound=nn.Module)


def load(
    model: AdaptiveViT,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    check_backbone: bool = True,
    is_trainable: bool = False,
) -> None:
    """Load the adapter in ``folder`` into ``model``, or change nothing at all.

    Into one that the model has, its tensors are copied in place, which keep their dtype and device: with the
    same optimizer, compiled code and graphs it goes on. Another name adds an adapter, which is not made
    active. Class names, data config and metadata come along.

    Args:
        model: an AdaptiveViT of the same geometry; where the adapter replaces one, with the same prompt
            options (dropout rates aside) and head size.
        folder: what ``save`` wrote; or of ``push``: "hf-hub:owner/name", "hf-hub:owner/name@revision".
        name: of the adapter in the model; None for the active one.
        check_backbone: refuse a model whose frozen weights are not those the adapter was trained on, as told
            by ``backbone_fingerprint``.
        is_trainable: whether an adapter that is added requires gradients.

    Raises:
        AdapterNotFoundError: a file is missing, or the Hub has no such repository or revision.
        AdapterError: damaged files, or an adapter for another model; lists every mismatch.
        TypeError, ValueError: not a name.
    """
    name = model.active_adapter if name is None else check_name(name)
    file = read(local_folder(folder))
    problems = list(backbone_problems(model, file, check_backbone))
    if name in model.adapters:
        adapter: Any = model.adapters[name]
        problems += [*prompt_problems(adapter, file), *head_problems(adapter, file)]
        problems += tensor_problems(model, adapter, file)
        check_fit(file, problems)
        _copy(model, adapter, file)
        return
    check_fit(file, problems)
    adapter = new_adapter(model, file)
    model.adapters[name] = adapter.requires_grad_(is_trainable)


def new_adapter(model: AdaptiveViT, file: AdapterFile) -> Adapter:
    """Return the adapter of ``file`` as a module that suits ``model``, which is left as it is.

    Raises:
        AdapterError: its tensors don't fit.
    """
    check_fit(file, [*_prompt_size_problems(model, file), *_head_size_problems(file)])
    adapter = model.make_adapter(file.prompts, file.num_classes)
    check_fit(file, tensor_problems(model, adapter, file))
    _copy(model, adapter, file)
    return adapter


def _prompt_size_problems(model: AdaptiveViT, file: AdapterFile) -> Iterator[str]:
    """Yield where the config asks for other prompts than there are: for more, maybe, than there is room."""
    with torch.device("meta"):
        prompts = Prompts(file.prompts, model._geometry())
    shapes = {f"prompts.{name}": value.shape for name, value in prompts.state_dict().items()}
    for name, shape in shapes.items():
        found = file.tensors.get(name)
        if found is None or found.shape != shape:
            size = "missing" if found is None else f"shape {tuple(found.shape)}"
            yield f"{name}: {size}, its config makes it {tuple(shape)}"


def _head_size_problems(file: AdapterFile) -> Iterator[str]:
    """Yield whether the config asks for more classes than any head has."""
    heads = [value for name, value in file.tensors.items() if name.startswith("head")]
    if file.num_classes and not any(value.ndim and len(value) == file.num_classes for value in heads):
        yield f"head: no tensor with a row for each class, its config makes them {file.num_classes}"


def build(
    cls: Callable[..., AdaptiveViT],
    folder: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | None = None,
    weights: str | os.PathLike[str] | None = None,
    check_backbone: bool = True,
    backend: str | None = None,
    backbone_precision: str | None = None,
) -> AdaptiveViT:
    """Make a new model for the adapter in ``folder``, with the adapter loaded, in eval mode.

    No file of this machine is opened that the adapter names: what it tells may be a stranger's.

    Args:
        cls: AdaptiveViT, or a function with its arguments.
        folder: what ``save`` wrote; or of ``push``: "hf-hub:owner/name", "hf-hub:owner/name@revision".
        backbone: the timm model to adapt, which gets a head of the adapter's number of classes; or a name to
            make it by, pretrained, as "local-dir:/folder". None for the backbone in ``folder`` if there is
            one, else the name in the adapter's config. By a name, it gets the arguments in the config.
        weights: a file with the backbone's weights, see vapt_fast.source.load_weights; not with a timm model.
        check_backbone: as for ``load``.
        backend, backbone_precision: as for AdaptiveViT, whatever the adapter was trained with.

    Raises:
        AdapterNotFoundError: a file is missing, or the Hub has no such repository or revision.
        AdapterError: damaged files, a backbone that timm can't make here, or one that does not fit; lists
            every mismatch.
        TypeError, ValueError, NotImplementedError: AdaptiveViT refuses ``backbone``, ``backend`` or
            ``backbone_precision``.
    """
    if weights is not None and isinstance(backbone, nn.Module):
        raise TypeError(
            "weights are for a backbone that is made by its name, but backbone is a model already"
        )
    adapter = read(local_folder(folder))
    check_fit(adapter, _head_size_problems(adapter))
    if backbone is None and weights is None:
        add_backbone(folder, adapter)
    if backbone is None or isinstance(backbone, str):
        model = _build_by_name(cls, adapter, backbone, weights, backend)
    else:
        model = cls(backbone, prompts=NO_PROMPTS, backend=backend)
    model.backbone_precision = backbone_precision
    # Before the head is replaced: a backbone that does not fit is handed back as it was.
    check_fit(adapter, backbone_problems(model, adapter, check_backbone))
    if model.num_classes != adapter.num_classes:
        model.reset_classifier(adapter.num_classes)
    own: Any = model.adapters[model.active_adapter]
    check_fit(adapter, _prompt_size_problems(model, adapter))
    own.prompts = model.make_prompts(adapter.prompts)
    check_fit(adapter, tensor_problems(model, own, adapter))
    if backbone is None and adapter.backbone_path is not None:
        for name, tensor in model.adapter_state().items():
            tensor.data = tensor.data.to(adapter.tensors[name].dtype)
    _copy(model, own, adapter)
    return model.eval()


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the config of the adapter in ``folder``, after the same checks of both files as in ``load``.

    Its keys are described in vapt_fast.adapters.file.

    Raises:
        AdapterNotFoundError, AdapterError: as for ``load``.
    """
    return read(local_folder(folder)).config


def check_fit(adapter: AdapterFile, problems: Iterable[str]) -> None:
    """Raise AdapterError if there are ``problems``, the reasons why an adapter does not fit the model."""
    if problems := list(problems):
        raise AdapterError(f"the adapter in {adapter.folder} does not fit the model", problems)


def _copy(model: AdaptiveViT, adapter: Adapter, file: AdapterFile) -> None:
    own = adapter.state_dict(keep_vars=True)
    # All conversions first: one that runs out of memory must not leave half an adapter in the model.
    values = {name: file.tensors[name].to(own[name].device, own[name].dtype) for name in own}
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(values[name])
    names, config = file.config.get("class_names"), file.config
    trained, own_precision = file.backbone.get("precision"), model.backbone_precision
    if trained != own_precision:
        _log.info(
            "the adapter in %s was trained with backbone_precision=%r, the model has %r",
            *(file.folder, trained, own_precision),
        )
    adapter.metadata = config["metadata"]
    adapter.class_names = None if names is None else tuple(names)
    # The size is the model's own, which may change.
    adapter.data_config = {key: value for key, value in config["data"].items() if key != "input_size"}


# ---- making the backbone


def _build_by_name(
    cls: Callable[..., AdaptiveViT],
    adapter: AdapterFile,
    name: str | None,
    weights: str | os.PathLike[str] | None,
    backend: str | None,
) -> AdaptiveViT:
    args = _timm_args(adapter, name, weights)
    kwargs = {"prompts": NO_PROMPTS, "backend": backend}
    saved, path = adapter.backbone, adapter.backbone_path
    if weights is None and (name is not None or path is None):
        pretrained: str = saved["name"] if name is None else name
        return _making(adapter, pretrained, True, lambda: cls(pretrained, pretrained=True, **kwargs, **args))
    architecture: str = name or saved.get("architecture") or saved["name"].partition(".")[0]
    made = _making(adapter, architecture, False, lambda: create_backbone(architecture, **args))
    if weights is not None:
        try:
            load_weights(made, weights)
        except (FileNotFoundError, ValueError) as error:
            raise _cannot_make(adapter, str(error)) from error
    elif path is not None:
        _assign(made, read_backbone(adapter, path), path)
    model = cls(made, **kwargs)
    base = model.find_adapter(BASE)  # timm has drawn its classifier at random
    base.set_heads({name: MissingHead() for name in base.head_names})
    return model


def _cannot_make(adapter: AdapterFile, *problems: str) -> AdapterError:
    return AdapterError(f"the backbone of the adapter in {adapter.folder} can't be made", problems)


def _timm_args(
    adapter: AdapterFile, name: str | None, weights: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """The arguments for timm.create_model, unless the adapter does not tell enough, or tells too much."""
    saved = adapter.backbone
    args, left_out = saved.get("args"), saved.get("args_left_out")
    if not isinstance(args, dict) or (name is None and not isinstance(saved.get("name"), str)):
        raise _cannot_make(
            adapter, "its config does not tell how timm makes it; make it yourself and pass it: backbone=..."
        )
    if left_out:
        raise _cannot_make(
            adapter,
            f"its config has not the arguments {left_out}, which JSON can't express; make it yourself and "
            "pass it: backbone=...",
        )
    if refused := sorted(LOCAL_ARGS & args.keys()):
        raise _cannot_make(adapter, f"its config has the arguments {refused}, which no adapter may choose")
    if name is None and weights is None and adapter.backbone_path is None:
        if path := saved.get("weights_path"):
            raise _cannot_make(
                adapter,
                f"it has the weights of the file {path!r} on the machine where it was saved, and no adapter "
                f"may choose which files are opened; if you trust that file, pass it: weights={path!r}, or "
                f"--weights {shlex.quote(str(path))} on the command line",
            )
        if is_local(saved["name"]):
            raise _cannot_make(
                adapter,
                f"it was made from {saved['name']!r} on the machine where it was saved, and no adapter may "
                "choose which files are opened; if you trust that folder, pass it: "
                f"backbone={saved['name']!r}, or --backbone {shlex.quote(saved['name'])} on the command line",
            )
    return args | {"num_classes": adapter.num_classes}


def _making(adapter: AdapterFile, name: str, pretrained: bool, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except BackendUnavailableError:
        raise
    except Exception as error:  # whatever timm, the hub's client or the network raise
        problems = [f"timm.create_model({name!r}, {pretrained=}) failed: {type(error).__name__}: {error}"]
        if pretrained and not isinstance(error, NotImplementedError):
            problems.append(
                "if its weights can't be downloaded here, make the timm model yourself and pass it: "
                "backbone=..."
            )
        raise _cannot_make(adapter, *problems) from error


def _assign(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put the tensors of the backbone's file into it, dtypes included."""
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        backbone.to(dtype=dtypes.pop())  # also what no state dict holds
    try:
        keys = backbone.load_state_dict(state, strict=False, assign=True)
        problems = [*keys.unexpected_keys, *(k for k in keys.missing_keys if not k.startswith(HEADS))]
    except RuntimeError as error:
        problems = [str(error)]
    if problems:
        raise unreadable(path, f"its tensors are not those of {type(backbone).__name__}: {problems}")

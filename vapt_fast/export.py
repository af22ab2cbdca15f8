"""Models as files that run without this library: torch.export programs, AOTInductor packages, ONNX."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ._version import __version__
from .adapters.file import class_name_problems
from .arguments import boolean, choice, integer, listing
from .data import full_data_config
from .modules import weights_of
from .ops.backend import use_backend

__all__ = ["DESCRIPTION_NAME", "FORMATS", "OWN_FILES", "ExportError", "check_formats", "export_model"]

DESCRIPTION_NAME = "export.json"

_INPUT, _OUTPUT, _BATCH = "images", "logits", "batch"
# The largest difference from the model, as a share of its largest output.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


class ExportError(RuntimeError):
    """A model that can't be exported as asked, or a file that doesn't compute what the model computes."""


def export_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("pt2",),
    batch_size: int | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model as files that run without vapt_fast and timm, from images to logits.

    ============  ==================  ==================================================================
    format        file                loaded by
    ============  ==================  ==================================================================
    ``"pt2"``     ``model.pt2``       ``torch.export.load``
    ``"aoti"``    ``model_aoti.pt2``  ``torch._inductor.aoti_load_package``, or C++; compiled for the
                                      processor of this machine, by a C++ compiler
    ``"onnx"``    ``model.onnx``      ONNX Runtime and others; weights of more than 2 GB lie beside it
    ============  ==================  ==================================================================

    ``export.json`` tells how images are prepared, the names of the classes and what goes in and out. Every
    file is loaded again and compared with the literal method on random images, of two batch sizes where any
    is allowed. The folder gets all files or none.

    Args:
        model: an AdaptiveViT or a timm model, in eval mode, with weights in float32 or float64. Programs and
            packages run on its device; for ONNX it must be on the CPU, in float32.
        folder: where to; it is made if it does not exist.
        formats: which of FORMATS.
        batch_size: the number of images in every call; None for any number.
        class_names: a name for each class; None for ``model.class_names``, if it has that.
        data_config: how images are prepared, if not as the model says: any of ``vapt_fast.data.DATA_KEYS``.
        overwrite: replace what an earlier export wrote to ``folder``, of all formats.

    Returns:
        What is in ``export.json``; ``["files"][format]["largest_difference"]`` is that from the model.

    Raises:
        TypeError, ValueError: an argument that is wrong; the message says which.
        FileExistsError: ``folder`` has an export already.
        ModuleNotFoundError: packages for ONNX are missing; the message says how to install them.
        ExportError: weights of another dtype or on another device, a ``backbone_precision``, no C++ compiler,
            or a file that doesn't compute what the model computes.
        OSError: the file system's own refusals.
    """
    formats = check_formats(formats)
    if batch_size is not None:
        batch_size = integer("batch_size", batch_size, minimum=1)
    weight = _check_model(model, formats)
    data = _data_config(model, data_config)
    folder = Path(folder).absolute()
    existing = _check_free(folder, boolean("overwrite", overwrite))

    batches = _random_images((1, 3) if batch_size is None else (batch_size,), data["input_size"], weight)
    with use_backend("reference"), torch.no_grad():
        expected = [model(images) for images in batches]
    names = _class_names(model, class_names, expected[0].shape[1])

    program = _program(model, batches[-1], batch_size is None)
    description: dict[str, Any] = {
        "vapt_fast": __version__,
        "torch": torch.__version__,
        "device": str(weight.device),
        "input": _tensor_entry(_INPUT, batches[0], batch_size),
        "output": _tensor_entry(_OUTPUT, expected[0], batch_size),
        "data": data,
        "class_names": names,
        "files": {},
    }
    with tempfile.TemporaryDirectory(dir=existing, prefix=".export-") as unfinished:
        for name in formats:
            path = Path(unfinished) / FORMATS[name].file
            FORMATS[name].write(program, path)
            difference = _largest_difference(name, FORMATS[name].load(path), batches, expected)
            description["files"][name] = {"file": path.name, "largest_difference": difference}
        text = json.dumps(description, indent=2, allow_nan=False)
        (Path(unfinished) / DESCRIPTION_NAME).write_text(f"{text}\n", encoding="utf-8")
        _publish(Path(unfinished), folder)
    return description


# ---- what is given


def check_formats(formats: object) -> tuple[str, ...]:
    """Return the formats, each once.

    Raises:
        TypeError, ValueError: no list of some of FORMATS.
        ModuleNotFoundError: packages for ONNX are missing; the message says how to install them.
    """
    if isinstance(formats, str) or not isinstance(formats, Sequence):
        raise TypeError(f"formats must be a list of some of {tuple(FORMATS)}, got {formats!r}")
    if not formats:
        raise ValueError(f"formats must be some of {tuple(FORMATS)}, got none")
    chosen = tuple(dict.fromkeys(choice("formats", name, tuple(FORMATS)) for name in formats))
    packages = sorted({package for name in chosen for package in FORMATS[name].packages})
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} missing, which ONNX needs; install with: pip install 'vapt_fast[onnx]'"
        )
    return chosen


def _check_model(model: object, formats: tuple[str, ...]) -> Tensor:
    """Return a weight of the frozen part, whose dtype and device images have to have."""
    if not isinstance(model, nn.Module) or not hasattr(model, "pretrained_cfg"):
        raise TypeError(f"model must be an AdaptiveViT or a timm model, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode; call model.eval()")
    if (precision := getattr(model, "backbone_precision", None)) is not None:
        raise ExportError(
            f"model must compute in the precision of its weights, got backbone_precision={precision!r}; set "
            "model.backbone_precision = None"
        )
    weights = weights_of(model)
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) != 1 or not dtypes <= _TOLERANCES.keys():
        raise ExportError(
            f"model must have weights of one dtype, float32 or float64, got {sorted(map(str, dtypes))}; call "
            "model.float()"
        )
    (weight,) = weights[:1]
    # ONNX Runtime has no convolution in float64.
    if "onnx" in formats and (weight.device.type != "cpu" or weight.dtype != torch.float32):
        raise ExportError(
            f"model must be on the CPU in float32 for the format 'onnx', got {weight.dtype} on "
            f"{weight.device}; call model.cpu().float()"
        )
    return weight


def _data_config(model: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return how images are prepared; a timm model may take another size than its ``pretrained_cfg`` says."""
    given = getattr(model, "data_config", None) if given is None else given
    known = dict(model.pretrained_cfg)
    if isinstance(given, Mapping) and given.get("input_size") is not None:
        known["input_size"] = given["input_size"]
    return full_data_config(known, given)


def _class_names(model: nn.Module, given: Any, num_classes: int) -> list[str] | None:
    names = getattr(model, "class_names", None) if given is None else given
    problems = list(class_name_problems(names, num_classes))
    if problems:
        raise ValueError(listing("the model can't be exported", problems))
    return None if names is None else list(names)


def _check_free(folder: Path, overwrite: bool) -> Path:
    """Return the folder, or the next one above it that exists: a place in the same file system."""
    found = [name for name in OWN_FILES if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} has an export already ({', '.join(found)}): give another folder, or overwrite=True "
            "(--overwrite) to replace it"
        )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    return existing


# ---- what is written


def _program(model: nn.Module, images: Tensor, any_batch: bool) -> ExportedProgram:
    """Return the rewritten pass as PyTorch's own operations, which need nothing of this library."""
    shapes = ({0: Dim(_BATCH, min=1)},) if any_batch else None
    with use_backend("torch"), torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


def _random_images(numbers: Sequence[int], size: Sequence[int], like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((number, *size), generator=generator, device="cpu").to(like) for number in numbers]


def _tensor_entry(name: str, tensor: Tensor, batch_size: int | None) -> dict[str, Any]:
    batch: int | str = _BATCH if batch_size is None else batch_size
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"name": name, "shape": [batch, *tensor.shape[1:]], "dtype": dtype}


def _largest_difference(
    name: str, loaded: Callable[[Tensor], Tensor], batches: list[Tensor], expected: list[Tensor]
) -> float:
    """Return the largest difference of what is loaded from what the model computes.

    Raises:
        ExportError: it is too large, or shape or dtype differ.
    """
    largest = 0.0
    for images, logits in zip(batches, expected, strict=True):
        with torch.no_grad():
            actual = loaded(images)
        if actual.shape != logits.shape or actual.dtype != logits.dtype:
            raise ExportError(
                f"format {name!r} was not written: it gives {tuple(actual.shape)} of {actual.dtype}, "
                f"expected {tuple(logits.shape)} of {logits.dtype}"
            )
        difference = (actual - logits).abs().max().item()
        allowed = _TOLERANCES[logits.dtype] * logits.abs().max().item()
        if not difference <= allowed:  # NaN too
            raise ExportError(
                f"format {name!r} was not written: its logits differ from the model's by {difference:.1e} "
                f"for {len(images)} random images, expected at most {allowed:.1e}"
            )
        largest = max(largest, difference)
    return largest


def _publish(unfinished: Path, folder: Path) -> None:
    """Move all files to ``folder`` in the place of an earlier export's; the description is the last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DESCRIPTION_NAME, *OWN_FILES):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == DESCRIPTION_NAME):
        os.replace(path, folder / path.name)


# ---- formats


# Into memory first: where the disk is full, PyTorch's own writing of a file ends the process.


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _write_aoti(program: ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    content = io.BytesIO()
    try:
        aoti_compile_and_package(program, package_path=content)
    except (InductorError, InvalidCxxCompiler) as error:  # PyTorch 2.14 puts the second into the first
        if not isinstance(getattr(error, "inner_exception", error), InvalidCxxCompiler):
            raise
        raise ExportError(
            "format 'aoti' needs a C++ compiler, which was not found; install g++, or set CXX"
        ) from error
    path.write_bytes(content.getbuffer())


def _load_aoti(path: Path) -> Callable[[Tensor], Tensor]:
    from torch._inductor import aoti_load_package

    return cast(Callable[[Tensor], Tensor], aoti_load_package(str(path)))


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    any_batch = bool(program.range_constraints)
    torch.onnx.export(
        program,
        (),
        path,
        dynamo=True,
        dynamic_shapes={_INPUT: {0: _BATCH}} if any_batch else None,  # the name of the dimension
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        external_data=False,
        verbose=False,
    )


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])


class _Format(NamedTuple):
    """A format: its file, the packages that it needs, and how it is written and loaded."""

    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    load: Callable[[Path], Callable[[Tensor], Tensor]]


FORMATS = {
    "pt2": _Format("model.pt2", (), _write_pt2, lambda path: torch.export.load(path).module()),
    "aoti": _Format("model_aoti.pt2", (), _write_aoti, _load_aoti),
    "onnx": _Format("model.onnx", ("onnx", "onnxruntime", "onnxscript"), _write_onnx, _load_onnx),
}
"""What a model can be exported to."""

OWN_FILES = (*(form.file for form in FORMATS.values()), "model.onnx.data", DESCRIPTION_NAME)
"""The names of all that an export may write."""

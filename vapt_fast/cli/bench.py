"""``vapt-fast bench``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.table import Table

from ..benchmark import LINEAR_PROBE, MODES, Comparison, Row, Setting, Variant, as_table, describe
from ..files import write_atomically
from ..ops.device import unavailable_reasons
from ..training import METHODS, UserError
from ..training.methods import check_backbone, method_name
from . import options
from .console import cell, failures, out, pick_device, say, status
from .output import check_file

__all__ = ["bench"]

Precision = Literal[
    "float64",
    "float32",
    "tf32",
    "bfloat16-autocast",
    "float16-autocast",
    "bfloat16",
    "bfloat16-fp8",
    "float16",
]
"""Those of ``vapt_fast.benchmark``, by name."""


def bench(
    backbone: Annotated[
        str, typer.Option(help="timm's name of the backbone; its weights are random here.")
    ] = "vit_base_patch16_224",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images, pixels (default: the backbone's own).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a step (default: 8 on a CPU, 64 on a GPU).")
    ] = None,
    method: Annotated[
        Literal["vapt", "vpt-deep", "vpt-shallow", "adaptive", "deep", "shallow"],
        typer.Option(help="Method, or its kind of prompts: adaptive is VAPT, deep and shallow are VPT."),
    ] = "vapt",
    prompts: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts a block; may be given several times.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Dtype of weights, or of autocast (default: float32 on a CPU, bfloat16-autocast on a GPU); "
            "bfloat16-fp8 has an FP8 backbone."
        ),
    ] = None,
    device: options.Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU (default: all cores).")] = (
        None
    ),
    rounds: Annotated[int, typer.Option(min=2, help="Times that everything is timed, in turns.")] = 6,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file for every timing.")] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Compare the backends on your model and machine: training step and forward pass, speed and memory.

    Each is checked against the reference before it is timed, logits and all gradients. The data is random:
    loading it is not measured. The linear probe is a lower bound.
    """
    with failures(), status.status("start") as bar:
        check_backbone(backbone)
        if output is not None:
            check_file(output, (".json",), overwrite)
        device = pick_device(device)
        on_gpu = torch.device(device).type == "cuda"
        setting = Setting(
            model=backbone,
            batch=(64 if on_gpu else 8) if batch_size is None else batch_size,
            device=device,
            threads=torch.get_num_threads() if threads is None else threads,
            image_size=image_size,
        )
        variants, unavailable = _variants(
            setting,
            (METHODS[method_name(method)].prompts or {})["kind"],
            prompts if prompts else [10],
            ("bfloat16-autocast" if on_gpu else "float32") if precision is None else precision,
        )
        comparison = Comparison(
            setting, variants, memory=memory, progress=lambda line: bar.update(cell(line))
        )
        rows = {mode: comparison.measure(mode, rounds=rounds) for mode in MODES}
        first = rows[MODES[0]][0]
        if first.error is not None:  # of the reference, which can run everywhere
            raise UserError(f"{backbone} can't be measured: {first.error}")
        measured = [row.as_dict() for of_mode in rows.values() for row in of_mode]
        comparisons = [{"setting": asdict(setting), "rows": measured}]
        report = {"environment": describe(device), "comparisons": comparisons}
        if output is not None:
            write_atomically(output, (json.dumps(report, indent=2) + "\n").encode())
    for mode, of_mode in rows.items():
        title = f"{mode}, {backbone}, batch {setting.batch}, {variants[0].precision}, {device}"
        out.print(_table(title, of_mode, setting.batch))
    failed = {f"{row.variant.backend}: {row.error}" for of in rows.values() for row in of if row.error}
    for line in (*unavailable, *sorted(failed)):
        say(line)
    if output is not None:
        say(f"wrote {output}")
    if any(row.wrong for of_mode in rows.values() for row in of_mode):
        raise typer.Exit(1)


def _variants(
    setting: Setting, kind: str, numbers: list[int], precision: str
) -> tuple[list[Variant], list[str]]:
    """Return what is compared, and a line for each backend that can't run."""
    names, unavailable = [], []
    for name in ("reference", "torch", "triton", "cuda", "auto"):
        reasons = unavailable_reasons(name)
        if reasons:
            unavailable.append(f"{name}: {'; '.join(reasons)}")
        elif name != "auto" or setting.on_gpu:  # without a GPU, auto is torch
            names.append(name)
    variants = [Variant(name, kind, number, precision) for number in numbers for name in names]
    return [*variants, Variant(LINEAR_PROBE, precision=precision)], unavailable


def _table(title: str, rows: list[Row], batch: int) -> Table:
    header, cells = as_table(rows, batch, lambda variant: variant.backend)
    table = Table(title=cell(title))
    for index, name in enumerate(header):
        table.add_column(cell(name), justify="left" if index == 0 else "right")
    for row in cells:
        table.add_row(*map(cell, row))
    return table

"""The options that several commands have: type, flag and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Adapter = Annotated[
    Path,
    typer.Argument(help="Folder that vapt-fast train or model.save_adapter() wrote; or hf-hub:owner/name."),
]
AdapterBackbone = Annotated[
    str | None,
    typer.Option(help="timm's name of the backbone, as local-dir:/folder (default: the adapter's)."),
]
AdapterWeights = Annotated[
    Path | None, typer.Option(help="File with the backbone's weights, if the adapter's folder has none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a step.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier call wrote to --output.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]

Backend = Annotated[
    str | None, typer.Option(help="auto, reference, torch, triton or cuda; see vapt-fast info.")
]
BackbonePrecision = Annotated[
    str | None, typer.Option(help="fp8: products of the frozen backbone in 8 bits (default: as all else).")
]

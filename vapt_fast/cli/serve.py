"""``vapt-fast serve``."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from ..adapters.file import read
from ..adapters.hub import local_folder
from ..config import KINDS
from ..serving import Refusal, ServeOptions, token_digest
from ..serving.engine import add_adapters, check_installed, start, stop
from ..serving.store import check_name, not_finite
from ..training import UserError
from ..training.run import check_backend
from ..training.saved import SEGMENTATION
from . import options
from .console import failures, pick_device, say

__all__ = ["serve"]

TOKEN_VARIABLE = "VAPT_FAST_SERVE_TOKEN"


def serve(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=FOLDER...",
            help="The adapters, each a folder or hf-hub:owner/name; the first one's backbone is served.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes, each with the whole backbone.")] = 1,
    store: Annotated[
        Path, typer.Option(help="Folder of all adapters; the same for all machines, and the next start.")
    ] = Path("adapter-store"),
    capacity: Annotated[int, typer.Option(min=1, help="Adapters in the memory of a replica.")] = 16,
    max_classes: Annotated[
        int | None, typer.Option(min=1, help="Most classes of an adapter (default: the largest given).")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder below which clients may name adapters to load.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with the token for changes of adapters (default: the variable {TOKEN_VARIABLE}; "
            "without one they are refused)."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Most images in a batch.")] = 32,
    batch_wait: Annotated[float, typer.Option(min=0, help="Seconds that a batch waits for more.")] = 0.005,
    max_body: Annotated[int, typer.Option(min=1, help="MB of the largest request.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Millions of pixels of the largest image.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may take.")] = 60.0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to use: host:port, or auto (default: one of its own).")
    ] = None,
    device: options.Device = "auto",
    backbone: options.AdapterBackbone = None,
    weights: options.AdapterWeights = None,
    backend: options.Backend = None,
    autocast: Annotated[
        Literal["bfloat16", "float16"] | None,
        typer.Option(help="Compute in 16 bits, faster on GPUs (default: as the weights)."),
    ] = None,
    backbone_precision: options.BackbonePrecision = None,
) -> None:
    """Serve many adapters on one backbone over HTTP, in batches across adapters.

    POST an image to /predict?adapter=NAME; docs/serving.md describes the rest. Needs the extra `serve`.
    """
    with failures():
        check_installed()
        check_backend(backend, "--backend")
        device = pick_device(device)
        _check_port(host, port)
        token, folders = _token(token_file), _named_folders(adapters)
        largest = max(_classes_of(folder) for folder in folders.values())
        given = ServeOptions(
            first=next(iter(folders.values())),
            store=store.resolve(),
            capacity=capacity,
            max_classes=largest if max_classes is None else max_classes,
            root=None if root is None else root.resolve(),
            token_sha256=None if token is None else token_digest(token),
            max_body=max_body * 10**6,
            max_pixels=max_pixels * 10**6,
            batch_size=batch_size,
            batch_wait=batch_wait,
            device=device,
            autocast=autocast,
            threads=max(1, (os.cpu_count() or 1) // replicas) if device == "cpu" else None,
            backbone=backbone,
            weights=None if weights is None else str(weights.resolve()),
            backend=backend,
            backbone_precision=backbone_precision,
        )
        gpus = min(1.0, torch.cuda.device_count() / replicas) if device.startswith("cuda") else 0.0
        placing = {"replicas": replicas, "gpus": gpus, "timeout": timeout, "address": address}
        _serve(given, folders, host, port, **placing)


def _classes_of(folder: str) -> int:
    """Return how many classes an adapter tells apart."""
    file = read(local_folder(folder))
    if SEGMENTATION in file.config["metadata"]:
        raise UserError(f"{folder} is for segmentation, and the server names the class of images")
    if file.prompts.pool_prompts or KINDS[file.prompts.kind].travels:
        raise UserError(
            f"{folder} has prompts that can't share a batch with another adapter's: of kind "
            f"{file.prompts.kind!r}, pool_prompts={file.prompts.pool_prompts}"
        )
    if problems := not_finite(file.tensors):
        raise UserError(f"{folder} can't be served: {'; '.join(problems)}")
    return file.num_classes


def _serve(given: ServeOptions, folders: dict[str, str], host: str, port: int, **placing: Any) -> None:
    """Start the server, and stop it when that is asked for."""
    add_adapters(given.store, folders)
    start(given, host=host, port=port, **placing)
    try:
        _check_served(folders, "127.0.0.1" if host == "0.0.0.0" else host, port)
        say(f"serving {', '.join(folders)} at http://{host}:{port}; stop with Ctrl-C")
        if given.token_sha256 is None:
            say(f"adapters can't be changed: no --token-file and no {TOKEN_VARIABLE}")
        _wait()
    finally:
        stop()


def _check_served(names: Iterable[str], host: str, port: int) -> None:
    """Raise UserError unless a replica can load all the adapters."""
    for name in names:
        try:
            urllib.request.urlopen(f"http://{host}:{port}/adapters/{name}", timeout=60).close()
        except urllib.error.HTTPError as error:
            raise UserError(f"{name}: {json.loads(error.read())['error']}") from error


def _named_folders(given: list[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for argument in given:
        name, separator, folder = argument.partition("=")
        if not (separator and folder):
            raise UserError(f"{argument!r} names no adapter; expected NAME=FOLDER")
        try:
            check_name(name)
        except Refusal as error:
            raise UserError(error.reason) from error
        if name in folders:
            raise UserError(f"the name {name!r} was given twice")
        folders[name] = folder if folder.startswith("hf-hub:") else str(Path(folder).resolve())
    return folders


def _token(file: Path | None) -> str | None:
    token = os.environ.get(TOKEN_VARIABLE) if file is None else file.read_text().strip()
    if token is not None and not token:
        raise UserError(f"the token in {file or TOKEN_VARIABLE} is empty")
    return token


def _check_port(host: str, port: int) -> None:
    """Raise UserError for an address that can't be had; the engine would try for long."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} can't be listened at: {error.strerror}") from error


def _wait() -> None:
    """Return on SIGINT or SIGTERM."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()

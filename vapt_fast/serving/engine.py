"""The engine: Ray Serve runs the replicas, restarts them, queues requests and fills batches."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..adapters.file import read
from ..adapters.hub import local_folder
from ..adapters.stack import AdapterStack
from ..config import PromptConfig
from ..model import AdaptiveViT
from .options import ServeOptions
from .service import Item, Service
from .store import Store, read_files

__all__ = ["add_adapters", "check_installed", "make_stack", "start", "stop"]

APPLICATION = "vapt_fast"


def check_installed() -> None:
    """Raise ModuleNotFoundError, with the command that helps, unless the extra ``serve`` is installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    for name in ("python_multipart", "ray.serve"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"vapt-fast serve needs {error.name}, which is not installed; install it with: "
                "pip install 'vapt_fast[serve]'"
            ) from error


def start(
    options: ServeOptions,
    *,
    replicas: int = 1,
    gpus: float = 0.0,
    host: str = "127.0.0.1",
    port: int = 8000,
    timeout: float = 60.0,
    address: str | None = None,
) -> None:
    """Start the server, and return when all replicas can answer.

    Args:
        options: for the replicas.
        replicas: how many; each is a process with the whole backbone.
        gpus: what each needs of them, 0.5 to put two replicas on one GPU.
        host, port: where to listen.
        timeout: the seconds that a request may take.
        address: of a Ray cluster that is running, or "auto" for this machine's; None to start one here.

    Raises:
        ModuleNotFoundError: Ray Serve is not installed.
        RuntimeError: no replica can start; the log says why.
    """
    check_installed()
    import ray
    from ray import serve

    local: dict[str, Any] = {} if address is not None else {"include_dashboard": False}
    ray.init(address=address, configure_logging=False, **local)
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": timeout})
    replica = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=4 * options.batch_size,
        max_queued_requests=64 * options.batch_size,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        logging_config={"enable_access_log": False},
    )(_replica(options))
    serve.run(replica.bind(), name=APPLICATION)


def stop() -> None:
    """Stop what ``start`` has started."""
    import ray
    from ray import serve

    serve.delete(APPLICATION)
    ray.shutdown()


def _replica(options: ServeOptions) -> type:
    """The class of the replicas; being local, it travels to other machines by value, with the options."""
    from ray import serve
    from ray.serve.metrics import Counter

    from .http import make_app

    def app() -> Any:  # made in each replica
        context: Callable[[], Any] = serve.get_replica_context  # its servable_object is yet to be made
        return make_app(lambda: context().servable_object.service, context().replica_tag, _metrics)

    @serve.ingress(app)
    class Replica:
        def __init__(self) -> None:
            logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for each malformed form
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            self.service = Service(options, make_stack(options))
            self.service.batch = self.batch
            self.images = Counter("vapt_fast_images", "Images, by version.", tag_keys=("version",))

        @serve.batch(max_batch_size=options.batch_size, batch_wait_timeout_s=options.batch_wait)
        async def batch(self, items: list[Item]) -> list[torch.Tensor]:
            for item in items:
                self.images.inc(tags={"version": item.version})
            return await self.service.run(items)

    return Replica


async def _metrics() -> str:
    """The metrics of all machines, as Ray's agents export them for Prometheus."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    texts = await asyncio.gather(*(asyncio.to_thread(_get, url) for url in urls))
    return "".join(texts)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


# ---- what is served


def add_adapters(store: Path, folders: Mapping[str, str]) -> None:
    """Put adapters into the store, by name, each from its folder or from the Hub.

    Raises:
        AdapterError: one can't be read.
    """
    place = Store(store)
    for name, folder in folders.items():
        local = local_folder(folder)
        read(local)
        place.publish(name, place.add(read_files(local, sys.maxsize)))


def make_stack(options: ServeOptions) -> AdapterStack:
    """Return a stack on the backbone of the first adapter, for prompts as in all adapters of the store.

    An adapter of the store that can't be served is passed over: who asks for it is told why.
    """
    model = AdaptiveViT.from_adapter(
        options.first,
        backbone=options.backbone,
        weights=options.weights,
        backend=options.backend,
        backbone_precision=options.backbone_precision,
    ).to(options.device)
    store = Store(options.store)
    prompts: list[PromptConfig] = []
    for version in store.versions().values():
        with suppress(TypeError, ValueError, NotImplementedError):  # an AdapterError is a ValueError
            config = read(store.folder(version)).prompts
            if config not in prompts:
                AdapterStack(model, capacity=1, prompts=config)
                prompts.append(config)
    return AdapterStack(
        model, capacity=options.capacity, prompts=prompts or None, max_classes=options.max_classes
    )

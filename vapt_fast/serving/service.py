"""What a replica does: the adapters of the store in one stack, and images to answers.

It knows neither HTTP nor the engine. All of its methods run in one event loop; the stack is used in one
thread of its own, one call at a time, and images are decoded in others.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..adapters import CONFIG_NAME, WEIGHTS_NAME, AdapterError, AdapterNotFoundError
from ..adapters.file import read
from ..adapters.stack import AdapterInfo, AdapterStack
from .images import decode
from .options import ServeOptions
from .refusal import Refusal
from .store import Store, check_name, files_below, not_finite

__all__ = ["Item", "Service", "filled_size"]

SHOWN = 16  # of a version's 64 digits
MOST = 4096  # prompts and the like: room is made for them before their tensors are looked at
ATTEMPTS = 5  # to read an adapter that is replaced meanwhile

Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """An image in a batch: the tensor (in_chans, H, W), and the version of its adapter."""

    image: Tensor
    version: str


@dataclass(frozen=True)
class _Loaded:
    info: AdapterInfo
    transform: Callable[[Any], Tensor]


class Service:
    """A replica.

    Args:
        options: those of the server.
        stack: an empty one with room for ``options.capacity`` adapters.

    Attributes:
        batch: gives the logits (max_classes) of one item. It may wait for others and call ``run`` for them
            together, as an engine does; by default it does not.
    """

    def __init__(self, options: ServeOptions, stack: AdapterStack) -> None:
        self.options = options
        self.batch: Callable[[Item], Awaitable[Tensor]] = self._run_one
        self._stack = stack
        self._store = Store(options.store)
        self._in_memory: OrderedDict[str, _Loaded] = (
            OrderedDict()
        )  # by version, the least recently used first
        self._requests: Counter[str] = Counter()  # that need a version in memory
        self._loading = asyncio.Lock()
        self._leaving: str | None = None  # the version that makes room, when its last request is answered
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._decoders = ThreadPoolExecutor(max(1, os.cpu_count() or 1), "decode")

    # ---- what clients ask for

    def adapters(self) -> list[dict[str, str]]:
        """Return name and version of each adapter."""
        return [_named(name, version) for name, version in sorted(self._store.versions().items())]

    async def describe(self, name: str) -> dict[str, Any]:
        """Return what is known of an adapter.

        Raises:
            Refusal: there is none of this name, or it can't be loaded.
        """
        return await self._to_its_end(self._describe(name))

    async def _describe(self, name: str) -> dict[str, Any]:
        async with self._version(name) as (version, adapter):
            return _named(name, version) | _summary(adapter.info)

    async def predict(self, content: bytes, name: str, top: int = 1) -> dict[str, Any]:
        """Return the ``top`` most probable classes of an image, by an adapter as it was when this was called.

        Raises:
            Refusal: no such adapter, or an image that can't be read.
        """
        return await self._to_its_end(self._predict(content, name, top))

    async def _predict(self, content: bytes, name: str, top: int) -> dict[str, Any]:
        async with self._version(name) as (version, adapter):
            image = await _in(self._decoders, self._prepare, content, adapter.transform)
            logits = await self.batch(Item(image, version))
            return _named(name, version) | {"top": _best(logits, adapter.info, top)}

    async def put(
        self, name: str, files: Mapping[str, bytes] | None = None, folder: str | None = None
    ) -> tuple[dict[str, Any], bool]:
        """Add an adapter, or replace the one of this name; if it is refused, nothing changes.

        Args:
            name: of the adapter.
            files: the contents of its two files; or
            folder: the name of a folder below ``options.root``.

        Returns:
            What ``describe`` returns, and whether the name is new.

        Raises:
            Refusal: a wrong name, or an adapter that is damaged or does not fit.
        """
        check_name(name)
        return await self._to_its_end(self._put(name, files, folder))

    async def _put(
        self, name: str, files: Mapping[str, bytes] | None, folder: str | None
    ) -> tuple[dict[str, Any], bool]:
        if files is None:
            if self.options.root is None or folder is None:
                raise Refusal(403, "this server loads no folders: it was started without --root")
            files = await asyncio.to_thread(files_below, self.options.root, folder, self.options.max_body)
        version = await asyncio.to_thread(self._store.add, files)
        try:
            await asyncio.to_thread(self._check_files, self._store.folder(version))
            await self._pin(version)
        except (AdapterError, Refusal) as error:
            if isinstance(error, AdapterError):
                await asyncio.to_thread(self._store.discard, version)
            raise _refusal(error) from error
        try:
            new = await asyncio.to_thread(self._store.publish, name, version)
            return _named(name, version) | _summary(self._in_memory[version].info), new
        finally:
            self._release(version)

    async def delete(self, name: str) -> None:
        """Take an adapter away; requests that came before are still answered.

        Raises:
            Refusal: there is none of this name.
        """
        if not await asyncio.to_thread(self._store.remove, name):
            raise _unknown(name)

    def _check_files(self, folder: Path) -> None:
        """Raise AdapterError for files that are damaged, of two adapters, too large, or have NaN."""
        adapter = read(folder)
        problems = not_finite(adapter.tensors)
        for name, value in asdict(adapter.prompts).items():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(number, int) and number > MOST for number in numbers):
                problems.append(f"prompts {name}: {value}, more than {MOST:,}")
        most = self.options.max_classes
        if adapter.num_classes > most:
            problems.append(
                f"it has {adapter.num_classes:,} classes, and the server takes {most:,} (--max-classes)"
            )
        copy = json.loads((folder / CONFIG_NAME).read_bytes())
        if copy.get("config_sha256") != adapter.config["config_sha256"]:
            problems.append(f"{CONFIG_NAME} was not saved together with {WEIGHTS_NAME}")
        if problems:
            raise AdapterError("the adapter can't be served", problems)

    # ---- the model

    async def run(self, items: Sequence[Item]) -> list[Tensor]:
        """Return the logits (max_classes) of each item, in float32 on the CPU, computed in one batch."""
        return await _in(self._model_thread, self._logits, items)

    async def _run_one(self, item: Item) -> Tensor:
        return (await self.run([item]))[0]

    def _logits(self, items: Sequence[Item]) -> list[Tensor]:
        device, autocast = self.options.device, self.options.autocast
        dtype = None if autocast is None else getattr(torch, autocast)
        kind, count = torch.device(device).type, len(items)
        if kind == "cuda":
            items = [*items, *[items[0]] * (filled_size(count, self.options.batch_size) - count)]
        with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype is not None):
            images = torch.stack([item.image for item in items]).to(device)
            logits = self._stack(images, [item.version for item in items])
            return list(logits[:count].float().cpu().unbind())

    def _prepare(self, content: bytes, transform: Callable[[Any], Tensor]) -> Tensor:
        return transform(decode(content, self.options.max_pixels))

    # ---- adapters in memory

    @asynccontextmanager
    async def _version(self, name: str) -> AsyncIterator[tuple[str, _Loaded]]:
        """The version of an adapter, as it is now, which stays in memory within this context."""
        version = await self._acquire(name)
        try:
            yield version, self._in_memory[version]
        finally:
            self._release(version)

    async def _acquire(self, name: str) -> str:
        for _ in range(ATTEMPTS):
            version = self._store.versions().get(name)
            if version is None:
                break
            try:
                await self._pin(version)
            except AdapterNotFoundError:
                continue  # it was replaced meanwhile, and its files are gone
            except AdapterError as error:
                raise _refusal(error) from error
            return version
        raise _unknown(name)

    async def _pin(self, version: str) -> None:
        """Keep a version in memory until ``_release``, and load it first if it is not there."""
        if version in self._in_memory and version != self._leaving:
            self._requests[version] += 1
        else:
            await self._load(version)
        self._in_memory.move_to_end(version)

    def _release(self, version: str) -> None:
        self._requests[version] -= 1
        if not self._requests[version]:
            del self._requests[version]
            self._released.set()

    def _to_its_end(self, work: Coroutine[Any, Any, Result]) -> Awaitable[Result]:
        """What can be awaited for the result of ``work``, which goes on if that is cancelled.

        A client that goes away must not leave the stack half changed, nor take an adapter from a batch that
        its image is in.
        """
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop alone would not keep it
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _load(self, version: str) -> None:
        """Count a request of a version, which is loaded if it is not in memory; one comes after the other."""
        async with self._loading:
            if version not in self._in_memory:
                if len(self._in_memory) >= self.options.capacity:
                    await self._make_room()
                self._in_memory[version] = await _in(self._model_thread, self._read, version)
            self._requests[version] += 1

    async def _make_room(self) -> None:
        """Drop the version whose last request is longest ago, at best one that nobody needs.

        One that is needed gets no further requests until those that it has are answered: these queue for
        loading it again, so that no adapter keeps the others out, however many ask for it.
        """
        unused = (known for known in self._in_memory if not self._requests[known])
        oldest = next(unused, next(iter(self._in_memory)))
        self._leaving = oldest
        try:
            while self._requests[oldest]:
                self._released.clear()
                await self._released.wait()
        finally:
            self._leaving = None
        del self._in_memory[oldest]
        await _in(self._model_thread, self._stack.delete_adapter, oldest)

    def _read(self, version: str) -> _Loaded:
        try:
            self._stack.load_adapter(self._store.folder(version), name=version)
        except AdapterError:
            raise
        except (TypeError, ValueError, NotImplementedError) as error:  # prompts that can't share a batch
            raise AdapterError("the adapter can't be served", [str(error)]) from error
        return _Loaded(self._stack.info(version), self._stack.transform(version))


def filled_size(count: int, most: int) -> int:
    """Return the size to which ``count`` images in a batch of at most ``most`` are filled up on a GPU.

    It is 1, 4, 16, ... or ``most``: each size has a CUDA graph, and a model has few of them. What the host
    launches bounds a call that has none.
    """
    size = 1
    while size < count:
        size *= 4
    return max(count, min(size, most))


async def _in(executor: Executor, function: Callable[..., Result], *args: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(executor, functools.partial(function, *args))


def _named(name: str, version: str) -> dict[str, str]:
    return {"adapter": name, "version": version[:SHOWN]}


def _summary(info: AdapterInfo) -> dict[str, Any]:
    names = info.class_names
    return {"num_classes": info.num_classes, "class_names": None if names is None else list(names)}


def _best(logits: Tensor, info: AdapterInfo, top: int) -> list[dict[str, Any]]:
    """The most probable of the adapter's own classes; those beyond are another adapter's."""
    values, indices = logits[: info.num_classes].softmax(0).topk(min(top, info.num_classes))
    names = info.class_names or [str(index) for index in range(info.num_classes)]
    return [
        {"class": names[index], "index": index, "probability": value}
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _refusal(error: AdapterError | Refusal) -> Refusal:
    """The reasons alone: the rest of the message has paths of this machine."""
    if isinstance(error, Refusal):
        return error
    return Refusal(422, f"the adapter can't be loaded: {'; '.join(error.problems)[:1000]}")


def _unknown(name: str) -> Refusal:
    return Refusal(404, f"there is no adapter {name[:80]!a}")

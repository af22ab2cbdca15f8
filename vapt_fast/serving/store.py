"""The adapters of a server: a folder that all replicas read.

========================= ==========================================================
``index.json``            the version of each adapter, by name
``versions/<version>/``   the two files of a version, which never change
========================= ==========================================================

A version is named by the sha256 of its files. A change of the server is the replacement of the index, which
is one step: whoever reads it later, in whichever process, sees the change. So a replica looks up the version
of an adapter when a request arrives, and answers with exactly that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import CONFIG_NAME, WEIGHTS_NAME
from ..files import write_atomically, write_files
from .refusal import Refusal

__all__ = ["FILE_NAMES", "Store", "check_name", "files_below", "not_finite", "read_files"]

FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
UNUSED_SECONDS = 3600.0  # longer than the check of an upload takes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> str:
    """Return the name of an adapter.

    Raises:
        Refusal: it is none.
    """
    if not _NAME.fullmatch(name):
        raise Refusal(
            422, f"{name[:80]!a} can't name an adapter; expected up to 64 of A-Z, a-z, 0-9, - and _"
        )
    return name


class Store:
    """The adapters in a folder, which is made if it does not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = folder / "index.json"
        self._read: tuple[bytes, dict[str, str]] = (b"", {})
        (folder / "versions").mkdir(parents=True, exist_ok=True)

    def versions(self) -> Mapping[str, str]:
        """Return the version of each adapter, by name, as it is now."""
        try:
            content = self._index.read_bytes()
        except FileNotFoundError:
            return {}
        known, versions = self._read  # compared as a whole: times of files may be coarse
        if content != known:
            versions = json.loads(content)
            self._read = (content, versions)
        return versions

    def folder(self, version: str) -> Path:
        """Return where the files of a version are."""
        return self._folder / "versions" / version

    def add(self, files: Mapping[str, bytes]) -> str:
        """Write the files of a version, which no name has yet, and return the version."""
        digest = hashlib.sha256()
        for name in FILE_NAMES:
            digest.update(hashlib.sha256(files[name]).digest())
        version = digest.hexdigest()
        place = self.folder(version)
        beside = place.with_name(f"{uuid.uuid4().hex}.tmp")
        try:
            write_files(beside, files)
            os.rename(beside, place)
        except OSError:
            if not place.exists():
                raise
            os.utime(place)  # it is in use again
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return version

    def discard(self, version: str) -> None:
        """Remove the files of a version that no adapter has."""
        with self._locked():
            if version not in self.versions().values():
                shutil.rmtree(self.folder(version), ignore_errors=True)

    def publish(self, name: str, version: str) -> bool:
        """Give a name to a version, from now on for every replica; returns whether the name is new.

        Raises:
            Refusal: the files of the version are gone: it was refused, or waited for too long.
        """
        with self._locked():
            if not self.folder(version).exists():
                raise Refusal(503, "the files of the adapter are gone; send them again")
            versions = dict(self.versions())
            new = name not in versions
            self._write(versions | {name: version})
        return new

    def remove(self, name: str) -> bool:
        """Take an adapter away, from now on for every replica; returns whether there was one."""
        with self._locked():
            versions = dict(self.versions())
            known = versions.pop(name, None) is not None
            if known:
                self._write(versions)
        return known

    def _write(self, versions: Mapping[str, str]) -> None:
        write_atomically(self._index, json.dumps(versions).encode())
        used = set(versions.values())
        for path in (self._folder / "versions").iterdir():
            if path.name not in used and _age(path) > UNUSED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, of all processes on all machines that share the folder."""
        import fcntl  # Windows has none

        with open(self._folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def read_files(folder: Path, most: int) -> dict[str, bytes]:
    """Return the two files of the adapter in a folder.

    Raises:
        Refusal: one is missing or not a file, or both have more than ``most`` bytes.
    """
    try:
        if sum((folder / name).stat().st_size for name in FILE_NAMES) > most:
            raise Refusal(413, f"the adapter has more than {most:,} bytes")
        return {name: (folder / name).read_bytes() for name in FILE_NAMES}
    except OSError as error:
        raise Refusal(404, f"the folder has no adapter; expected {' and '.join(FILE_NAMES)} in it") from error


def files_below(root: Path, folder: str, most: int) -> dict[str, bytes]:
    """Return the two files of the adapter in ``folder``, which is below ``root``, links followed.

    Raises:
        Refusal: it is not, or ``read_files`` refuses it.
    """
    try:
        root = root.resolve()
        place = (root / folder).resolve()
        inside = all((place / name).resolve().is_relative_to(root) for name in FILE_NAMES)
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a link to itself
        raise Refusal(422, f"{folder[:80]!a} is no path") from error
    if not inside or place == root:
        raise Refusal(403, f"{folder[:80]!a} is not a folder below the one that this server may read")
    return read_files(place, most)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for each of an adapter's tensors that has NaN or infinite numbers."""
    return [
        f"{name} has NaN or infinite numbers"
        for name, tensor in tensors.items()
        if not torch.isfinite(tensor).all()
    ]

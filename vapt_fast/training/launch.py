"""Processes that train together, started by PyTorch's elastic launcher as torchrun starts them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..files import write_atomically
from .errors import UserError

__all__ = ["begin", "launch"]

# They report each failure with tracebacks, and ``launch`` raises it.
_LOGGERS = (
    *("torch.multiprocessing.spawn", "torch.distributed.elastic.multiprocessing.api"),
    "torch.distributed.elastic.agent.server.api",
)


def launch(function: Callable[..., None], *arguments: Any, processes: int) -> None:
    """Call a function in several processes of this machine, each of which may join the others.

    None of them outlives this call, whatever ends it: an error, a signal, or the end of this process. After a
    signal that this process ignores, the call returns, and the function was not done.

    Args:
        function: of a module, so that another process finds it; calls ``parallel.joined``.
        *arguments: of the function, the same in each process.
        processes: how many.

    Raises:
        UserError: a process was ended from outside.
        Exception: the first that a process raised; the others are ended.
    """
    with tempfile.TemporaryDirectory() as name, _own_signals(), _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=name),
        )
        try:
            elastic_launch(config, _call)(os.getpid(), Path(name), function, arguments)
        except ChildFailedError as failed:
            _, failure = failed.get_first_failure()
            if failure.exitcode < 0:
                raise UserError(
                    f"one of {processes} processes was ended by {failure.signal_name()}, perhaps for want of "
                    "memory: go on, on devices with more of it"
                ) from failed
            found = _first_error(Path(name))
            if found is None:
                raise RuntimeError(f"one of {processes} processes has failed: {failed}") from failed
            raise found[0] from RuntimeError(f"in another process:\n{found[1]}")


def _call(parent: int, folder: Path, function: Callable[..., None], arguments: tuple) -> None:
    """Call a function in a process of its own; leave what it raises in ``folder``."""
    # There is nothing to clean up: files are written whole or not at all.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    begin(parent)
    try:
        function(*arguments)
    except (Exception, SystemExit) as error:
        content = pickle.dumps((time.time(), _as_sent(error), traceback.format_exc()))
        write_atomically(folder / f"{os.environ['RANK']}.error", content)
        if not isinstance(error, UserError):
            time.sleep(1)  # if a process was killed, which the others only notice, the launcher sees it first
        raise RuntimeError("left in a file") from error  # a SystemExit may look like success


def _as_sent(error: BaseException) -> Exception:
    """Return the error if another process can read it, and one that says the same if not."""
    try:
        if isinstance(error, Exception) and isinstance(pickle.loads(pickle.dumps(error)), type(error)):
            return error
    except Exception as unreadable:  # of any kind: it is raised by the error's own code
        return RuntimeError(f"{type(error).__name__}: {error} (not sent as it is: {unreadable})")
    return RuntimeError(f"{type(error).__name__}: {error}")


def _first_error(folder: Path) -> tuple[Exception, str] | None:
    """Return what a process raised first, and its traceback; None if none has left one."""
    raised = [pickle.loads(path.read_bytes()) for path in folder.glob("*.error")]
    return min(raised, key=lambda of: of[0])[1:] if raised else None


def begin(parent: int) -> None:
    """Begin a process that a library has started: it ends when its parent has, even in the middle of a call.

    What it starts itself, such as workers that read images, it starts as any process does, and not in the way
    in which it was started: spawned workers take seconds in each epoch, and those of joblib can't have any.

    Args:
        parent: number of the process that started this one.
    """
    multiprocessing.set_start_method(None, force=True)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _own_signals() -> Iterator[None]:
    """End the launcher's processes on a signal, which then does what it did before the launcher took it."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    children = set(multiprocessing.active_children())
    received = None
    try:
        yield
    except SignalException as error:
        received = error.sigval
        for child in set(multiprocessing.active_children()) - children:
            child.kill()  # the launcher doesn't know one that it was about to start
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
    if received is not None:
        signal.raise_signal(received)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the launcher's own reports of failures."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

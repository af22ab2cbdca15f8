"""Engines, which spread calls over processes: joblib's on this machine, Ray's on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import UserError
from ..launch import begin

__all__ = ["ENGINES", "spread"]

ENGINES = ("joblib", "ray")


def spread(
    engine: str,
    function: Callable[..., Any],
    calls: Iterable[tuple],
    *,
    jobs: int | None,
    gpu: bool,
    processes: int = 1,
) -> Iterator[Any]:
    """Yield what ``function`` returns for each of ``calls``, as soon as it is there.

    Args:
        engine: one of ENGINES.
        function: of a module, so that another process finds it.
        calls: arguments of each call; the next ones are asked for when a process is free.
        jobs: calls at the same time; None for one with joblib, and for as many as the cluster has GPUs, or
            CPUs if no call needs a GPU, with Ray.
        gpu: whether each call needs GPUs, which Ray gives to no other call.
        processes: how many each call starts, each of which needs a CPU, or a GPU, of its machine.

    Raises:
        ModuleNotFoundError: the engine is missing (joblib is not needed for one job); the message says how to
            install it.
        UserError: a process was ended from outside, or no machine of Ray's has what a call needs.
        Exception: that of the first call that fails.
    """
    if engine == "ray":
        return _ray(function, calls, jobs, gpu, processes)
    return _joblib(function, calls, jobs or 1)


def _joblib(function: Callable[..., Any], calls: Iterable[tuple], jobs: int) -> Iterator[Any]:
    if jobs == 1:
        yield from (function(*call) for call in calls)
        return
    try:
        import joblib
    except ModuleNotFoundError as error:
        raise _missing("joblib", "sweep") from error
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    one_by_one = {"return_as": "generator_unordered", "pre_dispatch": jobs, "batch_size": 1}
    parallel = joblib.Parallel(jobs, **one_by_one, initializer=begin, initargs=(os.getpid(),))
    try:
        yield from parallel(joblib.delayed(function)(*call) for call in calls)
    except TerminatedWorkerError as error:
        raise UserError(
            "a process was ended from outside, perhaps for want of memory: give fewer jobs, and go on"
        ) from error


def _ray(
    function: Callable[..., Any], calls: Iterable[tuple], jobs: int | None, gpu: bool, processes: int
) -> Iterator[Any]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise _missing("ray", "ray") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS or of this machine, else a new one
    unit = "GPU" if gpu else "CPU"
    if processes > 1:
        most = max((node["Resources"].get(unit, 0) for node in ray.nodes() if node["Alive"]), default=0)
        if most < processes:
            raise UserError(
                f"a run of {processes} processes needs as many {unit}s on one machine, and no machine of the "
                f"cluster has more than {most:g}: give fewer"
            )
    if jobs is None:
        jobs = int(ray.cluster_resources().get(unit, 0)) // processes or 1
    # A node that is lost loses its calls, which Ray then makes again on another.
    # It takes functions, and ``function`` may be another callable.
    task = ray.remote(num_cpus=processes, num_gpus=processes * int(gpu), max_retries=-1)(
        lambda *call: function(*call)
    )
    queue = iter(calls)
    pending: list[Any] = []
    while True:
        while len(pending) < jobs and (call := next(queue, None)) is not None:
            pending.append(task.remote(*call))
        if not pending:
            return
        done, pending = ray.wait(pending)
        try:
            yield from ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def _missing(package: str, extra: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"this engine needs {package}, which is not installed; install it with: "
        f"pip install 'vapt_fast[{extra}]'"
    )

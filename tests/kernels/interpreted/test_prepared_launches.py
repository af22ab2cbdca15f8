"""A prepared launch picks the kernel that Triton would pick, and gives it the same.

There is no GPU: kernels are neither compiled nor run, but Triton goes all the way from arguments to a kernel.
"""

import random
from unittest import mock

import pytest
import torch
import triton
from interpreter import recorded_launches
from kernel_cases import KERNELS
from op_cases import results
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vapt_fast.ops import triton_launch


class Driver:
    """A machine with one GPU."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Uncompiled(CompiledKernel):
    """A kernel that notes how it is launched."""

    name, function, packed_metadata, src, module = "kernel", 1, None, None, None

    def __init__(self):
        self.launched = []

    def _init_handles(self):
        pass

    def launch_metadata(self, grid, stream, *args):
        return "metadata", stream, args

    @property
    def run(self):
        return lambda *args: self.launched.append(args)


def compile_nothing(kernel, key, signature, device, *args, **kwargs):
    return kernel.device_caches[device][0].setdefault(key, Uncompiled())


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(triton_launch, "_COMPILED", {})
    monkeypatch.setattr(driver, "_active", Driver())
    triton_launch._backend.cache_clear()
    yield
    triton_launch._backend.cache_clear()


def launches_of(op):
    """Each launch of a forward and backward pass: a kernel to compile, and the arguments of ``launch``."""
    torch.manual_seed(0)
    function, _, tensors, options = KERNELS[op].make(**KERNELS[op].quick[0])
    recorded = []

    def record(kernel, config, args, constants):
        recorded.append((JITFunction(kernel.fn), config, args, constants))

    with (
        mock.patch.object(triton_launch, "_prepared", record),
        recorded_launches(run=False),
    ):
        results(function, tensors, options)
    assert len(recorded) >= 2
    return recorded


def others(value):
    """What may stand in the place of ``value``: other addresses, dtypes and sizes."""
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from ((*value[:index], other, *value[index + 1 :]) for other in others(part))
        yield None
    elif isinstance(value, torch.Tensor):
        for dtype in (value.dtype, torch.float16):
            yield from (torch.zeros(32, dtype=dtype)[offset:] for offset in (0, 1, 8, 16))
    elif isinstance(value, int):
        yield from (0, 1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**40)


def launched_by_triton(kernel, config, args, constants):
    """The kernel that Triton launches, and with what."""
    compiled = kernel.run(*args, grid=(5,), warmup=False, **constants, **config.options)
    return compiled, compiled.launched.pop()


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.usefixtures("on_gpu")
def test_the_same_kernel_is_given_the_same(op):
    for kernel, config, args, constants in launches_of(op):
        cases = [args]
        for index, value in enumerate(args):
            cases += [(*args[:index], other, *args[index + 1 :]) for other in others(value)]
        cases = [case for case in cases if case[0] is not None]  # it says which device to launch on
        random.Random(0).shuffle(cases)
        picked = set()
        for case in cases:
            compiled, launch = launched_by_triton(kernel, config, case, constants)
            triton_launch.launch(kernel, config, 5, *case, **constants)
            assert compiled.launched, "another kernel was launched"
            assert all(a is b or a == b for a, b in zip(compiled.launched.pop(), launch, strict=True))
            picked.add(compiled)
        assert 5 < len(picked) < len(cases)


@pytest.mark.usefixtures("on_gpu")
def test_other_constants_and_blocks_are_other_kernels():
    kernel, config, args, constants = launches_of("add_norm")[0]
    wider = triton_launch.Config({name: 2 * size for name, size in config.blocks.items()}, num_warps=8)
    cases = [(config, constants), (wider, constants), (config, constants | {"EPS": 0.5})]
    kernels = [triton_launch._prepared(kernel, c, args, k).kernel for c, k in cases * 2]
    assert kernels[:3] == kernels[3:]
    assert len(set(kernels)) == 3
    assert kernels == [launched_by_triton(kernel, c, args, k)[0] for c, k in cases * 2]


@pytest.mark.usefixtures("on_gpu")
def test_hooks_of_launches_are_called(monkeypatch):
    kernel, config, args, constants = launches_of("add_norm")[0]
    seen = []
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda *_: None)
    with mock.patch.object(Uncompiled, "launch_metadata", lambda self, *a: seen.append(self)):
        triton_launch.launch(kernel, config, 5, *args, **constants)
    assert seen == [triton_launch._prepared(kernel, config, args, constants).kernel]


@pytest.mark.parametrize("change", ["pre-run hook", "stages", "other GPU"])
@pytest.mark.usefixtures("on_gpu")
def test_triton_launches_itself_what_it_may_change(change, monkeypatch):
    kernel, config, args, constants = launches_of("add_norm")[0]
    assert triton_launch._prepared(kernel, config, args, constants) is not None
    if change == "pre-run hook":
        kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    elif change == "stages":
        hook = lambda *args: ("", "")  # noqa: E731
        monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", hook)
    else:
        triton_launch._backend.cache_clear()
        monkeypatch.setattr(Driver, "get_current_target", lambda self: GPUTarget("hip", "gfx942", 64))
    assert triton_launch._prepared(kernel, config, args, constants) is None

"""mlp's CUDA kernels without a GPU: how they are launched, with a stand-in for them, and what they refuse."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import KERNELS, converted, laid_out, random_cases
from op_cases import assert_policy, mlp_case, results

from vapt_fast import BackendUnavailableError, use_backend
from vapt_fast.ops import backend, device

DTYPES = [torch.bfloat16, torch.float16]


class Kernels:
    """The functions of vapt_fast._C on CPU tensors, in float32; they read and write by address and stride."""

    def __init__(self):
        self.launches = []

    def matrix(self, dtype, given, *shape):
        address, stride = given
        assert address % 16 == 0
        assert stride % 8 == 0
        assert stride >= shape[1]
        count = (shape[0] - 1) * stride + shape[1]
        memory = (ctypes.c_int16 * count).from_address(address)
        return torch.frombuffer(memory, dtype=torch.int16).view(dtype).as_strided(shape, (stride, 1))

    def mlp_forward(self, *, num_rows, depth, num_hidden, x, weight, bias, activated, hidden, **common):
        dtype, shape = self.called("forward", **common), (num_rows, num_hidden)
        if num_rows == 0:
            return
        h = self.matrix(dtype, x, num_rows, depth).float()
        h = h @ self.matrix(dtype, weight, num_hidden, depth).float().t()
        if bias:
            h += self.matrix(dtype, (bias, num_hidden), 1, num_hidden).float()
        self.matrix(dtype, (activated, num_hidden), *shape).copy_(torch.nn.functional.gelu(h))
        if hidden:
            self.matrix(dtype, (hidden, num_hidden), *shape).copy_(h)

    def mlp_backward(self, *, num_rows, depth, num_hidden, grad_y, weight, hidden, grad_hidden, **common):
        dtype, shape = self.called("backward", **common), (num_rows, num_hidden)
        if num_rows == 0:
            return
        grad = self.matrix(dtype, grad_y, num_rows, depth).float()
        grad = grad @ self.matrix(dtype, weight, depth, num_hidden).float()
        h = self.matrix(dtype, (hidden, num_hidden), *shape).float()
        grad = torch.ops.aten.gelu_backward(grad, h)
        self.matrix(dtype, (grad_hidden, num_hidden), *shape).copy_(grad)

    def called(self, name, *, dtype, stream):
        assert stream == 7
        self.launches.append(name)
        return getattr(torch, dtype)


@pytest.fixture
def kernels(monkeypatch):
    """A GPU that has them: this CPU. Memory that was not written holds NaN."""
    made = Kernels()
    monkeypatch.setitem(sys.modules, "vapt_fast._C", made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(device, "unsupported_reasons", lambda name, device: [])
    monkeypatch.setattr(device, "capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "unavailable_reasons", lambda name: [])
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    try:
        with use_backend("cuda"):
            yield made
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_that_of_eager_pytorch(kernels, dtype):
    """The cases of tests/gpu: none is left out there for its sizes."""
    sizes = [*KERNELS["mlp"].cuda_quick, *random_cases("mlp", 10, "cuda_sizes")]
    torch.manual_seed(0)
    assert_policy(mlp_case, (mlp_case(**each) for each in sizes), dtype)
    assert kernels.launches == ["forward", "backward"] * len(sizes)


@pytest.mark.parametrize("layout", ["transposed", "padded rows", "offset by one"])
def test_layouts_change_nothing(kernels, layout):
    function, tensors, options = converted("mlp", mlp_case(**KERNELS["mlp"].cuda_quick[0]), torch.bfloat16)
    expected = results(function, tensors, options)
    options = {name: laid_out(value, layout) for name, value in options.items()}
    tensors = [laid_out(t, layout) for t in tensors]
    actual = results(function, tensors, options, lay_out=lambda grad: laid_out(grad, layout))
    for ours, theirs in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("expanded", [True, False])
def test_rows_that_are_one_row_of_memory(kernels, expanded):
    """Their stride is 0, or, of a single row, anything."""
    function, (x,), options = converted("mlp", mlp_case(1, 3, 16, 24, 8), torch.bfloat16)
    x = x[:, :1].expand(-1, 3, -1) if expanded else x[:, :1].as_strided((1, 1, 16), (3, 3, 1))
    actual = results(function, [x], options, lay_out=lambda grad: grad[:, :1].expand_as(grad))
    expected = results(
        function, [x.clone()], options, lay_out=lambda grad: grad[:, :1].expand_as(grad).clone()
    )
    assert torch.equal(actual[0][0], expected[0][0])
    assert torch.equal(actual[1][0], expected[1][0])


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 0}], ids=str)
def test_of_nothing(kernels, sizes):
    function, tensors, options = converted("mlp", mlp_case(dim=16, out=24, **sizes), torch.bfloat16)
    (y,), (grad,) = results(function, tensors, options)
    assert y.shape[-1] == 24
    assert grad.shape == tensors[0].shape


def test_hidden_features_are_written_for_a_backward_alone(kernels, monkeypatch):
    seen, forward = [], kernels.mlp_forward
    monkeypatch.setattr(
        kernels, "mlp_forward", lambda **a: (seen.append(a["hidden"] != 0), forward(**a)), raising=False
    )
    function, (x,), options = converted("mlp", mlp_case(dim=16, out=24), torch.bfloat16)
    kept = function(x.requires_grad_(), **options)
    with torch.no_grad():
        assert torch.equal(function(x, **options), kept)
    assert seen == [True, False]


# ---- what is refused


@pytest.mark.parametrize(
    ("reason", "dtype", "sizes"),
    [
        ("x must be float16 or bfloat16, got torch.float32", torch.float32, {}),
        ("x must have 8, 16, 24, ... channels, got 20", torch.bfloat16, {"dim": 20}),
        ("fc1's output must have 8, 16, 24, ... channels, got 12", torch.bfloat16, {"hidden": 12}),
        ("fc2's output must have 8, 16, 24, ... channels, got 0", torch.bfloat16, {"out": 0}),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take(kernels, reason, dtype, sizes):
    case = converted("mlp", mlp_case(**{"dim": 16, "out": 16} | sizes), dtype)
    with pytest.raises(BackendUnavailableError, match=f"mlp can't run on backend 'cuda': {reason}$"):
        results(*case)


def test_it_needs_hopper_and_kernels_for_it(kernels, monkeypatch):
    case = converted("mlp", mlp_case(dim=16, out=16), torch.bfloat16)
    monkeypatch.setitem(sys.modules, "vapt_fast._C", SimpleNamespace())
    with pytest.raises(BackendUnavailableError, match="let VAPT_FAST_CUDA_ARCHS have 90a and install it"):
        results(*case)
    monkeypatch.setattr(device, "capability", lambda device: (10, 0))
    with pytest.raises(BackendUnavailableError, match=r"compute capability 9\.0, cpu has 10\.0$"):
        results(*case)


FORWARD = {"x": (64, 16), "weight": (64, 16), "bias": 0, "activated": 64, "hidden": 0}
BACKWARD = {"grad_y": (64, 16), "weight": (64, 8), "hidden": 64, "grad_hidden": 64}
SIZES = {"dtype": "bfloat16", "num_rows": 3, "depth": 16, "num_hidden": 8, "stream": 0}


@pytest.fixture
def native():
    missing = device.native_missing_reasons()
    if missing or not hasattr(device.native(), "mlp_forward"):
        pytest.skip("; ".join(missing) or "vapt_fast._C has no kernels for sm_90a")
    return device.native()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": "float32"}, ValueError, "dtype must be float16 or bfloat16, got float32"),
        ({"depth": 12}, ValueError, "depth and hidden must be positive multiples of 8"),
        ({"num_hidden": 0}, ValueError, "depth and hidden must be positive multiples of 8"),
        ({"num_rows": -1}, ValueError, "rows must not be negative"),
        ({"num_rows": 2**31}, NotImplementedError, "no size may exceed 2147483647"),
        ({"weight": None}, ValueError, "weight must not be null"),
        ({"weight": (8, 16)}, ValueError, "weight must begin at a multiple of 16 bytes"),
        ({"weight": (64, 4)}, ValueError, "rows of weight must not overlap"),
        ({"weight": (64, 20)}, ValueError, "begin at multiples of 16 bytes"),
        ({"weight": (64, 2**39)}, NotImplementedError, "the stride of weight's rows must be at most"),
        ({"hidden": 8}, ValueError, "hidden must begin at a multiple of 16 bytes"),
        ({"weight": 64}, TypeError, "weight has the wrong type"),
        ({"wait": 64}, TypeError, "an argument is unknown"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_what_contradicts_the_header(native, name, changes, error, message):
    arguments = SIZES | (FORWARD if name == "forward" else BACKWARD) | changes
    with pytest.raises(error, match=message):
        getattr(native, f"mlp_{name}")(**arguments)

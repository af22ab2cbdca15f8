"""How the kernels are launched, and what their sources must not have; the same for every op."""

import ast
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from interpreter import only_last_program
from kernel_cases import KERNELS
from op_cases import FROZEN
from shadow import no_overflow
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from vapt_fast.kernels import mlp

from vapt_fast import kernels
from vapt_fast.backends.triton import configs
from vapt_fast.backends.triton._launch import launch, num_blocks

SOURCES = sorted(Path(kernels.__file__).parent.glob("*.py"))


# ---- sources


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_kernels_use_no_atomics_and_one_axis(path):
    """Atomics add up in another order every time; the second and third axis end at 65,535."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert "atomic" not in node.attr
            assert node.attr != "num_programs"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "program_id":
            assert [argument.value for argument in node.args] == [0]


def in_64_bits(node):
    """Whether a node is a cast to 64-bit integers."""
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("to", "cast")
        and any(isinstance(argument, ast.Attribute) and argument.attr == "int64" for argument in node.args)
    )


def products_of_program_ids(node, inside=False):
    """Source of the products in which a program's number takes part before it is 64 bits wide."""
    if in_64_bits(node):
        return
    inside = node if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) else inside
    if inside and isinstance(node, ast.Attribute) and node.attr == "program_id":
        yield ast.unparse(inside)
    for child in ast.iter_child_nodes(node):
        yield from products_of_program_ids(child, inside)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_programs_are_multiplied_in_64_bits(path):
    assert not list(products_of_program_ids(ast.parse(path.read_text())))


def test_a_product_in_32_bits_is_found():
    wrong = "image = tl.program_id(0) // heads\nx += (tl.program_id(0) % heads + 1) * size"
    assert list(products_of_program_ids(ast.parse(wrong))) == ["(tl.program_id(0) % heads + 1) * size"]
    right = "x += tl.program_id(0).to(tl.int64) * size + tl.cast(tl.program_id(0), tl.int64) * size"
    assert not list(products_of_program_ids(ast.parse(right)))


# ---- launches


def expanded(op, batch, sizes, leaves=None, narrow=None):
    """The op, its tensors for ``batch`` images that are all the same, and its options.

    Args:
        op: one of KERNELS.
        batch: number of images.
        sizes: of one image, for the op's ``make``.
        leaves: positions of the tensors that require a gradient, None for all.
        narrow: positions of the tensors that are float16, as all is that is frozen, and the others are
            float32; None for float64.
    """
    made = []
    for images in (1, 2):
        torch.manual_seed(0)
        made.append(KERNELS[op].make(**sizes | {"batch": images}))
    (function, _, tensors, options), (_, _, twice, options_twice) = made

    def expand(one, two, position):
        if not isinstance(one, torch.Tensor):
            return one
        if narrow is not None:
            one = one.half() if position in (*narrow, *FROZEN) else one.float()
        one = one if one.shape == two.shape else one.expand(batch, *one.shape[1:])
        return one.requires_grad_(isinstance(position, int) and (leaves is None or position in leaves))

    tensors = [expand(one, two, i) for i, (one, two) in enumerate(zip(tensors, twice, strict=True))]
    options = {name: expand(value, options_twice[name], name) for name, value in options.items()}
    return function, tensors, options


def forward_and_backward(function, tensors, options):
    """Tuples of outputs and gradients, under incoming gradients of ones, the same memory for every image."""
    outputs = function(*tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ones = [output.new_ones(output.shape[1:]).expand(output.shape) for output in outputs]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return outputs, torch.autograd.grad(outputs, leaves, ones) if leaves else ()


@contextmanager
def recorded(record):
    """Calls ``record`` with the grid and the arguments of each launch, and launches nothing."""

    def run(kernel, *args, grid, warmup, **kwargs):
        record(grid, args)

    with mock.patch.object(InterpretedFunction, "run", run):
        yield


@pytest.mark.parametrize("op", KERNELS)
def test_grids_have_one_dimension(op):
    grids = []
    with recorded(lambda grid, args: grids.append(grid)):
        forward_and_backward(*expanded(op, 65_536, KERNELS[op].quick[0]))
    assert len(grids) >= 2
    assert all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in grids)


@pytest.mark.parametrize("op", KERNELS)
def test_launches_are_on_the_device_of_their_input(op):
    guards = []

    @contextmanager
    def device_of(tensor):
        guards.append(tensor.device)
        yield
        guards.pop()

    seen = []
    with (
        mock.patch.object(torch.cuda, "device_of", device_of),
        recorded(lambda grid, args: seen.append(list(guards))),
    ):
        forward_and_backward(*expanded(op, 2, KERNELS[op].quick[0]))
    assert len(seen) >= 2
    assert all(guarded == [torch.device("cpu")] for guarded in seen)


@pytest.mark.parametrize(
    ("op", "sizes", "narrow", "leaves"), [(op, *huge) for op in KERNELS for huge in KERNELS[op].huge], ids=str
)
def test_results_of_more_than_2_31_elements(op, sizes, narrow, leaves):
    """The last program of each launch finds its place, and no integer of 32 bits overflows on the way."""
    # As many as leave the last program of each launch the same rows: BLAS rounds each row in its own way.
    function, tensors, options = expanded(op, 64, sizes, leaves, narrow)
    width = max(tensor[0].numel() for tensor in tensors if tensor.shape[0] == 64)
    expected = forward_and_backward(function, tensors, options)
    function, tensors, options = expanded(op, 2**31 // width + 64, sizes, leaves, narrow)
    with no_overflow(), only_last_program():
        actual = forward_and_backward(function, tensors, options)
    assert any(tensor.numel() > 2**31 for tensor in actual[0] + actual[1])
    for ours, theirs in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert torch.equal(ours[-1], theirs[-1])


@pytest.mark.parametrize(("rows", "columns"), [(2**25 + 64, 64), (64, 2**25 + 64)])
def test_more_than_2_31_hidden_features(rows, columns):
    """The same for mlp, by its kernels alone: the op's other products would take all of the features."""
    x, weight, bias, grad = torch.randn(1, 3), torch.randn(1, 3), torch.randn(1), torch.randn(1, 3)
    activated, hidden, grad_hidden = (torch.empty(rows, columns, dtype=torch.float16) for _ in range(3))
    config = configs.mlp(torch.float32)
    programs = num_blocks(config, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
    sizes = (rows, columns, 3)
    with no_overflow(), only_last_program():
        # Every row of a matrix, and every element of the bias, is the same one.
        launch(mlp.activate, config, programs, activated, hidden, (x, 0), (weight, 0, 1), (bias, 0), *sizes)
        launch(mlp.grad_hidden, config, programs, grad_hidden, hidden, (grad, 0), (weight, 1, 0), *sizes)
    h = (x @ weight.t() + bias).squeeze()
    assert torch.allclose(hidden[-1, -1].float(), h, rtol=1e-3)
    assert torch.allclose(activated[-1, -1].float(), F.gelu(h), rtol=1e-3)
    slope = torch.func.grad(F.gelu)(h)
    assert torch.allclose(grad_hidden[-1, -1].float(), (grad @ weight.t()).squeeze() * slope, rtol=1e-2)


# ---- as ops of PyTorch


class Calls(TorchDispatchMode):
    """The calls of the library's own ops, as (op, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vapt_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", KERNELS)
def test_opcheck_at_two_sizes(op):
    """Every op that runs forward or backward: a fake with a fixed size would fail at the second."""
    for sizes in KERNELS[op].quick[:2]:
        torch.manual_seed(0)
        function, _, tensors, options = KERNELS[op].make(**sizes)
        with Calls() as recorder:
            forward_and_backward(function, [t.requires_grad_() for t in tensors], options)
        assert len({func for func, _ in recorder.calls}) >= 2
        for func, args in recorder.calls:
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", KERNELS)
def test_a_backward_is_given_no_zeros(op):
    """Autograd would write some in every step, for the statistics and hidden features that an op keeps."""
    aten, made = torch.ops.aten, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default):
                made.append(function)
            return function(*args, **({} if kwargs is None else kwargs))

    function, tensors, options = expanded(op, 2, KERNELS[op].quick[0])
    with recorded(lambda grid, args: None), Watch():
        forward_and_backward(function, tensors, options)
    assert not made

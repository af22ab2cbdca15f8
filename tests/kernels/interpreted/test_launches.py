"""How the kernels of every op are launched, and what PyTorch is told of them."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from interpreter import only_last_program, recorded_launches
from kernel_cases import KERNELS
from op_cases import FROZEN
from shadow import no_overflow
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction


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


@pytest.mark.parametrize("op", KERNELS)
def test_grids_have_one_dimension(op):
    """The second and third axis end at 65,535."""
    with recorded_launches(run=False) as launches:
        forward_and_backward(*expanded(op, 65_536, KERNELS[op].quick[0]))
    assert len(launches) >= 2
    assert all(len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31 for launch in launches)


@pytest.mark.parametrize(("current", "guarded"), [(0, [1]), (1, [])])
@pytest.mark.parametrize("op", KERNELS)
def test_launches_are_on_the_device_of_their_input(op, current, guarded):
    """Tensors say that they are on GPU 1."""
    guards = []

    @contextmanager
    def device(index):
        guards.append(index)
        yield
        guards.pop()

    seen = []

    def run(kernel, *args, grid, warmup, **kwargs):
        seen.append(list(guards))

    with (
        mock.patch.object(torch.Tensor, "get_device", return_value=1),
        mock.patch.object(torch.cuda, "current_device", return_value=current),
        mock.patch.object(torch.cuda, "device", device),
        mock.patch.object(InterpretedFunction, "run", run),
    ):
        forward_and_backward(*expanded(op, 2, KERNELS[op].quick[0]))
    assert len(seen) >= 2
    assert all(found == guarded for found in seen)


@pytest.mark.full
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


# ---- what is launched


# Of each op with several backward kernels, tensors that learn while the others do not.
FEW = [
    ("prompt_pool", (0,)),
    ("prompt_pool", (1,)),
    ("prompt_projector", (0, 1)),
    ("prompt_attention", (3, 4)),
    ("prompt_attention_packed", (1,)),
    ("absorbed_attention", (2,)),
]


@pytest.mark.parametrize(("op", "learns"), FEW)
def test_nothing_is_launched_for_what_needs_no_gradient(op, learns):
    counts = []
    for leaves in ((), learns, None):
        with recorded_launches(run=False) as launches:
            forward_and_backward(*expanded(op, 2, KERNELS[op].quick[0], leaves))
        counts.append(len(launches))
    none, few, every = counts
    assert 0 < none < few < every


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
    with recorded_launches(run=False), Watch():
        forward_and_backward(function, tensors, options)
    assert not made

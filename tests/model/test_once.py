"""A question about a module is asked again when its answer may be another one, and keeps nothing alive."""

import gc
import weakref

import pytest
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from vapt_fast.backbones.blocks import standard_block
from vapt_fast.modules import Once


def make():
    return Block(8, 2, qk_norm=True, init_values=0.1, proj_drop=0.1, drop_path=0.1).eval()


class Quantised(nn.Parameter):
    """A weight of an unknown class."""


def patch_class(block):
    own = Mlp.forward
    Mlp.forward = lambda self, x: own(self, x)
    return lambda: setattr(Mlp, "forward", own)


def swap_names(block):
    block.norm1, block.norm2 = block.norm2, block.norm1


def rename_last(block):
    block.other = block._modules.pop("drop_path2")


CHANGES = {
    "hook": lambda b: b.attn.proj.register_forward_hook(lambda *_: None).remove,
    "pre-hook": lambda b: b.mlp.fc1.register_forward_pre_hook(lambda *_: None).remove,
    "backward hook": lambda b: b.ls1.register_full_backward_hook(lambda *_: None).remove,
    "backward pre-hook": lambda b: b.register_full_backward_pre_hook(lambda *_: None).remove,
    "forward": lambda b: setattr(b.norm1, "forward", lambda x: x),
    "forward of a class": patch_class,
    "class": lambda b: setattr(b.mlp.fc1, "__class__", type("Linear", (nn.Linear,), {})),
    "module": lambda b: setattr(b.mlp, "act", nn.ReLU()),
    "one of the same class": lambda b: setattr(b.attn, "proj", nn.Linear(8, 8)),
    "deep module": lambda b: setattr(b.attn.proj, "lora", nn.Linear(8, 8)),
    "no module": lambda b: setattr(b.mlp, "act", None),
    "names": swap_names,
    "a name": rename_last,
    "no parameter": lambda b: setattr(b.attn.proj, "bias", None),
    "class of a parameter": lambda b: setattr(b.attn.qkv, "weight", Quantised(b.attn.qkv.weight.detach())),
    "training": lambda b: b.train() and None,
    "training of a part": lambda b: b.mlp.drop1.train() and None,
}


@pytest.fixture
def asked():
    """A question, and how often it was asked."""
    calls = []
    return Once(lambda module: calls.append(module.training)), calls


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_asked_again_after(change, asked):
    ask, calls = asked
    block = make()
    for _ in range(3):
        ask(block)
    assert len(calls) == 1
    undo = CHANGES[change](block)
    try:
        ask(block)
        assert len(calls) == 2
    finally:
        if undo is not None:
            undo()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("change", ["hooks", "scripted"])
def test_it_is_always_asked_of_modules_with(change, asked):
    ask, calls = asked
    block = make()
    if change == "hooks":
        block.mlp.fc1.register_forward_hook(lambda *_: None)
    else:
        block.mlp.fc1 = torch.jit.script(nn.Linear(8, 32))
    ask(block), ask(block)
    assert len(calls) == 2


@pytest.mark.parametrize(("part", "rate"), [("mlp.drop1", "p"), ("drop_path1", "drop_prob")])
def test_rates_of_dropouts_that_are_on(part, rate, asked):
    ask, calls = asked
    block = make().train()
    ask(block), ask(block)
    setattr(block.get_submodule(part), rate, 0.5)
    ask(block), ask(block)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["data", "in place", "requires_grad", "another parameter"])
def test_values_are_of_no_interest(change, asked):
    """They are read in every call."""
    ask, calls = asked
    block = make()
    ask(block)
    weight = block.mlp.fc1.weight
    if change == "data":
        weight.data = torch.zeros(32, 8)
    elif change == "in place":
        weight.data.zero_()
    elif change == "requires_grad":
        weight.requires_grad_(False)
    else:
        block.mlp.fc1.weight = nn.Parameter(torch.zeros(32, 8))
    ask(block)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("part", "attribute", "value"),
    [
        ("attn", "num_heads", 4),
        ("attn", "head_dim", 2),
        ("attn", "gate", nn.Identity()),
        ("mlp.act", "approximate", "tanh"),
    ],
)
def test_attributes_that_decide_how_a_block_runs(part, attribute, value):
    block = make()
    before = standard_block(block), standard_block(block)
    assert before[0].gelu_mlp is not None
    setattr(block.get_submodule(part), attribute, value)
    after = standard_block(block)
    assert after is None or after.gelu_mlp is None


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("part", ["attn", "mlp", "mlp.act", "attn.proj"])
def test_a_scripted_part_is_called(part):
    block = make()
    assert standard_block(block) is not None
    block.set_submodule(part, torch.jit.script(nn.Linear(8, 8)))
    assert standard_block(block) is standard_block(block) is None


def test_what_is_replaced_is_freed(asked):
    ask, _ = asked
    block = make()
    ask(block)
    gone = [weakref.ref(block.mlp), weakref.ref(block.attn.qkv.weight)]
    block.mlp, block.attn.qkv.weight = nn.Identity(), nn.Parameter(torch.zeros(24, 8))
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


def test_parameters_can_still_be_swapped(asked):
    ask, calls = asked
    block = make()
    ask(block)
    torch.utils.swap_tensors(block.mlp.fc1.weight, Quantised(torch.zeros(32, 8)))
    ask(block)
    assert len(calls) == 2

"""Kinds of prompts: those of the package beyond VAPT and VPT, and a user's own."""

import copy
import math
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import Scaled, assert_alike, assert_same, bare, run, tiny_backbone, tiny_images, tiny_model
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import random_unstructured

from vapt_fast import AdaptiveViT, PromptConfig, from_official, to_official
from vapt_fast.config import KINDS
from vapt_fast.info import forward_report
from vapt_fast.prompts import BlockPrompts, Geometry, register_kind
from vapt_fast.prompts.base import draw_mask
from vapt_fast.training.methods import METHODS, build_model

VIT = "vit_base_patch16_224"
DROP = {"prompt_dropout": 0.25}
ADDED = {"add_table": True, **DROP}

CONFIGS = {
    "fourier": {"kind": "fourier", **DROP},
    "fourier in part": {"kind": "fourier", "num_prompts": 4, "fourier_share": 0.5, "fourier_dims": "channel"},
    "kv": {"kind": "kv", **DROP},
    "added table": {**ADDED},
    "by block": {"num_prompts": (2, 0, 3)},
    "adaptive by block": {"num_prompts": (3, 4, 3), "static_depth": 0, "conv_shared": False},
    "none at first": {"kind": "kv", "num_prompts": (0, 2, 0)},
    "mine": {"kind": "mine", "kind_options": {"gain": 0.5}},
}


def make_config(name):
    return PromptConfig(**{"num_prompts": 3, "projector_dim": 4, **CONFIGS[name]})


@pytest.fixture(params=CONFIGS)
def config(request):
    return make_config(request.param)


@dataclass(frozen=True)
class Gain:
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.gain <= 0:
            raise ValueError(f"gain must be positive, got {self.gain}")


class Mine(BlockPrompts):
    """A table, a few dropped entries, and the mean patch through a projection of all blocks."""

    Options = Gain
    token_table = "table"

    def __init__(self, config, num_prompts, geometry):
        super().__init__(config, num_prompts, geometry)
        self.table = nn.Parameter(torch.randn(num_prompts, geometry.dim))

    @classmethod
    def make_shared(cls, config, geometry):
        return {"mixer": nn.Linear(geometry.dim, geometry.dim)}

    def draw_masks(self, batch, **options):
        return draw_mask(self, 0.25, batch, *self.table.shape, **options)

    def forward(self, patches, masks=None, *, mixer):
        table = self.table if masks is None else self.table * masks
        return self.options.gain * table + mixer(patches.mean(dim=1, keepdim=True).to(self.table.dtype))


@pytest.fixture(scope="module", autouse=True)
def _mine():
    register_kind("mine", title="Mine")(Mine)
    yield
    del KINDS["mine"]
    METHODS.pop("mine", None)


# ---- against the definitions


def assert_equal(model, actual, expected):
    """Two outputs agree, and their gradients in every parameter of the prompts."""
    parameters = dict(model.prompts.named_parameters())
    results = []
    for logits in (actual, expected):
        gradients = torch.autograd.grad(logits.square().sum(), parameters.values(), retain_graph=True)
        results.append({"logits": logits.detach(), **dict(zip(parameters, gradients, strict=True))})
    assert_same(*results)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (VIT, {}),
        (VIT, {"global_pool": "avg"}),
        ("vit_base_patch16_224", {"qk_norm": True}),
        ("vit_base_patch14_reg4_dinov2", {}),
        ("eva02_base_patch14_224", {}),  # rotary positions
        ("eva02_tiny_patch14_224", {}),  # a bias of its own
        ("beit_base_patch16_224", {}),  # relative positions
        ("naflexvit_base_patch16_map", {}),
        ("vit_small_patch16_sapiens2", {}),
    ],
)
def test_kv_adds_keys_and_values_to_timms_own_attention(name, options, backend, monkeypatch):
    if name.endswith("sapiens2"):
        name = timm.list_models("vit_*_sapiens2")[0]  # grouped heads
    model = tiny_model(name, prompts=PromptConfig(kind="kv", num_prompts=3), **options)
    images, blocks = tiny_images(model), iter(model.prompts.blocks)
    model.backend = backend
    actual = model(images)
    attention = F.scaled_dot_product_attention

    def with_prompts(q, k, v, attn_mask=None, **others):
        if k.shape[2] != q.shape[2]:
            return attention(q, k, v, attn_mask=attn_mask, **others)  # the pooling of a map
        block, head_dim = next(blocks), k.shape[-1]
        for_head = []
        for tokens, new in ((k, block.keys), (v, block.values)):
            heads = new.unflatten(1, (-1, head_dim)).transpose(0, 1)
            heads = heads.repeat_interleave(k.shape[1] // heads.shape[0], 0).expand(len(k), -1, -1, -1)
            for_head.append(torch.cat([tokens, heads], dim=2))
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, 3))
        return attention(q, *for_head, attn_mask=attn_mask, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", with_prompts)
    assert_equal(model, actual, bare(model)(images))
    assert next(blocks, None) is None


@pytest.mark.parametrize("dims", ["all", "sequence", "channel"])
@pytest.mark.parametrize(("share", "count"), [(1.0, 4), (0.5, 2), (0.0, 0)])
def test_fourier_is_the_sum_over_waves(dims, share, count):
    config = PromptConfig(kind="fourier", num_prompts=4, fourier_share=share, fourier_dims=dims)
    model = tiny_model(VIT, prompts=config)
    table = model.prompts.blocks[1].table.detach()
    expected = table.clone()
    for p in range(count):
        for c in range(32):
            rows = range(count) if dims != "channel" else [p]
            columns = range(32) if dims != "sequence" else [c]
            expected[p, c] = sum(
                table[m, n]
                * math.cos(
                    2 * math.pi * ((dims != "channel") * p * m / count + (dims != "sequence") * c * n / 32)
                )
                for m in rows
                for n in columns
            )
    actual = model.prompts.compute(1, torch.zeros(2, 6, 32, dtype=torch.float64))
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-10)


def test_an_added_table_is_added():
    config = PromptConfig(num_prompts=3, **ADDED)
    model = tiny_model(VIT, prompts=config).train()
    block, patches = model.prompts.blocks[1], torch.randn(2, 6, 32, dtype=torch.float64)
    masks = block.draw_masks(2, dtype=torch.float64)
    with_table = model.prompts.compute(1, patches, masks)
    table, block.table = block.table, None
    torch.testing.assert_close(with_table - model.prompts.compute(1, patches, masks), table * masks.table)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_numbers_by_block_place_that_many_tokens(backend):
    model = tiny_model(VIT, prompts=PromptConfig(kind="deep", num_prompts=[2, 0, 3]))
    images = tiny_images(model)
    model.backend = backend
    plain = bare(model)
    for block, prompts in zip(plain.blocks, model.prompts.blocks, strict=True):
        table = getattr(prompts, "table", torch.zeros(0, 32))

        def insert(module, args, table=table):
            (x,) = args
            return torch.cat([x[:, :1], table.to(x).expand(len(x), -1, -1), x[:, 1:]], dim=1)

        def remove(module, args, x, table=table):
            return torch.cat([x[:, :1], x[:, 1 + len(table) :]], dim=1)

        block.register_forward_pre_hook(insert)
        block.register_forward_hook(remove)
    assert_equal(model, model(images), plain(images))


# ---- everything that a model does


@pytest.mark.parametrize("name", [VIT, "eva02_base_patch14_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}], ids=["one row", "all rows"])
def test_the_rewritten_pass_is_the_literal_one(config, name, options):
    model = tiny_model(name, prompts=config, **options).train()
    images = tiny_images(model)
    assert_same(run(model, images), run(model, images, "reference"))


@pytest.mark.parametrize("pool_prompts", [False, True])
def test_blocks_that_are_called_as_they_are(config, pool_prompts):
    if config.kind == "kv":
        return  # it refuses them, see below
    config = replace(config, pool_prompts=pool_prompts)
    model = tiny_model("vit_base_patch16_18x2_224", prompts=config, global_pool="avg").train()
    model.backbone.blocks[1].register_forward_hook(lambda module, args, output: 0.9 * output)
    images = tiny_images(model)
    assert_same(run(model, images), run(model, images, "reference"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_checkpointing_changes_nothing(config, backend):
    model = tiny_model(VIT, prompts=config).train()
    images = tiny_images(model)
    expected = run(model, images, backend)
    model.set_grad_checkpointing()
    assert_same(run(model, images, backend), expected)


def test_autocast_and_low_precision(config):
    model = tiny_model(VIT, prompts=config).float()
    images = tiny_images(model)
    exact = run(model, images)["logits"]
    allowance = 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    low = copy.deepcopy(model).bfloat16()
    for chosen, inputs, autocast in ((model, images, True), (low, images.bfloat16(), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fast, literal = (run(chosen, inputs, backend) for backend in ("torch", "reference"))
        error, literal_error = ((result["logits"] - exact).abs().max() for result in (fast, literal))
        assert error <= 2 * literal_error + allowance
        assert all(gradient.isfinite().all() for gradient in fast.values())


def test_learns_and_comes_back_from_its_files(config, tmp_path):
    backbone = tiny_backbone(VIT).float()
    model = AdaptiveViT(backbone, prompts=config)
    images = tiny_images(model)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(images), torch.tensor([0, 1])))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())
    expected = model.eval()(images)
    model.save_adapter(tmp_path)
    loaded = AdaptiveViT.from_adapter(tmp_path, backbone=backbone)
    assert loaded.config == config
    again = AdaptiveViT(backbone, prompts=config).eval()
    again.load_state_dict(model.state_dict())
    for same in (loaded, again, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(same(images), expected)


def test_another_size_and_fewer_blocks(config, tmp_path):
    model = tiny_model(VIT, prompts=config)
    model.set_input_size((48, 64))
    images = tiny_images(model)
    assert_same(run(model, images), run(model, images, "reference"))
    model.prune_intermediate_layers([1], prune_head=False)
    assert_alike(run(model, images), run(model, images, "reference"))
    model.save_adapter(tmp_path)
    loaded = AdaptiveViT.from_adapter(tmp_path, backbone=copy.deepcopy(bare(model)))
    assert loaded.config == model.config


def test_groups_of_parameters_by_depth(config):
    model = tiny_model(VIT, prompts=config)
    groups = timm.models._manipulate.group_with_matcher(
        model.named_parameters(), model.group_matcher(), reverse=True
    )
    names = [name for name, _ in model.named_parameters() if ".prompts." in name]
    assert names
    assert all(name in groups for name in names)


# ---- a kind of one's own


def test_own_kind_is_known_everywhere():
    model = tiny_model(VIT, prompts=PromptConfig(num_prompts=2, **CONFIGS["mine"]))
    assert all(block.options == Gain(0.5) for block in model.prompts.blocks)
    assert "rewritten" in forward_report(model)
    assert timm.create_model("vapt_test_vit", kind="mine", kind_options={"gain": 2.0}).config.kind == "mine"
    assert build_model("mine", "test_vit", 2, pretrained=False).config.kind == "mine"
    assert METHODS["mine"].title == "Mine"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "mine", "kind_options": {"gain": 0}}, ValueError, "gain must be positive, got 0"),
        ({"kind": "mine", "kind_options": {"loss": 0}}, TypeError, "unexpected keyword argument 'loss'"),
        (
            {"kind": "mine", "kind_options": 3},
            TypeError,
            "kind_options must be a mapping from names to values",
        ),
        ({"kind_options": {"gain": 1}}, TypeError, "kind_options must be empty for kind 'adaptive'"),
        ({"kind": "yours"}, ValueError, "got 'yours'; register a kind of your own first"),
        ({"kind": "kv", "pool_prompts": True}, ValueError, "pool_prompts must be False for kind 'kv'"),
        ({"fourier_share": 1.5}, ValueError, r"fourier_share must be in \[0, 1\], got 1.5"),
        ({"fourier_dims": "prompts"}, ValueError, "fourier_dims must be one of .*, got 'prompts'"),
        ({"num_prompts": [1, -1]}, ValueError, r"num_prompts\[1\] must be at least 0, got -1"),
        ({"num_prompts": [1, 2.0]}, TypeError, r"num_prompts\[1\] must be an int, got 2.0"),
        ({"num_prompts": "10"}, TypeError, "expected an int, or a sequence with one int a block"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        PromptConfig(**options)


def test_the_example_in_contributing():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    example = text.partition("## How to add a prompt kind")[2].split("```")[1].removeprefix("python")
    exec(example, {"__name__": __name__})
    try:
        model = tiny_model(VIT, prompts=PromptConfig(kind="mean", num_prompts=2))
        images = tiny_images(model)
        assert_same(run(model, images), run(model, images, "reference"))
    finally:
        del KINDS["mean"]


def test_bad_kinds():
    with pytest.raises(TypeError, match="a kind must be a subclass of BlockPrompts, got <class 'int'>"):
        register_kind("number")(int)
    with pytest.raises(ValueError, match=r"kind 'deep' is vapt_fast.*StaticPrompts; choose another name"):
        register_kind("deep")(Mine)
    with pytest.raises(NotImplementedError, match=r"Empty must define forward\(\)"):
        type("Empty", (BlockPrompts,), {})(PromptConfig(), 1, Geometry(4, 1, (1, 1), (1, 1)))(
            torch.zeros(1, 1, 4)
        )


# ---- numbers by block, backbones and formats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_prompts": [1, 2]},
            "num_prompts must have one number for each of the backbone's 3 blocks, got 2",
        ),
        ({"kind": "shallow", "num_prompts": [1, 2, 0]}, "num_prompts must be an int, or 0 after block 0"),
    ],
)
def test_numbers_that_do_not_suit(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveViT(tiny_backbone(VIT), **options)


def test_numbers_by_block_that_are_equal_are_one_number():
    images, results = None, []
    for number in (3, [3, 3, 3]):
        model = tiny_model(VIT, prompts=PromptConfig(num_prompts=number, projector_dim=4))
        images = tiny_images(model) if images is None else images
        results.append(run(model, images))
    assert_same(*results, 0)


def test_kv_refuses_blocks_that_it_can_not_take_apart():
    backbone = tiny_backbone("vit_base_patch16_18x2_224")  # parallel
    with pytest.raises(
        NotImplementedError, match=r"it is a ParallelThingsBlock.*use another kind of prompts"
    ):
        AdaptiveViT(backbone, kind="kv")
    model = tiny_model(VIT, prompts=PromptConfig(kind="kv", num_prompts=2))
    model.backbone.blocks[1].attn.register_forward_hook(lambda module, args, output: output * 2)
    for backend in ("torch", "reference"):
        with pytest.raises(NotImplementedError, match="attn has hooks"):
            run(model, tiny_images(model), backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kv"}, "blocks.0.keys: has no public name"),
        ({"kind": "fourier"}, "blocks.0.table: has no public name"),
        ({"kind": "mine"}, "prompts.mixer.weight: has no public name"),
        ({"add_table": True}, "blocks.1.table: has no public name"),
        ({"num_prompts": [1, 0, 1]}, r"prompts.num_prompts: \(1, 0, 1\), expected one number for all blocks"),
    ],
)
def test_no_form_in_the_public_implementation(options, message):
    norm = {"norm_layer": lambda dim, **kw: nn.LayerNorm(dim, eps=1e-6, **kw)}
    state = to_official(AdaptiveViT(tiny_backbone(VIT, **norm), num_prompts=1))
    with pytest.raises(ValueError, match=message):
        to_official(AdaptiveViT(tiny_backbone(VIT, **norm), **options))
    with pytest.raises(ValueError, match=message):
        from_official(state, num_heads=2, prompts=PromptConfig(**options), img_size=(32, 48))


# ---- tables from data


def of_two_colours(model, number=6):
    """Images of two sorts, whose tokens are two clusters."""
    sorts = torch.arange(number).remainder(2).double().view(-1, 1, 1, 1)
    _, channels, height, width = 1, *model.pretrained_cfg["input_size"]
    return (2 * sorts - 1) * torch.ones(number, channels, height, width, dtype=torch.float64)


def tables(model):
    return {n: p.detach().clone() for n, p in model.prompts.named_parameters() if n.endswith("table")}


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "deep"},
        {"kind": "shallow"},
        {"static_depth": 2},
        {"add_table": True},
        {"kind": "deep", "num_prompts": (1, 0, 2)},
        {"kind": "mine"},
    ],
    ids=str,
)
def test_tables_become_centres_of_the_tokens(options):
    model = tiny_model(VIT, prompts=PromptConfig(**{"num_prompts": 2, **options}))
    model.backbone.pos_embed.data.zero_()  # so that the patches of an image are alike
    images, before = of_two_colours(model), tables(model)
    model.train().prompts.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    model.init_from_data([(images[:2], "label"), (images[2:], "label")])
    assert [module.training for module in model.modules()] == modes
    found = tables(model)
    tokens = bare(model).forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    tokens = [bare(model)._pos_embed(model.backbone.patch_embed(images))[:, 1:], *tokens]
    for name, table in found.items():
        assert not torch.equal(table, before[name])
        points = tokens[int(name.split(".")[1])].detach()
        if len(table) == 1:
            assert torch.cdist(table, points.flatten(0, 1)).min() < torch.cdist(points[0], points[1]).max()
        else:  # one centre for each sort of images
            nearest = torch.cdist(points.flatten(0, 1), table)
            assert (nearest.min(dim=0).values < 1e-9).all()
    model.init_from_data([images])
    again = tables(model)
    model.init_from_data([images])
    assert_same(tables(model), again, 0)


def test_data_that_give_no_tables():
    model = tiny_model(VIT, prompts=PromptConfig(kind="deep", num_prompts=20))
    images = tiny_images(model)
    before = tables(model)
    for loader, error, message in (
        ([], ValueError, "loader must give at least one image"),
        ([images[:0]], ValueError, "loader must give at least one image"),
        (["path"], TypeError, "loader must give tensors of images, .* got str"),
        ([images[:, :, :5]], ValueError, "images must be 32x48 pixels"),
        ([images], ValueError, "at least 20 tokens, one a prompt, got 12"),
        ([images.repeat(2, 1, 1, 1) * math.nan], ValueError, "tokens are finite"),
    ):
        with pytest.raises(error, match=message):
            model.init_from_data(loader)
    assert_same(tables(model), before, 0)
    with pytest.raises(ValueError, match="kind 'kv' with these options has no tables of prompt tokens"):
        tiny_model(VIT, prompts=PromptConfig(kind="kv")).init_from_data([images])
    with pytest.raises(ValueError, match="num_images must be at least 1"):
        model.init_from_data([images], num_images=0)


@pytest.mark.parametrize(
    "compute",
    [
        lambda block: register_parametrization(block, "table", Scaled()),
        lambda block: random_unstructured(block, "table", amount=0.5),
    ],
    ids=["parametrised", "pruned"],
)
def test_tables_that_are_computed_are_not_given_data_in_vain(compute):
    model = tiny_model(VIT, prompts=PromptConfig(kind="deep", num_prompts=2))
    compute(model.prompts.blocks[1])
    with pytest.raises(ValueError, match=r"tables of blocks \[1\] must be parameters"):
        model.init_from_data([tiny_images(model)])


def test_no_more_images_are_taken_than_asked_for():
    model = tiny_model(VIT, prompts=PromptConfig(kind="deep", num_prompts=2))
    images = tiny_images(model, batch=6)
    taken = []
    model.init_from_data((taken.append(i) or images for i in range(5)), num_images=8)
    assert taken == [0, 1]

"""A batch in which each image has an adapter of its own: the same as each image by itself."""

import copy
import itertools

import pytest
import torch
from copies import Copies
from several import BASE, OTHERS, STACKABLE, mixed_batch, one_by_one, outcome, places, several
from tiny import assert_same, tiny_images
from torch._subclasses.fake_tensor import FakeTensorMode

from vapt_fast import use_backend
from vapt_fast.adapters import MissingHead, mixing
from vapt_fast.ops.base import OPS
from vapt_fast.prompts import KeysValues

FAMILIES = [
    "vit_small_patch14_reg4_dinov2",  # layer scale and registers
    "deit_tiny_distilled_patch16_224",  # two heads
    "eva02_tiny_patch14_224",  # rotation, no bias of the keys
    "beit_base_patch16_224",  # a bias of the scores
    "vit_base_patch16_siglip_224",  # attention pooling
]


def check(model, images, names, backend):
    expected = outcome(model, lambda: one_by_one(model, images, names))
    with use_backend(backend):
        assert_same(outcome(model, lambda: model(images, adapter_names=names)), expected)
        assert_same(outcome(model, lambda: model(images, adapter_names=places(model, names))), expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_kind_in_one_batch(backend):
    model = several(adapters=STACKABLE | OTHERS)
    check(model, *mixed_batch(model), backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_64_images_with_64_adapters(backend):
    kinds = list(STACKABLE.values())
    model = several(adapters={"default": kinds[0]} | {f"a{i}": kinds[i % len(kinds)] for i in range(63)})
    names = list(model.adapters)
    check(model, tiny_images(model, batch=64), names, backend)


@pytest.mark.parametrize(
    "names", [("default", "more"), ("deep", "fourier"), ("kv", "kv2"), ("more", "softmax")]
)
def test_adapters_of_one_kind(names):
    """So that some blocks have only tables, only keys and values, or only pooled prompts."""
    model = several(adapters={name: STACKABLE[name.rstrip("2")] for name in names})
    check(model, *mixed_batch(model), "torch")


def test_a_norm_with_an_eps_of_its_own():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more")})
    model.adapters["more"].prompts.blocks[2].norm.eps = 0.1
    check(model, *mixed_batch(model), "torch")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.full
def test_families(name):
    model = several(name, {name: STACKABLE[name] for name in ("default", "more", "kv", "none")})
    check(model, *mixed_batch(model), "torch")


def test_tokens():
    model = several(adapters=STACKABLE | OTHERS)
    images, names = mixed_batch(model)
    rows = []
    for image, name in zip(images, names, strict=True):
        if name == BASE:
            with model.disable_adapter():
                rows.append(model.forward_features(image[None]))
        else:
            model.set_adapter(name)
            rows.append(model.forward_features(image[None]))
    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert_same(
                {"tokens": model.forward_features(images, names).detach()},
                {"tokens": torch.cat(rows).detach()},
            )


def test_dropouts_are_the_same_for_every_backend():
    model = several(adapters=STACKABLE | OTHERS).train()
    images, names = mixed_batch(model)
    names = [name for name in names if name != "shallow"]
    images = images[: len(names)]
    outcomes = {}
    for backend in ("torch", "reference"):
        torch.manual_seed(0)
        with use_backend(backend):
            outcomes[backend] = outcome(model, lambda: model(images, adapter_names=names))
    assert_same(outcomes["torch"], outcomes["reference"])
    still = outcome(model.eval(), lambda: model(images, adapter_names=names))
    assert (still["logits"] - outcomes["torch"]["logits"]).abs().amax(1).count_nonzero() >= 7


def test_a_frozen_adapter_drops_nothing_in_eval_mode():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "sum")}).train()
    images, names = mixed_batch(model)
    model.adapters["more"].eval()
    own = [i for i, name in enumerate(names) if name == "more"]
    first, second = (model(images, adapter_names=names) for _ in range(2))
    assert first[own].equal(second[own])
    assert not first.equal(second)


def test_only_what_was_used_gets_a_gradient():
    model = several()
    images, _ = mixed_batch(model, 4)
    model(images, adapter_names=["deep", "sum", "deep", "sum"]).nan_to_num(neginf=0).sum().backward()
    used = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert used == {"deep", "sum"}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("others", [{}, OTHERS], ids=["rows", "others"])
def test_integers_of_some_adapters(others, backend):
    """There are columns for all adapters, and gradients for those in use, whichever way they are computed."""
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep")} | others)
    images = tiny_images(model)
    for names in (["default", "deep"], ["deep", "deep"]):
        model.zero_grad()
        with use_backend(backend):
            logits = model(images, adapter_names=places(model, names))
            expected = model(images, adapter_names=names)
        assert logits.shape == (2, 7)
        torch.testing.assert_close(logits[:, : expected.shape[1]], expected, rtol=0, atol=1e-9)
        assert logits[:, expected.shape[1] :].isneginf().all()
        logits.nan_to_num(neginf=0).sum().backward()
        used = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
        assert used == set(names)


def test_an_adapter_with_no_numbers_left_spoils_no_other():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep", "kv")})
    images, names = mixed_batch(model)
    expected = model(images, adapter_names=names)
    with torch.no_grad():
        for parameter in model.adapters["more"].parameters():
            parameter.fill_(torch.nan)
    own = [i for i, name in enumerate(names) if name != "more"]
    got = model(images, adapter_names=names)
    assert got[own].equal(expected[own])
    got[own][got[own].isfinite()].sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and ".more." not in name:
            assert parameter.grad.isfinite().all(), name


def test_one_call_of_each_op_however_many_adapters(monkeypatch):
    """No loop over adapters."""
    calls, op = [], type(OPS["prompt_pool"])
    compute = op.compute
    monkeypatch.setattr(op, "compute", lambda self, args: calls.append(len(args.x)) or compute(self, args))
    for number in (2, 8):
        model = several(adapters={f"a{i}": STACKABLE["default"] for i in range(number)})
        with use_backend("torch"), torch.no_grad():
            model(tiny_images(model, batch=8), adapter_names=[f"a{i % number}" for i in range(8)])
    assert calls == [8] * 4  # two blocks pool


def test_a_head_that_is_more_than_a_linear():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep")})
    model.adapters["more"].head = torch.nn.Sequential(torch.nn.Tanh(), model.adapters["more"].head)
    check(model, *mixed_batch(model), "torch")


@pytest.mark.parametrize("classes", [(9,), (5,), (9, 8), (8, 9)])
def test_heads_that_were_replaced(classes):
    backbone = "vit_tiny_patch16_224" if len(classes) == 1 else "deit_tiny_distilled_patch16_224"
    model = several(backbone, {name: STACKABLE[name] for name in ("default", "more", "deep")})
    model.set_adapter("more")
    for name, number in zip(model._adapter.head_names, classes, strict=True):
        setattr(model, name, torch.nn.Linear(32, number).double())
    assert model.num_classes == classes[0]
    images, names = mixed_batch(model)
    if len(classes) == 1:
        check(model, images, names, "torch")
        assert model.class_counts(["more"]) == [*classes]
        model.head = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(32, 2)).double()
        assert model.class_counts(["more"]) == [2]
        model.head = torch.nn.Sequential(model.head, torch.nn.Tanh())
        with pytest.raises(ValueError, match="must tell its number of classes, got a Sequential"):
            model.class_counts(["more"])
        model.head.out_features = 2
        assert model.class_counts(["more"]) == [2]
    else:  # as in a single call
        with pytest.raises(RuntimeError, match="size"):
            model(images, adapter_names=names)


def double(module, args, out):
    if isinstance(out, KeysValues):
        return KeysValues(2 * out.keys, 2 * out.values)
    return tuple(2 * x for x in out) if isinstance(out, tuple) else 2 * out


@pytest.mark.parametrize(
    "path",
    [
        *("more", "more.prompts", "more.prompts.projector", "more.head", "deep", "deep.prompts.blocks.0"),
        *("kv.prompts", "kv.prompts.blocks.1", "none.prompts", "depthwise.prompts.blocks.1.norm"),
    ],
)
def test_hooks_are_run(path):
    model = several(adapters={name: STACKABLE[name] for name in ("default", path.split(".")[0], "fourier")})
    images, names = mixed_batch(model)
    before = model(images, adapter_names=names)
    model.adapters.get_submodule(path).register_forward_hook(double)
    check(model, images, names, "torch")
    assert not model(images, adapter_names=names).equal(before)


def test_integers_for_a_backbone_without_classifier_of_its_own():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep")})
    model.find_adapter(BASE).set_heads({"head": MissingHead()}, 0)
    images, names = tiny_images(model, batch=4), ["deep", "more", "deep", "default"]
    check(model, images, names, "torch")
    with pytest.raises(ValueError, match="must be in"):
        model(images, adapter_names=places(model, [BASE, *names[1:]]))
    tokens = model.forward_features(images, adapter_names=places(model, [BASE, *names[1:]]))
    with model.disable_adapter():
        torch.testing.assert_close(tokens[:1], model.forward_features(images[:1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", [{"img_size": (32, 32)}, {"img_size": (48, 48)}, {"embed_dim": 16}])
@pytest.mark.parametrize("name", ["default", "plain"])
def test_adapters_of_another_backbone(name, other):
    adapters = {key: STACKABLE[key] for key in ("default", "plain")}
    model, stranger = several(adapters=adapters), several(adapters=adapters, **other)
    model.adapters["stranger"] = stranger.adapters[name]
    with pytest.raises(ValueError, match="of one backbone"):
        model(tiny_images(model, batch=2), adapter_names=["default", "stranger"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep", "kv")})
    images, names = mixed_batch(model)
    expected = model(images, adapter_names=names)
    for prepare in (lambda: model.to(dtype), lambda: model.backbone.to(dtype)):
        prepare()
        for name in (BASE, *model.adapters):
            model.find_adapter(name).head.to(dtype)
        got = model(images.to(dtype), adapter_names=names)
        assert got.dtype == dtype
        known = expected.isfinite()
        assert (got - expected)[known].abs().max() < (0.15 if dtype == torch.bfloat16 else 1e-4)
        model.double()


def test_a_head_of_another_dtype_is_refused_as_in_a_single_call():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more")})
    model.adapters["more"].head.float()
    with pytest.raises(RuntimeError, match="dtype"):
        model(tiny_images(model), adapter_names=["default", "more"])


def test_autocast():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep")}).float()
    images, names = mixed_batch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = model(images, adapter_names=names), one_by_one(model, images, names)
    assert got.dtype == expected.dtype == torch.bfloat16
    known = expected.isfinite()
    assert (got - expected)[known].abs().max() < 0.1


def test_gradient_checkpointing():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep")})
    images, names = mixed_batch(model)
    expected = outcome(model, lambda: model(images, adapter_names=names))
    model.set_grad_checkpointing()
    assert_same(outcome(model, lambda: model(images, adapter_names=names)), expected)


@pytest.mark.full
def test_compiled_with_integers():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "deep", "kv")})
    images, names = mixed_batch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    given = places(model, names)
    expected = outcome(model, lambda: model(images, adapter_names=given))
    assert_same(outcome(model, lambda: compiled(images, adapter_names=given)), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        other = given.flip(0)
        got, wanted = compiled(images, adapter_names=other), model(images, adapter_names=other)
    assert got.isfinite().equal(wanted.isfinite())


@pytest.mark.parametrize("given", [[0, -2], [2, 0]])
def test_compiled_code_refuses_integers_out_of_range(given):
    model = several(adapters={name: STACKABLE[name] for name in ("default", "deep")})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"must be in \[-1, 2\)"):
        compiled(tiny_images(model), adapter_names=torch.tensor(given))


def test_exported_for_batches_of_any_size():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more", "kv")})
    images, given = tiny_images(model, batch=5), torch.tensor([0, 1, 2, -1, 0])
    sizes = {name: {0: torch.export.Dim("batch", min=2)} for name in ("images", "adapter_names")}
    exported = torch.export.export(model, (images,), {"adapter_names": given}, dynamic_shapes=sizes)
    images, given = tiny_images(model, batch=3), torch.tensor([2, -1, 1])
    got, expected = exported.module()(images, adapter_names=given), model(images, adapter_names=given)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_no_images():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more")})
    assert model(tiny_images(model, batch=0), adapter_names=[]).shape[0] == 0


def test_a_disabled_adapter_wins():
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more")})
    images, names = mixed_batch(model)
    with model.disable_adapter():
        assert model(images, adapter_names=names).equal(model(images))


def test_class_counts():
    model = several()
    assert model.class_counts(["more", BASE, "default"]) == [7, 6, 3]
    images, names = mixed_batch(model)
    logits = model(images, adapter_names=names)
    assert logits.isfinite().sum(1).tolist() == model.class_counts(names)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("default", TypeError, "sequence of names or a tensor of integers, got 'default'"),
        (3, TypeError, "sequence of names"),
        (["default"], ValueError, "must be 2, one an image, got 1"),
        (["default", "mroe"], ValueError, "got 'mroe'"),
        (["default", None], ValueError, "got None"),
        (torch.tensor([0.0, 1.0]), TypeError, "got a tensor of torch.float32"),
        (torch.tensor([True, False]), TypeError, "got a tensor of torch.bool"),
        (torch.tensor([0, 1, 2]), ValueError, r"must be \(2,\), one an image, got \(3,\)"),
        (torch.tensor([0, 2]), ValueError, r"in \[-1, 2\), got \[0, 2\]"),
        (torch.tensor([0, -2]), ValueError, r"in \[-1, 2\)"),
        (torch.tensor([0, 1], device="meta"), ValueError, "on the images' device cpu, got meta"),
    ],
)
def test_bad_names(names, error, message):
    model = several(adapters={name: STACKABLE[name] for name in ("default", "more")})
    with pytest.raises(error, match=message):
        model(tiny_images(model), adapter_names=names)


def test_what_can_be_stacked():
    model = several(adapters=STACKABLE | OTHERS)
    stackable = {
        name
        for name, a in model.adapters.items()
        if mixing.plain_adapter(model, a, torch.float64) is not None
    }
    assert stackable == set(STACKABLE)


def on_fake_gpu(model):
    """A copy of ``model`` whose tensors are fake and on a GPU, within a FakeTensorMode."""
    fakes = {}
    for tensor in itertools.chain(model.parameters(), model.buffers(), model.find_adapter(BASE).parameters()):
        fake = torch.empty_like(tensor, device="cuda")
        fakes[id(tensor)] = torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake
    return copy.deepcopy(model, fakes)


@pytest.mark.skipif(torch.__version__.startswith("2.8"), reason="its fake GPU tensors need a driver")
@pytest.mark.parametrize("others", [{}, OTHERS], ids=["together", "in groups"])
def test_nothing_waits_for_a_gpu(others):
    """Who has which adapter gets there behind what the GPU is still computing."""
    model = several(adapters=STACKABLE | others)
    images, names = mixed_batch(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_backend("torch"):
        model = on_fake_gpu(model)
        images = torch.empty_like(images, device="cuda")
        with Copies("cuda") as copies:
            model(images, adapter_names=names)
            model.forward_features(images, adapter_names=names)
    assert copies.all
    assert not copies.waiting

"""AdapterStack: many adapters as rows of tensors that stay where they are."""

import copy
import pickle
import threading

import pytest
import torch
from replaying import replaying_on_cpu
from several import BASE, OTHERS, STACKABLE, mixed_batch, several
from tiny import tiny_images

from vapt_fast import AdapterError, AdapterStack, AdaptiveViT, PromptConfig, use_backend, use_cuda_graphs

FOUR = {name: STACKABLE[name] for name in ("default", "more", "deep", "kv")}


def stack_of(model, capacity=20, max_classes=9):
    """All adapters of a model in a stack."""
    configs = [adapter.prompts.config for adapter in model.adapters.values()]
    stack = AdapterStack(model, capacity=capacity, prompts=configs, max_classes=max_classes)
    for name in model.adapters:
        stack.add_adapter(name)
    return stack


def assert_equal(logits, expected):
    width = expected.shape[1]
    assert logits[:, width:].isneginf().all()
    assert logits[:, :width].isfinite().equal(expected.isfinite())
    known = expected.isfinite()
    torch.testing.assert_close(logits[:, :width][known], expected[known], rtol=1e-12, atol=1e-12)


def test_every_kind():
    model = several()
    images, names = mixed_batch(model)
    stack, expected = stack_of(model), model(images, adapter_names=names)
    logits = stack(images, names)
    assert logits.shape == (len(names), 9)
    assert not logits.requires_grad
    assert_equal(logits, expected)
    assert stack(images, stack.places(names)).equal(logits)
    assert stack.adapters == tuple(model.adapters)
    copied, pickled = copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))
    assert copied(images, names).equal(logits)
    assert pickled(images, names).equal(logits)


def test_images_are_differentiable():
    model = several(adapters=FOUR)
    images, names = mixed_batch(model)
    stack = stack_of(model)
    gradients = []
    for call in (lambda x: stack(x, names)[:, 0], lambda x: model(x, adapter_names=names)[:, 0]):
        leaf = images.clone().requires_grad_()
        gradients += torch.autograd.grad(call(leaf).sum(), leaf)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_smaller_adapters_fit():
    model = several(adapters=FOUR)
    config = PromptConfig(num_prompts=5, projector_dim=4, add_table=True)
    stack = AdapterStack(
        model, capacity=4, prompts=[config, PromptConfig(kind="kv", num_prompts=4)], max_classes=8
    )
    for name in model.adapters:
        stack.add_adapter(name)
    images, names = mixed_batch(model)
    assert_equal(stack(images, names), model(images, adapter_names=names))


def test_the_only_block_with_a_projector_of_its_own():
    options = {"num_prompts": 3, "projector_dim": 4, "projector_shared": False, "static_depth": 2}
    model = several(adapters={"default": (options, 3)})
    images = tiny_images(model)
    assert_equal(stack_of(model)(images, ["default"] * 2), model(images))


def test_swapping_is_seen_and_changes_no_address():
    model = several()
    images, names = mixed_batch(model)
    stack = stack_of(model)
    addresses = [buffer.data_ptr() for buffer in stack.buffers()]
    for name, other in zip(
        model.adapters, [*list(model.adapters)[3:], *list(model.adapters)[:3]], strict=True
    ):
        stack.add_adapter(name, model.adapters[other])
        given = [other if given == name else given for given in names if given in (name, BASE)]
        rows = images[: len(given)]
        own = [name if one == other else one for one in given]
        assert_equal(stack(rows, own), model(rows, adapter_names=given))
    assert addresses == [buffer.data_ptr() for buffer in stack.buffers()]


def test_a_deleted_place_is_taken_again():
    model = several(adapters=FOUR)
    images, names = mixed_batch(model)
    stack = stack_of(model, capacity=4)
    with pytest.raises(AdapterError, match="all 4 places are taken"):
        stack.add_adapter("fifth", model.adapters["deep"])
    expected = stack(images, names)
    stack.delete_adapter("more")
    with pytest.raises(ValueError, match="got 'more'"):
        stack(images, names)
    stack.add_adapter("fifth", model.adapters["more"])
    assert stack(images, ["fifth" if name == "more" else name for name in names]).equal(expected)


def test_the_model_may_train_on():
    model = several(adapters=FOUR)
    stack, images = stack_of(model), tiny_images(model, batch=1)
    model.train()
    stack.add_adapter("more")
    assert all(module.training for module in model.adapters.modules())
    with pytest.raises(ValueError, match="eval mode"):
        stack(images, ["more"])
    model.eval()
    assert_equal(stack(images, ["more"]), model(images, adapter_names=["more"]))


def test_hooks_that_come_later_are_not_ignored():
    model = several(adapters=FOUR)
    stack, images = stack_of(model), tiny_images(model, batch=1)
    model.backbone.blocks[0].attn.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(NotImplementedError, match="hooks"):
        stack(images, ["more"])


def test_another_image_size_is_not_ignored():
    model = several(adapters=FOUR)
    stack = stack_of(model)
    model.set_input_size((48, 32))  # as many patches, so that every shape stays
    with pytest.raises(ValueError, match="model must have the 2x3 patches"):
        stack(tiny_images(model, batch=1), ["more"])
    with pytest.raises(ValueError, match="of one backbone"):
        stack.add_adapter("more")
    model.set_input_size((32, 48))
    images = tiny_images(model, batch=1)
    assert_equal(stack(images, ["deep"]), model(images, adapter_names=["deep"]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", {"img_size": (32, 32)}),
        ("default", {"img_size": (48, 32)}),  # as many patches
        *((name, {"embed_dim": 16}) for name in ("default", "deep", "none")),
    ],
)
def test_adapters_of_another_backbone(name, options):
    adapters = FOUR | {"none": STACKABLE["none"]}
    stack, stranger = stack_of(several(adapters=adapters)), several(adapters=adapters, **options)
    before = {key: value.clone() for key, value in stack.named_buffers()}
    with pytest.raises(ValueError, match="of one backbone"):
        stack.add_adapter("default", stranger.adapters[name])
    assert all(value.equal(before[key]) for key, value in stack.named_buffers())


def test_files(tmp_path):
    model = several(adapters=FOUR).float()
    model.adapters["more"].class_names = tuple("abcdefg")
    model.save_adapter(tmp_path / "more", "more", metadata={"a": 1}, data_config={"crop_pct": 0.5})
    stack = stack_of(model)
    stack.load_adapter(tmp_path / "more", name="again")
    images = tiny_images(model)
    assert stack(images, ["again"] * 2).equal(stack(images, ["more"] * 2))
    info = stack.info("again")
    assert (info.num_classes, info.class_names, info.metadata) == (7, tuple("abcdefg"), {"a": 1})
    assert (info.data_config["crop_pct"], info.prompts) == (0.5, model.adapters["more"].prompts.config)
    assert stack.transform("again") is not None
    before = stack(images, ["more"] * 2)
    other = several(adapters={"default": STACKABLE["default"]}, embed_dim=16).float()
    other.save_adapter(tmp_path / "other")
    with pytest.raises(AdapterError, match="backbone dim"):
        stack.load_adapter(tmp_path / "other", name="more")
    changed = copy.deepcopy(model)
    changed.backbone.norm.weight.data.add_(1)
    changed.save_adapter(tmp_path / "changed", "more")
    with pytest.raises(AdapterError, match="their fingerprints differ"):
        stack.load_adapter(tmp_path / "changed", name="more")
    assert stack(images, ["more"] * 2).equal(before)


@pytest.mark.parametrize(
    ("options", "classes", "problem"),
    [
        ({"num_prompts": 4}, 3, "block 0: 4 prompts, reserved are 3"),
        ({"num_prompts": 3, "projector_dim": 9}, 3, "9 features and relu, reserved are 4 with relu"),
        ({"num_prompts": 3, "projector_dim": 4, "projector_activation": "gelu"}, 3, "4 features and gelu"),
        ({"num_prompts": 3, "projector_dim": 4, "projector_shared": False}, 3, "a projector of its own"),
        ({"num_prompts": 3, "projector_dim": 4, "conv_shared": False}, 3, "a convolution of 4 matrices"),
        ({"num_prompts": 3, "projector_dim": 4, "add_table": True}, 3, "block 1: a table, reserved is none"),
        ({"kind": "deep", "num_prompts": 3}, 3, "block 1: a table, reserved is none"),
        ({"kind": "kv", "num_prompts": 3}, 3, "keys and values, reserved are none"),
        ({"num_prompts": 3, "projector_dim": 4}, 4, "num_classes: 4, reserved are 3"),
    ],
)
def test_what_is_not_reserved(options, classes, problem):
    model = several(adapters={"default": STACKABLE["default"]})
    stack = AdapterStack(model, capacity=2)
    stack.add_adapter("default")
    model.add_adapter("other", PromptConfig(**options), num_classes=classes)
    with pytest.raises(AdapterError, match=problem):
        stack.add_adapter("other")
    assert stack.adapters == ("default",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": []}, TypeError, "one PromptConfig or several"),
        ({"prompts": ["deep"]}, TypeError, "one PromptConfig or several"),
        ({"capacity": 0}, ValueError, "capacity must be"),
        ({"max_classes": 0}, ValueError, "max_classes must be"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        AdapterStack(several(adapters=FOUR), **{"capacity": 2} | options)
    with pytest.raises(TypeError, match="one of a model's adapters, got Linear"):
        stack_of(several(adapters=FOUR)).add_adapter("new", torch.nn.Linear(2, 2))


def test_what_can_not_be_stacked():
    model = several(adapters=STACKABLE | OTHERS)
    with pytest.raises(ValueError, match="got kind 'shallow'"):
        AdapterStack(model, capacity=2, prompts=PromptConfig(kind="shallow"))
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        AdapterStack(model, capacity=0)
    stack = AdapterStack(model, capacity=2)
    with pytest.raises(ValueError, match="got kind 'shallow'"):
        stack.add_adapter("shallow")
    model.adapters["default"].head = torch.nn.Sequential(model.adapters["default"].head)
    with pytest.raises(AdapterError, match="head: more than a Linear"):
        stack.add_adapter("default")
    with (
        pytest.raises(ValueError, match="'reference' computes adapter by adapter"),
        use_backend("reference"),
    ):
        stack(tiny_images(model), [BASE] * 2)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["deep"], ValueError, "must be 2, one an image, got 1"),
        (["deep", "x"], ValueError, "got 'x'"),
        ("deep", TypeError, "sequence of names"),
        (torch.tensor([0, 21]), ValueError, r"in \[0, 21\)"),
        (torch.tensor([-1, 0]), ValueError, r"in \[0, 21\)"),
    ],
)
def test_bad_names(names, error, message):
    model = several(adapters=FOUR)
    with pytest.raises(error, match=message):
        stack_of(model)(tiny_images(model), names)


def test_the_bare_backbone_is_there_where_its_classifier_fits():
    model = several(adapters=FOUR)
    images = tiny_images(model)
    assert_equal(stack_of(model)(images, [BASE] * 2), model(images, adapter_names=[BASE] * 2))
    small = AdapterStack(model, capacity=1, max_classes=5)
    with pytest.raises(ValueError, match="got '__base__'"):
        small(images, [BASE] * 2)
    with pytest.raises(ValueError, match=r"in \[1, 2\), got \[0, 0\]"):
        small(images, torch.zeros(2, dtype=torch.int64))


def test_no_recompilation_over_20_swaps():
    model = several(adapters=FOUR)
    images, names = mixed_batch(model)
    stack = stack_of(model)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    compiled(images, stack.places(names))
    kinds = list(model.adapters)
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(20):
            name, other = kinds[i % 4], kinds[(i * 7 + 1) % 4]
            if i % 5 == 0:
                stack.delete_adapter(name)
            stack.add_adapter(name, model.adapters[other])
            logits = compiled(images, stack.places(names))
            assert_equal(logits[:, :9], stack(images, names))


def test_graphs_go_on_over_swaps():
    model = several(adapters=FOUR)
    images, names = mixed_batch(model)
    stack = stack_of(model)
    kinds = list(model.adapters)
    with replaying_on_cpu(), use_cuda_graphs(True):
        for i in range(8):
            name, other = kinds[i % 4], kinds[(i * 7 + 1) % 4]
            stack.add_adapter(name, model.adapters[other])
            order = names[i:] + names[:i]
            logits = stack(images, order)
            with use_cuda_graphs(False):
                assert logits.equal(stack(images, order))
        assert stack._cuda_graphs.report().count("captured") == 1
        assert "repeated 8 times" in stack._cuda_graphs.report()


def test_calls_and_changes_from_several_threads(tmp_path):
    """Each answer is that of an adapter as it was before or after a change."""
    model = several(adapters=FOUR)
    model.save_adapter(tmp_path)
    images = tiny_images(model, batch=1)
    stack = stack_of(model)
    allowed = [model(images, adapter_names=[name])[0, :1].detach() for name in ("default", "more")]
    wrong, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                logit = stack(images, ["default"])[0, :1].detach()
            except Exception as error:
                wrong.append(error)
                raise
            if not any(torch.allclose(logit, right, rtol=1e-12) for right in allowed):
                wrong.append(logit)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    for i in range(60):
        stack.add_adapter("default", model.adapters[("more", "default")[i % 2]])
        if i % 6 == 0:
            stack.load_adapter(tmp_path, name="other")
    stop.set()
    for asker in askers:
        asker.join()
    assert not wrong


def test_moved_and_measured():
    model = several(adapters=FOUR)
    stack = stack_of(model)
    assert stack.bytes_per_adapter * 21 == sum(
        buffer.numel() * buffer.element_size() for buffer in stack.buffers(recurse=False)
    )
    images, names = mixed_batch(model)
    expected = stack(images, names)
    got = stack.float()(images.float(), names)
    known = expected.isfinite()
    assert (got - expected)[known].abs().max() < 1e-4
    assert not stack.train().training
    assert isinstance(stack.model, AdaptiveViT)

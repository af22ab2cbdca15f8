"""Several adapters by name in one model, and merging them."""

import copy
import io

import pytest
import torch
from replaying import replaying_on_cpu
from several import BASE, STACKABLE, one_by_one, several
from small_adapters import SMALL, make_backbone, make_model, timm_model
from tiny import tiny_backbone, tiny_images

from vapt_fast import AdapterError, AdaptiveViT, PromptConfig
from vapt_fast.adapters import BASE as BASE_NAME
from vapt_fast.adapters import MissingHead, file

THREE = {name: STACKABLE[name] for name in ("default", "more", "deep")}


def test_names():
    model = several(adapters=THREE)
    assert list(model.adapters) == ["default", "more", "deep"]
    assert model.active_adapter == "default"
    model.set_adapter("more")
    assert (model.num_classes, model.config.num_prompts, model.prompts) == (
        7,
        5,
        model.adapters["more"].prompts,
    )
    model.delete_adapter("deep")
    assert list(model.adapters) == ["default", "more"]
    with pytest.warns(UserWarning, match="'default' is active now"):
        model.delete_adapter("more")
    assert model.active_adapter == "default"
    with pytest.raises(ValueError, match="the only one"):
        model.delete_adapter("default")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (1, TypeError, "must be a str, got 1"),
        ("", ValueError, "must not be empty"),
        ("a.b", ValueError, "a dot"),
        (BASE_NAME, ValueError, "__base__"),
        ("keys", ValueError, "attribute of torch.nn.ModuleDict"),
        ("training", ValueError, "attribute of torch.nn.ModuleDict"),
        ("default", ValueError, "exists already"),
    ],
)
def test_bad_new_names(name, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        model.add_adapter(name)
    assert list(model.adapters) == ["default"]


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_unknown_names(call):
    with pytest.raises(ValueError, match=r"one of \('default',\), got 'other'"):
        getattr(make_model(), call)("other")


def test_new_adapters_take_over_what_is_not_said():
    model = make_model(PromptConfig(num_prompts=2, projector_dim=4, channel_dropout=0.3))
    model.add_adapter("same")
    model.add_adapter("other", num_prompts=5, projector_dim=0, num_classes=11)
    assert model.adapters["same"].prompts.config == model.config
    assert model.adapters["same"].num_classes == 3
    config = model.adapters["other"].prompts.config
    assert (config.num_prompts, config.projector_dim, config.channel_dropout) == (5, None, 0.3)
    assert model.adapters["other"].head.out_features == 11
    assert model.active_adapter == "default"
    with pytest.raises(TypeError, match="drop_rate"):
        model.add_adapter("third", drop_rate=0.1)
    with pytest.raises(TypeError, match="alone"):
        model.add_adapter("third", SMALL, num_prompts=3)
    with pytest.raises(ValueError, match="num_classes must be at least 0"):
        model.add_adapter("third", num_classes=-1)
    assert list(model.adapters) == ["default", "same", "other"]


def test_options_of_new_adapters_suit_those_of_the_active_one():
    model = make_model(PromptConfig(num_prompts=2, conv_kernel=3))
    model.add_adapter("padded", conv_padding=2)  # which the default kernel would not reach beyond
    assert model.adapters["padded"].prompts.config.conv_padding == 2


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to("meta")]
)
def test_new_adapters_are_like_the_active_one(convert):
    model = convert(make_model())
    model.add_adapter("new")
    for one, other in zip(
        model.adapters["default"].parameters(), model.adapters["new"].parameters(), strict=True
    ):
        assert (one.dtype, one.device, one.requires_grad) == (other.dtype, other.device, other.requires_grad)


def test_the_active_adapter_alone_decides():
    model = several(adapters=THREE)
    images = tiny_images(model)
    for name, (options, classes) in THREE.items():
        alone = AdaptiveViT(
            tiny_backbone("vit_tiny_patch16_224", num_classes=6), **options, num_classes=classes
        )
        alone = alone.double().eval()
        alone.adapters["default"].load_state_dict(model.adapters[name].state_dict())
        model.set_adapter(name)
        assert model(images).equal(alone(images))


def test_the_state_dict_has_all_adapters():
    model, other = several(adapters=THREE), several(adapters=THREE)
    with torch.no_grad():
        for parameter in other.adapters.parameters():
            parameter.zero_()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    images, names = tiny_images(model, batch=3), list(THREE)
    assert model(images, adapter_names=names).equal(other(images, adapter_names=names))
    assert not any("base" in name.split(".")[0] and "backbone" not in name for name in model.state_dict())


def test_train_one_some_or_all():
    model = several(adapters=THREE).train()
    images = tiny_images(model, batch=3)
    model.adapters["default"].requires_grad_(False)
    assert {p for _, p in model.named_parameters() if p.requires_grad} == {
        p for name in ("more", "deep") for p in model.adapters[name].parameters()
    }
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.param_groups(weight_decay=0.1), lr=0.1)
    logits = model(images, adapter_names=["default", "more", "more"])
    logits[:, 0].sum().backward()
    optimizer.step()
    changed = {
        name.split(".")[1] for name, value in model.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"more"}


def test_no_head_decays_by_its_bias():
    model = several(adapters=THREE)
    exempt = {id(p) for p in model.param_groups(0.1)[1]["params"]}
    assert exempt == {id(model.adapters[name].head.bias) for name in THREE}


# ---- without adapters


def test_a_disabled_adapter_leaves_the_bare_model():
    backbone = tiny_backbone("vit_tiny_patch16_224", num_classes=6)
    for options in ({}, {"num_classes": 4}):
        model = AdaptiveViT(backbone, num_prompts=3, **options).double().eval()
        images = tiny_images(model)
        with model.disable_adapter():
            assert model.num_classes == 6
            torch.testing.assert_close(model(images), backbone(images), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                model.forward_features(images), backbone.forward_features(images), rtol=1e-12, atol=1e-12
            )
            with model.disable_adapter():
                pass
            assert model.num_classes == 6
        assert model.num_classes == options.get("num_classes", 6)


def test_what_is_learned_leaves_the_bare_model_alone():
    model = several(adapters=THREE)
    images = tiny_images(model)
    with model.disable_adapter():
        before = model(images)
    with torch.no_grad():
        model.head.weight.zero_()
    model.reset_classifier(9)
    with model.disable_adapter():
        assert model(images).equal(before)
        assert not model(images).requires_grad
    twin = copy.deepcopy(model).float()
    with twin.disable_adapter():
        torch.testing.assert_close(twin(images.float()).double(), before, rtol=1e-4, atol=1e-4)


def test_changes_within_disable_adapter_are_those_of_the_active_one():
    model = several(adapters=THREE)
    images = tiny_images(model)
    with model.disable_adapter():
        before = model(images)
        model.add_adapter("new")
        model.reset_classifier(8)
        assert model(images).equal(before)
    assert model.adapters["new"].prompts.config == model.config
    assert (model.adapters["new"].num_classes, model.num_classes) == (3, 8)


def test_a_copy_is_disabled_no_longer():
    model = several(adapters=THREE)
    images = tiny_images(model)
    expected = model(images)
    with model.disable_adapter():
        twin = copy.deepcopy(model)
        assert model(images).shape != expected.shape
        assert twin(images).equal(expected)
    assert model(images).equal(expected)


@pytest.mark.parametrize("name", ["head", "prompts", "class_names", "data_config", "adapter_metadata"])
def test_the_bare_backbone_cannot_be_changed(name):
    model = several(adapters=THREE)
    with model.disable_adapter():
        before = getattr(model, name)
        with pytest.raises(ValueError, match="within disable_adapter"):
            setattr(model, name, getattr(model.adapters["default"], name.removeprefix("adapter_")))
        assert getattr(model, name) is before


@pytest.mark.parametrize(
    ("head", "error", "given"),
    [
        (torch.nn.Linear(10, 3), ValueError, "in_features=10"),
        (torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(10, 3))), ValueError, "in_features=10"),
        (None, TypeError, "None"),
    ],
)
def test_a_head_that_takes_no_features_is_refused_at_once(head, error, given):
    model = several(adapters=THREE)
    before = model.head
    with pytest.raises(error, match=rf"head must .*{given}"):
        model.head = head
    assert model.head is before
    for fitting in (torch.nn.Linear(model.head_hidden_size, 3), torch.nn.LazyLinear(3), torch.nn.Identity()):
        model.head = fitting
        assert model.head is fitting


def test_graphs_see_another_classifier_of_the_bare_backbone():
    model = several(adapters=THREE)
    images = tiny_images(model)
    with torch.no_grad(), replaying_on_cpu(), model.disable_adapter():
        model.cuda_graphs = True
        before = model(images)
        model.find_adapter(BASE).head = torch.nn.Linear(32, 4).double()
        assert (before.shape[1], model(images).shape[1]) == (6, 4)


def test_a_random_classifier_is_none():
    """Weights that are loaded later have none for it."""
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3}
    model = AdaptiveViT("vit_tiny_patch16_224", num_prompts=2, **options)
    with model.disable_adapter(), pytest.raises(ValueError, match="no classifier that was trained"):
        model(torch.zeros(1, 3, 32, 32))


def test_no_classifier_is_invented():
    """That of pre-trained weights is gone where timm has made another one; so is that of a loaded adapter."""
    model = several(adapters=THREE)
    model._base.head = MissingHead()
    images = tiny_images(model)
    with model.disable_adapter():
        assert model.forward_features(images).isfinite().all()
        with pytest.raises(ValueError, match="has no classifier that was trained"):
            model(images)
    with pytest.raises(ValueError, match="has no classifier that was trained"):
        model(images, adapter_names=[BASE, "default"])


def test_a_loaded_model_knows_the_classifier_of_a_backbone_that_is_given(tmp_path):
    model = AdaptiveViT(timm_model(), prompts=SMALL)
    model.save_adapter(tmp_path, include_backbone=True)
    images = torch.zeros(1, 3, 32, 32)
    given = AdaptiveViT.from_adapter(tmp_path, backbone=timm_model())
    with given.disable_adapter():
        torch.testing.assert_close(given(images), timm_model().eval()(images))
    made = AdaptiveViT.from_adapter(tmp_path)
    with made.disable_adapter(), pytest.raises(ValueError, match="has no classifier that was trained"):
        made(images)


# ---- files


def test_save_and_load_by_name(tmp_path):
    model = several(adapters=THREE).float()
    model.adapters["more"].class_names = tuple("abcdefg")
    model.save_adapter(tmp_path / "more", "more", metadata={"top1": 0.5})
    model.save_adapter(tmp_path / "default")
    other = several(adapters={"default": THREE["default"]}).float()
    other.load_adapter(tmp_path / "more", "birds", check_backbone=False)
    assert (list(other.adapters), other.active_adapter) == (["default", "birds"], "default")
    assert not any(p.requires_grad for p in other.adapters["birds"].parameters())
    assert other.adapters["birds"].class_names == tuple("abcdefg")
    assert other.class_names is None
    assert other.adapters["birds"].metadata == {"top1": 0.5}
    images = tiny_images(model)
    expected = one_by_one(model, images, ["more"] * 2)
    torch.testing.assert_close(other(images, adapter_names=["birds"] * 2), expected, rtol=1e-5, atol=1e-5)
    other.load_adapter(tmp_path / "more", "trained", check_backbone=False, is_trainable=True)
    assert all(p.requires_grad for p in other.adapters["trained"].parameters())


def test_loading_over_an_adapter_is_in_place(tmp_path):
    model = several(adapters=THREE).float()
    model.save_adapter(tmp_path, "deep")
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    value = model.adapters["deep"].prompts.blocks[0].table.clone()
    with torch.no_grad():
        model.adapters["deep"].prompts.blocks[0].table.zero_()
    model.load_adapter(tmp_path, "deep")
    assert model.adapters["deep"].prompts.blocks[0].table.equal(value)
    assert where == {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["more", "new", None])
def test_a_wrong_file_changes_nothing(name, tmp_path):
    model = several(adapters=THREE).float()
    several("vit_tiny_patch16_224", {"default": THREE["default"]}, embed_dim=16).float().save_adapter(
        tmp_path
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match="backbone dim: the adapter was made for 16, the model has 32"):
        model.load_adapter(tmp_path, name)
    assert list(model.adapters) == list(THREE)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("option", ["num_prompts", "projector_dim", "num_classes"])
def test_a_config_that_asks_for_more_than_the_file_has(option, tmp_path):
    """It costs no memory: what an adapter says is a stranger's."""
    model = make_model()
    model.save_adapter(tmp_path)
    saved = file.read(tmp_path)
    config = {key: saved.config[key] for key in ("backbone", "prompts", "data", "metadata", "class_names")}
    config["backbone" if option == "num_classes" else "prompts"][option] = 10**9
    file.write(tmp_path, config, saved.tensors, None)
    with pytest.raises(AdapterError, match="its config makes"):
        model.load_adapter(tmp_path, "new")
    with pytest.raises(AdapterError, match="does not fit the model"):
        model.load_adapter(tmp_path)
    assert list(model.adapters) == ["default"]
    with pytest.raises(AdapterError, match="its config makes"):
        AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone())


def test_another_size_is_that_of_all_adapters():
    model = several(adapters=THREE)
    model.set_input_size((48, 64))
    images = tiny_images(model, batch=3)
    assert model(images, adapter_names=list(THREE)).shape == (3, 7)


def test_fewer_blocks_are_those_of_all_adapters():
    model = several(adapters=THREE)
    model.prune_intermediate_layers(1, prune_head=False)
    images = tiny_images(model, batch=3)
    expected = one_by_one(model, images, list(THREE))
    torch.testing.assert_close(model(images, adapter_names=list(THREE)), expected, rtol=1e-12, atol=1e-12)


# ---- merging


def test_pruned_blocks_leave_no_classifier_of_the_bare_backbone():
    model = several(adapters=THREE)
    model.prune_intermediate_layers([0])
    with model.disable_adapter():
        assert model.num_classes == 0
        assert model(tiny_images(model)).shape == model.forward_features(tiny_images(model)).shape


def test_a_pooling_must_suit_all_adapters():
    pooled = {"pooled": ({"num_prompts": 2, "pool_prompts": True}, 3)}
    model = several(adapters=THREE | pooled, global_pool="avg")
    with pytest.raises(ValueError, match="pool_prompts=True needs"):
        model.reset_classifier(4, "token")
    assert (model.global_pool, model.num_classes) == ("avg", 3)


def test_weighted_adapters():
    model = several(adapters=dict.fromkeys(("a", "b", "c"), STACKABLE["default"]))
    model.add_weighted_adapter(["a", "b", "c"], [0.5, -1, 2], "sum")
    model.add_weighted_adapter(["a", "b"], None, "mean")
    a, b, c = (dict(model.adapters[name].named_parameters()) for name in "abc")
    for name, value in model.adapters["sum"].named_parameters():
        torch.testing.assert_close(value, 0.5 * a[name] - b[name] + 2 * c[name])
    for name, value in model.adapters["mean"].named_parameters():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2)
    assert model.active_adapter == "a"
    with torch.no_grad():
        model.adapters["sum"].head.weight.zero_()
    assert model.adapters["a"].head.weight.count_nonzero()


@pytest.mark.parametrize(
    ("names", "weights", "new", "message"),
    [
        ([], [], "new", "one at least, got none"),
        (["default", "more"], None, "new", r"prompts num_prompts: 'default' has 3, 'more' 5"),
        (["default", "twin"], [1], "new", r"must be 2 finite numbers, one an adapter, got \[1\]"),
        (["default", "twin"], [1, float("nan")], "new", "2 finite numbers"),
        (["default", "named"], [1, 1], "new", "class_names: 'default' has None"),
        (["default", "gray"], [1, 1], "new", "data_config: 'default' has {}, 'gray' {'mean'"),
        (["default", "twin"], [1, 1], "twin", "exists already"),
        (["default", "nobody"], [1, 1], "new", "got 'nobody'"),
    ],
)
def test_what_can_not_be_merged(names, weights, new, message):
    model = several(adapters={"default": STACKABLE["default"], "more": STACKABLE["more"]})
    model.add_adapter("twin")
    model.add_adapter("named")
    model.adapters["named"].class_names = ("a", "b", "c")
    model.add_adapter("gray")
    model.adapters["gray"].data_config = {"mean": (0.5, 0.5, 0.5)}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(names, weights, new)
    assert "new" not in model.adapters

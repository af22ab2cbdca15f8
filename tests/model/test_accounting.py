"""What a model costs: by formulas, by counting real tensors, and what the paper says of a ViT-B/16."""

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vapt_fast import AdaptiveViT, PromptConfig, use_backend
from vapt_fast.accounting import account

VIT = "vit_tiny_patch16_224"
FAMILIES = [
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_18x2_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "naflexvit_base_patch16_map",
]


def of_vit_b(**options):
    """Without numbers: none are needed."""
    with torch.device("meta"):
        model = AdaptiveViT("vit_base_patch16_224", num_classes=10, **options)
    return account(model, batch_size=2)


# ---- the paper


@pytest.fixture(scope="module")
def vit_b():
    return {kind: of_vit_b(kind=kind, num_prompts=100) for kind in ("adaptive", "deep")}


def test_share_of_the_weights(vit_b):
    """0.36% is the mean of tasks whose numbers of prompts are not known; 100 prompts have 0.34%."""
    costs = vit_b["adaptive"]
    assert costs.backbone == 85_798_656
    by_block = 2 * 768 + 2 * 2 + 13 * 13 * 100 + 100  # norm, kernel, projection over positions
    assert costs.prompts == 100 * 768 + 11 * by_block + 2 * 768 * 8
    assert costs.share == pytest.approx(0.0036, abs=0.0003)
    assert vit_b["deep"].share == pytest.approx(0.0107, abs=0.0001)
    assert costs.head == 769 * 10


def test_operations_beside_those_of_vpt(vit_b):
    """VAPT adds 0.6% to VPT with as many prompts, in the literal form of both."""
    ratio = vit_b["adaptive"].literal.forward / vit_b["deep"].literal.forward
    assert ratio == pytest.approx(1.006, abs=0.0005)


def test_the_rewritten_method_costs_less(vit_b):
    for costs in vit_b.values():
        assert costs.rewritten.forward < 0.7 * costs.literal.forward
        assert costs.rewritten.training < 0.7 * costs.literal.training
        assert costs.rewritten.activations < 0.85 * costs.literal.activations
    assert 0.3 < vit_b["adaptive"].literal.forward / costs.bare.forward - 1 < 0.6


def test_operations_are_those_of_the_formula(vit_b):
    width, depth, patches, prompts = 768, 12, 196, 100
    embedding = 3 * 16 * 16 * width * patches

    def blocks(tokens):
        return depth * (12 * width**2 * tokens + 2 * width * tokens**2)

    head = 10 * width
    adaptive = 11 * (width * 169 * (4 + prompts) + 2 * prompts * width * 8)
    assert vit_b["deep"].bare.forward == embedding + blocks(197) + head
    assert vit_b["deep"].literal.forward == embedding + blocks(197 + prompts) + head
    assert vit_b["adaptive"].literal.forward == embedding + blocks(197 + prompts) + head + adaptive


# ---- any model


def operations(run):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def kept(model, images):
    """Bytes of real storages that autograd keeps."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("kind", "frozen_prompts"),
    [("adaptive", False), ("adaptive", True), ("deep", False), ("shallow", False), ("kv", False)],
)
def test_counts_are_those_of_real_runs(kind, frozen_prompts):
    model = tiny_model(VIT, prompts=PromptConfig(kind=kind, num_prompts=3)).float()
    model.prompts.requires_grad_(not frozen_prompts)
    costs = account(model, batch_size=4)
    images = tiny_images(model, batch=4)
    for backend, one in {"reference": costs.literal, "torch": costs.rewritten}.items():
        with use_backend(backend):
            model.eval()
            assert one.forward * 4 == operations(lambda: model(images).detach())
            model.train()
            assert one.training * 4 == operations(lambda: model(images).sum().backward())
            assert one.activations * 4 == kept(model, images)


def test_a_bare_backbone_and_full_fine_tuning():
    model = tiny_model(VIT, prompts=PromptConfig(num_prompts=3)).float()
    costs, images = account(model, batch_size=4), tiny_images(model, batch=4)
    bare = AdaptiveViT(model.backbone, num_prompts=0, backend="reference").float()
    bare.head = model.head
    for one, learned in ((costs.bare, False), (costs.full, True)):
        bare.backbone.requires_grad_(learned)
        bare.eval()
        assert one.forward * 4 == operations(lambda: bare(images).detach())
        bare.train()
        assert one.training * 4 == operations(lambda: bare(images).sum().backward())
        assert one.activations * 4 == kept(bare, images)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.full
def test_every_family_is_counted(name):
    model = tiny_model(name, prompts=PromptConfig(num_prompts=3)).float()
    costs = account(model, batch_size=2)
    images = tiny_images(model)
    with use_backend("reference"):
        assert costs.literal.forward * 2 == operations(lambda: model(images).detach())
    for one in (costs.bare, costs.full, costs.literal, costs.rewritten):
        assert 0 < one.forward <= one.training
    assert costs.bare.training < costs.rewritten.training


def test_the_active_adapter_is_counted():
    model = tiny_model(VIT, prompts=PromptConfig(num_prompts=3)).float()
    model.add_adapter("second", num_classes=4, kind="deep", num_prompts=5)
    first = account(model, batch_size=1)
    model.set_adapter("second")
    second = account(model, batch_size=1)
    assert first.backbone == second.backbone
    assert (second.prompts, second.head) == (3 * 5 * 32, 4 * 33)
    assert first.prompts == sum(p.numel() for p in model.adapters["default"].prompts.parameters())
    with model.disable_adapter():
        assert account(model, batch_size=1).prompts == 0


def test_a_model_of_which_nothing_is_trained():
    costs = account(tiny_model(VIT).float().requires_grad_(False), batch_size=1)
    assert costs.gradients == costs.literal.activations == costs.rewritten.activations == 0
    assert costs.literal.training == costs.literal.forward
    assert costs.full.training > 2 * costs.full.forward


def test_memory_of_a_step():
    model = tiny_model(VIT, prompts=PromptConfig(num_prompts=3)).float()
    costs = account(model, batch_size=4)
    learned = sum(p.nbytes for p in model.trainable_parameters())
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert (costs.weights, costs.gradients) == (weights, learned)
    literal = weights + 4 * costs.literal.activations + 2 * learned
    assert costs.training_memory(costs.literal) == literal
    assert costs.training_memory(costs.full) == 3 * weights + 4 * costs.full.activations


def test_a_dtype_halves_the_activations():
    model = tiny_model(VIT, prompts=PromptConfig(kind="deep", num_prompts=3))
    dtypes = (torch.float32, torch.bfloat16)
    single, half = (account(model.to(dtype), batch_size=1).full.activations for dtype in dtypes)
    assert 0.4 * single < half < 0.7 * single


def test_the_model_stays_as_it_is():
    model = tiny_model(VIT).float().train()
    model.backbone.blocks[0].requires_grad_(True)
    before = {name: (p, p.requires_grad, p.device) for name, p in model.named_parameters()}
    account(model)
    assert before == {name: (p, p.requires_grad, p.device) for name, p in model.named_parameters()}
    assert model.training
    assert len(model.prompts.blocks) == 3
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_has_images():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        account(tiny_model(VIT), batch_size=0)

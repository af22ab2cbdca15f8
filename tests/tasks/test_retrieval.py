"""Retrieval: exact scores, features, models of open_clip with prompts, and the command."""

from __future__ import annotations

import json
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from command import error_of, invoke, succeed
from extras import needs
from PIL import Image
from tiny import randomize, tiny_images, tiny_model

import vapt_fast.demo  # noqa: F401, gives timm the digits' backbone
from vapt_fast import AdapterError, AdaptiveViT, use_backend
from vapt_fast.demo import digit_images
from vapt_fast.tasks.retrieval import (
    ImageTextModel,
    embed,
    evaluate_image_text,
    image_features,
    image_retrieval,
    image_text_retrieval,
)

pytestmark = pytest.mark.full

BACKBONE = "vit_digits_patch4_32"
VIT = "vit_tiny_patch16_224"


def features(count, width=3, seed=0, ties=False):
    """Features, whose inner products have many ties if they are made of few integers."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-1, 2, (count, width), generator=generator).double()
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


def ranking(query, items, without=None):
    """The indices of the items by falling similarity; of equal ones, the lower first."""
    similarity = [float(query @ item) for item in items]
    order = sorted(range(len(items)), key=lambda index: (-similarity[index], index))
    return [index for index in order if index != without]


# ---- images by images


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
@pytest.mark.parametrize("itself", [False, True])
def test_image_retrieval_equals_a_count(ties, chunk_size, itself):
    queries, gallery = features(20, ties=ties), features(31, seed=1, ties=ties)
    labels = torch.arange(20) % 6  # the last has no relevant item among the gallery's
    gallery_labels = torch.arange(31) % 5
    if itself:
        gallery, gallery_labels = queries, labels
    recall, precisions = {1: [], 3: [], 10: []}, []
    for index, query in enumerate(queries):
        order = ranking(query, gallery, without=index if itself else None)
        relevant = [bool(gallery_labels[item] == labels[index]) for item in order]
        if not any(relevant):
            continue
        for k, hits in recall.items():
            hits.append(any(relevant[:k]))
        at = [place for place, hit in enumerate(relevant) if hit]
        precisions.append(sum((count + 1) / (place + 1) for count, place in enumerate(at)) / len(at))
    other = () if itself else (gallery, gallery_labels)
    score = image_retrieval(queries, labels, *other, ks=[1, 3, 10], chunk_size=chunk_size)
    assert score.recall == {k: sum(hits) / len(hits) for k, hits in recall.items()}
    assert score.mean_average_precision == pytest.approx(sum(precisions) / len(precisions))
    assert score.num_queries == len(precisions)
    assert 0 < score.recall[1] < 1


def test_equal_pictures_tie_whatever_the_chunks():
    """In float32, a product of matrices may give the columns of equal items different last bits."""
    items = features(7, width=90).float().repeat(5, 1)
    queries, labels, gallery_labels = (
        features(35, width=90, seed=1).float(),
        torch.arange(35),
        torch.arange(35),
    )
    scores = [
        image_retrieval(queries, labels, items, gallery_labels, ks=[1, 3, 10], chunk_size=size)
        for size in (1, 7, 35)
    ]
    ranks = [ranking(query, items.double()).index(index) for index, query in enumerate(queries.double())]
    expected = {k: sum(rank < k for rank in ranks) / 35 for k in (1, 3, 10)}
    assert [score.recall for score in scores] == [expected] * 3
    precision = sum(1 / (rank + 1) for rank in ranks) / 35
    assert [score.mean_average_precision for score in scores] == pytest.approx([precision] * 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "queries must be floating"),
        ({"queries": torch.full((4, 3), torch.nan)}, ValueError, "queries must be finite"),
        ({"query_labels": torch.zeros(3)}, ValueError, "query_labels must be"),
        ({"gallery_labels": None}, ValueError, "gallery_labels are missing"),
        ({"gallery": torch.zeros(5, 2)}, ValueError, "same width"),
        ({"query_labels": torch.full((4,), 9)}, ValueError, "in common"),
        ({"ks": [0]}, ValueError, "ks"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
    ],
)
def test_image_retrieval_refuses(change, error, message):
    given = {
        "queries": torch.zeros(4, 3),
        "query_labels": torch.zeros(4),
        "gallery": torch.zeros(5, 3),
        "gallery_labels": torch.zeros(5),
    }
    with pytest.raises(error, match=message):
        image_retrieval(**{**given, **change})


# ---- images and texts


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 6, 100])
def test_image_text_recall_equals_a_count(ties, chunk_size):
    """Five captions an image, in any order; an image is a hit if one of them is among the first k."""
    images, texts = features(12, ties=ties), features(60, seed=1, ties=ties)
    generator = torch.Generator().manual_seed(2)
    image_of_text = (torch.arange(60) % 12)[torch.randperm(60, generator=generator)]
    to_text, to_image = {1: 0, 5: 0, 10: 0}, {1: 0, 5: 0, 10: 0}
    for k in to_text:
        for index, image in enumerate(images):
            to_text[k] += any(image_of_text[text] == index for text in ranking(image, texts)[:k])
        for index, text in enumerate(texts):
            to_image[k] += int(image_of_text[index]) in ranking(text, images)[:k]
    found = image_text_retrieval(images, texts, image_of_text, chunk_size=chunk_size)
    assert found.image_to_text == {k: hits / 12 for k, hits in to_text.items()}
    assert found.text_to_image == {k: hits / 60 for k, hits in to_image.items()}
    assert found.rsum == pytest.approx(
        100 * sum(h / 12 for h in to_text.values()) + 100 * sum(h / 60 for h in to_image.values())
    )


@pytest.mark.parametrize("image_of_text", [[0, 1, 1], [0, 1, 5], [0, 1]])
def test_image_text_retrieval_refuses(image_of_text):
    with pytest.raises(ValueError, match="image_of_text"):
        image_text_retrieval(features(3), features(3), torch.tensor(image_of_text))


# ---- features


@pytest.mark.parametrize("name", [VIT, "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224"])
def test_features_are_what_the_head_reads(name):
    model = tiny_model(name)
    images, read = tiny_images(model), []
    hook = model.head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model(images)
    hook.remove()
    torch.testing.assert_close(
        image_features(model, images), F.normalize(read[0], dim=-1), rtol=1e-9, atol=1e-9
    )


def test_embedding_batches():
    model = timm.create_model(BACKBONE, pretrained=True)
    images, labels = torch.randn(5, 3, 32, 32), torch.arange(5)
    whole, none = embed(model, [images])
    parts, found = embed(model.train(), [(images[:2], labels[:2]), (images[2:], labels[2:])])
    torch.testing.assert_close(parts, whole)
    assert none is None
    assert found.tolist() == labels.tolist()
    assert not model.training
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5))
    with pytest.raises(ValueError, match="got none"):
        embed(model, [])


def test_features_of_pooled_prompts_are_refused(tmp_path):
    model = AdaptiveViT(BACKBONE, kind="deep", num_prompts=1, pool_prompts=True, global_pool="avg")
    model.save_adapter(tmp_path / "adapter", include_backbone=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert "pool_prompts" in error_of("retrieve", tmp_path / "adapter", tmp_path, "--gallery", tmp_path)
    with pytest.raises(ValueError, match="pool_prompts"):
        image_features(model, torch.zeros(1, 3, 32, 32))


# ---- models of open_clip

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
NATIVE = {"layers": 3, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
TIMM = {"timm_model_name": BACKBONE, "timm_pool": "token", "image_size": 32}
TOWERS = {
    "clip": ("CLIP", {"embed_dim": 24, "vision_cfg": NATIVE}),
    "openai": ("CLIP", {"embed_dim": 24, "vision_cfg": NATIVE, "quick_gelu": True}),
    "timm-linear": ("CustomTextCLIP", {"embed_dim": 24, "vision_cfg": {**TIMM, "timm_proj": "linear"}}),
    "timm-head": ("CustomTextCLIP", {"embed_dim": 24, "vision_cfg": {**TIMM, "timm_proj": ""}}),
    "siglip": (
        "CustomTextCLIP",
        {
            "embed_dim": 64,
            "vision_cfg": {**TIMM, "timm_pool": "map", "timm_proj": "none"},
            "init_logit_bias": -10.0,
        },
    ),
}


def small_clip(tower="clip", seed=0):
    """A small model of open_clip, in float64; every part of it has an effect."""
    from open_clip import model

    torch.manual_seed(seed)
    kind, options = TOWERS[tower]
    clip = getattr(model, kind)(text_cfg=TEXT, **options).double().eval()
    randomize(clip.visual, seed)
    return clip


def batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randint(1, TEXT["vocab_size"], (count, 8), generator=generator)


@needs("open_clip")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.full
def test_without_prompts_it_is_the_model_of_open_clip(tower):
    images, texts = batch()
    expected = small_clip(tower)(images, texts)
    model = ImageTextModel(small_clip(tower), num_prompts=0).eval()
    torch.testing.assert_close(model.encode_image(images), expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.encode_text(texts), expected[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.clip(images, texts)[0], expected[0], rtol=1e-9, atol=1e-9)


@needs("open_clip")
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.full
def test_the_loss_is_the_model_s_own(tower):
    """Cross-entropy over the batch, or SigLIP's sigmoid loss, written once more."""
    images, texts = batch()
    clip = small_clip(tower)
    model = ImageTextModel(clip, num_prompts=2).eval()
    logits = clip.logit_scale.exp() * model.encode_image(images) @ model.encode_text(texts).T
    if tower == "clip":
        own = torch.arange(4)
        expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    else:
        signs = 2 * torch.eye(4, dtype=torch.float64) - 1
        expected = -F.logsigmoid(signs * (logits + clip.logit_bias)).sum() / 4
    torch.testing.assert_close(model(images, texts), expected, rtol=1e-9, atol=1e-9)


@needs("open_clip")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.full
def test_backends_agree(tower):
    images, texts = batch()
    model = ImageTextModel(small_clip(tower), num_prompts=3, train_head=True)
    model.double().eval()
    randomize(model.tower.prompts, 1)
    results = {}
    for backend in ("reference", "torch"):
        model.zero_grad()
        with use_backend(backend):
            loss = model(images, texts)
        loss.backward()
        results[backend] = [loss, *(parameter.grad.clone() for parameter in model.trainable_parameters())]
    for ours, literal in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)


@needs("open_clip")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.full
def test_only_prompts_and_on_demand_the_projection_learn(tower, train_head):
    """The texts' features, and without train_head the projection, stay as they were to the last bit."""
    images, texts = batch()
    model = ImageTextModel(small_clip(tower), num_prompts=2, train_head=train_head).double()
    assert not model.train().clip.training
    assert model.tower.training
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(images, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] != losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == learning
    heads = {name for name in learning if "adapters.default.head." in name}
    assert bool(heads) == (train_head and tower != "siglip")
    assert all("adapters.default." in name for name in learning)


@needs("open_clip")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.full
def test_training_fits_pairs(tower):
    """Prompts alone bring the pictures of a few pairs to their texts."""
    images, texts = batch(3)
    model = ImageTextModel(
        small_clip(tower), num_prompts=4, projector_dropout=0.0, channel_dropout=0.0
    ).double()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = model(images, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@needs("open_clip")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.full
def test_adapters(tmp_path, tower):
    images, _ = batch()
    model = ImageTextModel(small_clip(tower), num_prompts=2, train_head=True).double().eval()
    randomize(model.tower.adapters, 3)
    model.save_adapter(tmp_path, metadata={"mine": 1})
    other = ImageTextModel(small_clip(tower), num_prompts=2).double().eval()
    other.load_adapter(tmp_path)
    assert torch.equal(other.encode_image(images), model.encode_image(images))
    assert other.tower.adapter_metadata["mine"] == 1
    stranger = small_clip(tower)
    with torch.no_grad():
        stranger.logit_scale.add_(1)
    with pytest.raises(AdapterError, match="text tower"):
        ImageTextModel(stranger, num_prompts=2).load_adapter(tmp_path)


@needs("open_clip")
def test_evaluation_of_a_data_set():
    model = ImageTextModel(small_clip(), num_prompts=2).train()
    images, texts = batch(6)[0].split(4), batch(30)[1].split(7)
    image_of_text = torch.arange(30) // 5
    found = evaluate_image_text(model, images, texts, image_of_text, ks=[1, 2])
    with torch.no_grad():
        both = model.eval().encode_image(torch.cat(images)), model.encode_text(torch.cat(texts))
    assert found == image_text_retrieval(*both, image_of_text, ks=[1, 2])


@needs("open_clip")
@pytest.mark.parametrize(
    "change",
    [
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True},
        {"patch_dropout": 0.5},
        {"ls_init_value": 0.1},
        {"attentional_pool": True},
        {"norm_kwargs": {"eps": 1e-6}},
        {"block_type": "custom"},
        {"layers": (1, 1, 1, 1)},
    ],
)
def test_towers_that_timm_has_not_are_refused(change):
    from open_clip.model import CLIP

    clip = CLIP(24, {**NATIVE, **change}, TEXT)
    with pytest.raises(NotImplementedError, match="can't be made in timm"):
        ImageTextModel(clip, num_prompts=1)


def test_without_open_clip(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vapt_fast\[retrieval\]'"):
        ImageTextModel(torch.nn.Identity(), num_prompts=1)


# ---- the command line


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(digit_images()[0][:30]):
        image.save(folder / f"{index:02}.png")
    return folder


@pytest.mark.parametrize("adapted", [False, True])
def test_the_nearest_pictures_of_a_folder(digits, tmp_path, adapted):
    model = BACKBONE
    if adapted:
        AdaptiveViT(BACKBONE, pretrained=True, num_classes=2, num_prompts=2).save_adapter(
            tmp_path / "adapter"
        )
        model = tmp_path / "adapter"
    query = digits / "03.png"
    (found,) = json.loads(succeed("retrieve", model, query, "--gallery", digits, "--top", 4, "--json").stdout)
    loaded = (
        AdaptiveViT.from_adapter(model) if adapted else timm.create_model(BACKBONE, pretrained=True).eval()
    )
    images = AdaptiveViT(BACKBONE, num_prompts=0).transform()
    pictures = torch.stack([images(image) for image in digit_images()[0][:30]])
    with torch.no_grad():
        all_features = image_features(loaded, pictures)
    similarity = all_features @ all_features[3]
    order = [index for index in similarity.argsort(descending=True).tolist() if index != 3][:4]
    assert [entry["file"] for entry in found["nearest"]] == [
        str(digits / f"{index:02}.png") for index in order
    ]
    got = torch.tensor([entry["similarity"] for entry in found["nearest"]])
    torch.testing.assert_close(got, similarity[order])


def test_the_command_reports_what_is_no_image(digits, tmp_path):
    (tmp_path / "note.png").write_text("no image")
    result = invoke("retrieve", BACKBONE, digits / "00.png", tmp_path / "note.png", "--gallery", digits)
    assert result.exit_code == 2
    assert "note.png" in result.stderr
    assert "00.png" in result.stdout
    assert "none of the 1 files" in error_of("retrieve", BACKBONE, tmp_path / "note.png", "--gallery", digits)
    missing = error_of("retrieve", "no_such_model", digits, "--gallery", tmp_path / "none")
    assert "--gallery must be a folder" in missing
    assert "adapters" in error_of("retrieve", BACKBONE, digits, "--gallery", digits, "--backend", "torch")
    assert "does not exist" in error_of("retrieve", "no_such_model", digits, "--gallery", digits)

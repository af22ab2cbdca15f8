"""The files of an adapter: their format, damaged ones, interrupted saves, several processes."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_adapters import CONFIG, SMALL, WEIGHTS, edit_config, forge, learned, make_model, same, timm_model
from torch import nn

import vapt_fast
from vapt_fast import AdapterError, AdaptiveViT, adapters, files

METADATA = {"note": "first", "accuracy": 0.5}

other_save = pytest.mark.filterwarnings("ignore:.*was not saved together with")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ``make_model()``."""
    make_model().save_adapter(tmp_path / "adapter", metadata=METADATA)
    return tmp_path / "adapter"


def assert_refused(folder: Path, *parts: str) -> AdapterError:
    """Loading fails with a message that has all these parts, and changes nothing."""
    model, unchanged = make_model(seed=1), make_model(seed=1).state_dict()
    model.adapter_metadata = {"own": 1}
    with pytest.raises(AdapterError) as raised:
        model.load_adapter(folder)
    for part in parts:
        assert part in str(raised.value)
    assert same(model.state_dict(), unchanged)
    assert model.adapter_metadata == {"own": 1}
    return raised.value


# ---- the format, which later versions read


def test_format_1_is_read() -> None:
    """An adapter as the first version wrote it, with its backbone and the logits it gave in float64."""
    model = AdaptiveViT.from_adapter(Path(__file__).parent / "golden" / "adapter_format_1")
    images = torch.linspace(-1, 1, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32)
    expected = torch.tensor([model.adapter_metadata["logits"]], dtype=torch.float64)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-9)
    assert model.class_names == ("ant", "bee")


def test_keys_of_the_config(folder: Path) -> None:
    config = adapters.read_config(folder)
    assert config == json.loads((folder / CONFIG).read_text())
    assert config["library_version"] == vapt_fast.__version__
    assert config.keys() == {
        *("format_version", "library", "library_version", "config_sha256"),
        *("peft_type", "base_model_name_or_path"),
        *("backbone", "prompts", "heads", "class_names", "data", "tensors", "metadata"),
    }
    assert config["backbone"].keys() == {
        *("name", "architecture", "args", "args_left_out", "weights_path", "pretrained", "file_sha256"),
        *("num_classes", "depth", "dim", "grid", "patch_size", "num_prefix_tokens", "global_pool"),
        *("fingerprint", "precision"),
    }
    assert config["tensors"].keys() == learned(make_model()).keys()
    assert config["tensors"]["head.bias"].keys() == {"dtype", "shape", "sha256"}


def test_an_adapter_that_is_loaded_and_saved_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = make_model(seed=1)
    model.load_adapter(folder)
    model.save_adapter(tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_adapters_of_the_first_days_are_read(folder: Path) -> None:
    """Heads were part of the backbone, and there were no class names and crop modes."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    old = {f"backbone.{n}" if n.startswith("head") else n: value for n, value in tensors.items()}
    config = json.loads((folder / CONFIG).read_text())
    config["tensors"] = adapters.file.tensor_table(safetensors.torch.save(old))
    del config["class_names"], config["data"]["crop_mode"]
    for name, content in forge(config, old).items():
        (folder / name).write_bytes(content)
    model = make_model(seed=1)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))


def test_unknown_keys_layout_and_edited_metadata_are_tolerated(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(future={"a": 1}))
    config = json.loads((folder / CONFIG).read_text())
    config |= {"peft_type": "VAPT", "metadata": {"note": "edited"}}
    config["backbone"]["licence"] = "apache-2.0"
    (folder / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    model = make_model(seed=1)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))
    assert model.adapter_metadata == {"note": "edited"}


# ---- files that are not as they were saved


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert isinstance(assert_refused(folder, name, "does not exist"), FileNotFoundError)
    assert_refused(folder / "nowhere", "nowhere", "does not exist")
    (folder / "file").touch()
    assert_refused(folder / "file", "does not exist")


OTHER_VERSION = f"saved by vapt_fast 7.1, and this is {vapt_fast.__version__}"


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (lambda c: c.update(format_version=2), ["format_version is 2, expected 1", OTHER_VERSION]),
        (lambda c: c["prompts"].update(rank=2), ["unknown prompt options ['rank']", OTHER_VERSION]),
        (lambda c: c["prompts"].update(kind="prefix"), ["kind must be one of", OTHER_VERSION]),
        (lambda c: c["prompts"].update(num_prompts=-1), ["num_prompts must be at least 0, got -1"]),
        (lambda c: c["prompts"].update(conv_kernel="2"), ["conv_kernel must be an int, got '2'"]),
        (lambda c: c.pop("prompts"), ["'prompts' is missing"]),
        (lambda c: c["data"].update(std=[0, 1, 1]), ["data: data_config std must be positive"]),
        (lambda c: c.update(heads=["Linear"]), ["heads is ['Linear'], expected classes by name"]),
        (lambda c: c.update(class_names=["a"]), ["class_names must be 3, one a class, got 1"]),
        (lambda c: c["backbone"].update(num_classes=True), ["backbone num_classes is True"]),
        (lambda c: c["backbone"].update(file_sha256="../passwd"), ["file_sha256 is '../passwd'"]),
        (lambda c: c["backbone"].update(file_sha256="0" * 63), ["file_sha256 is"]),
        (lambda c: c["backbone"].update(file_sha256=5), ["file_sha256 is 5"]),
        (lambda c: c["tensors"].pop("prompts.blocks.0.table"), ["saved no such tensor, now"]),
        (lambda c: c["tensors"].update(extra={}), ["extra: missing"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "edit",
)
def test_forged_config(folder: Path, edit: Callable[[dict[str, Any]], None], messages: list[str]) -> None:
    edit_config(folder, lambda config: [config.update(library_version="7.1"), edit(config)])
    assert_refused(folder, *messages)


def test_edited_config(folder: Path) -> None:
    """Without another checksum: in adapter_config.json alone, then in both files."""

    def edit(config: dict[str, Any]) -> None:
        config["prompts"]["projector_activation"] = "gelu"
        config["backbone"] |= {"grid": [5, 5], "fingerprint": "0"}
        config["tensors"]["prompts.blocks.0.table"] = {}

    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))
    assert_refused(
        folder,
        "was changed after it was saved",
        "prompts.projector_activation: saved 'relu', now 'gelu'",
        "backbone.grid: saved [4, 4], now [5, 5]",
        "backbone.fingerprint: saved",
        "tensors.prompts.blocks.0.table.sha256: saved",
    )
    edit_config(folder, edit, checksum=False)
    assert_refused(folder, "its config was changed after it was saved: the sha256 differs")


def test_tensors_of_integers(tmp_path: Path) -> None:
    """Such a file can only be made on purpose: same shapes, checksums in order, no floating-point numbers."""
    model = make_model()
    model.prompts.blocks[0].table = nn.Parameter(torch.ones(2, 8, dtype=torch.int32), requires_grad=False)
    model.save_adapter(tmp_path)
    assert_refused(tmp_path, "blocks.0.table: dtype torch.int32, expected floating-point numbers")


def test_exchanged_files(folder: Path, tmp_path: Path) -> None:
    """Weights are complete by themselves; a config of another save is noticed and not used."""
    make_model(seed=2).save_adapter(tmp_path / "other", metadata={"note": "other"})
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    model = make_model(seed=1)
    with pytest.warns(UserWarning, match="was not saved together with"):
        model.load_adapter(folder)
    assert same(learned(model), learned(make_model(seed=2)))
    assert model.adapter_metadata == {"note": "other"}

    safetensors.torch.save_file(learned(make_model()), folder / WEIGHTS)
    assert_refused(folder, "not a file that save_adapter wrote")
    (folder / WEIGHTS).write_bytes((folder / CONFIG).read_bytes())
    assert_refused(folder, "not a whole safetensors file")


# ---- 1000 damaged adapters

SEED, MUTATIONS = 20250118, 1000
NASTY = [
    None, True, False, -1, 0, 1, 2**31, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "\x00", "é",
    "../../etc/passwd", [], {}, [[]], {"": {}}, [1, 2], "relu", "0" * 64,
]  # fmt: skip


def _flip_bits(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _replace_part(data: bytes, rng: random.Random) -> bytes:
    """Cut out, insert or overwrite."""
    start, stop = sorted(rng.choices([0, 8, len(data), *range(len(data) + 1)], k=2))
    filling = [b"", b"\0" * 9, b" ", b"[" * 99999, data, b"\0" * (stop - start), rng.randbytes(stop - start)]
    return data[:start] + rng.choice(filling) + data[rng.choice([start, stop, len(data)]) :]


def _containers(value: Any) -> Iterator[dict | list]:
    if isinstance(value, (dict, list)) and value:
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _containers(child)


def _edit_json(text: bytes, rng: random.Random) -> bytes:
    """Change, remove, rename or add a random value of a JSON document, or only its layout."""
    document = json.loads(text)
    container = rng.choice(list(_containers(document)))
    key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
    action = rng.choice(["set", "set", "set", "remove", "rename", "layout"])
    if action == "set":
        container[key] = rng.choice(NASTY)
    elif action == "remove":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice(["x", "", key + "x"])] = container.pop(key)
    return json.dumps(document, indent=rng.choice([None, 1, 4]), ensure_ascii=rng.random() < 0.5).encode()


def _edit_header(data: bytes, rng: random.Random) -> bytes:
    """Edit the header of a safetensors file and write its length anew."""
    length = int.from_bytes(data[:8], "little")
    header = _edit_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _mutate(config: bytes, weights: bytes, rng: random.Random) -> dict[str, bytes]:
    kinds = ["config", "config json", "weights", "weights", "weights header", "both", "forge", "swap"]
    kind = rng.choice(kinds)
    damage = rng.choice([_flip_bits, _replace_part])
    if kind == "forge":
        return forge(json.loads(_edit_json(config, rng)), safetensors.torch.load(weights))
    if kind == "swap":
        return {CONFIG: rng.choice([config, weights]), WEIGHTS: config}
    if kind in ("config", "both"):
        config = damage(config, rng)
    if kind in ("weights", "both"):
        weights = damage(weights, rng)
    if kind == "config json":
        config = _edit_json(config, rng)
    if kind == "weights header":
        weights = _edit_header(weights, rng)
    return {CONFIG: config, WEIGHTS: weights}


@other_save
def test_damaged_files(folder: Path) -> None:
    """Each is refused with the model unchanged or, if harmless, gives the adapter as it was saved."""
    rng = random.Random(SEED)
    original = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    expected, model, before = learned(make_model()), make_model(seed=1), make_model(seed=1).state_dict()
    num_refused = 0
    for number in range(MUTATIONS):
        for name, content in _mutate(*original, rng).items():
            (folder / name).write_bytes(content)
        model.adapter_metadata, problems = {}, None
        try:
            model.load_adapter(folder)
        except AdapterError as error:
            problems = error.problems
        except Exception as error:
            pytest.fail(f"mutation {number} of seed {SEED}: {type(error).__name__}: {error}")
        if problems is None:
            assert same(learned(model), expected), f"mutation {number} of seed {SEED}"
            model.load_state_dict(before)
        else:
            num_refused += 1
            assert problems
            assert same(model.state_dict(), before)
            assert model.adapter_metadata == {}
    assert 0.5 * MUTATIONS < num_refused < 0.98 * MUTATIONS


# ---- interrupted saves


class DiskFull(OSError):
    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "No space left on device")


def interrupt(patch: pytest.MonkeyPatch, step: str, turn: int, error: type[BaseException]) -> None:
    """Let a step of saving the file of this number (from 0) fail, a write when half of it is done."""
    calls, function = iter(range(99)), open if step in ("open", "write") else getattr(os, step)

    class HalfWritten(io.FileIO):
        def write(self, content: bytes) -> int:
            super().write(content[: len(content) // 2])
            raise error()

    def failing(*args: Any) -> Any:
        if next(calls) != turn:
            return function(*args)
        if step == "write":
            return HalfWritten(*args)
        raise error()

    patch.setattr(files if function is open else os, function.__name__, failing, raising=False)


STEPS = ["open", "write", "fsync", "replace"]


@pytest.mark.parametrize("error", [DiskFull, KeyboardInterrupt])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("step", STEPS)
@other_save
def test_interrupted_saves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, turn: int, error: type[BaseException]
) -> None:
    """The earlier adapter stays; where there was none, there is none; and the next save is as any other."""
    for place in (folder, folder / "new"):
        with monkeypatch.context() as patch:
            interrupt(patch, step, turn, error)
            with pytest.raises(error):
                make_model(seed=3).save_adapter(place, metadata={"note": "second"})
    assert set(os.listdir(folder / "new")) <= {CONFIG}
    assert_refused(folder / "new", "does not exist")
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, "new"]
    model = make_model(seed=1)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))
    assert model.adapter_metadata == METADATA
    make_model(seed=3).save_adapter(folder)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model(seed=3)))


def test_a_backbone_never_takes_the_place_of_one_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [AdaptiveViT(timm_model(seed), prompts=SMALL) for seed in (0, 1)]
    models[0].save_adapter(tmp_path, include_backbone=True)
    with monkeypatch.context() as patch:
        interrupt(patch, "replace", 2, DiskFull)  # the adapter itself
        with pytest.raises(DiskFull):
            models[1].save_adapter(tmp_path, include_backbone=True)
    with pytest.warns(UserWarning, match="was not saved together with"):
        assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), models[0].state_dict())
    (tmp_path / "backbone-of-mine.safetensors").touch()
    models[1].save_adapter(tmp_path, include_backbone=True)  # and removes those that no adapter needs
    assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), models[1].state_dict())
    assert len(os.listdir(tmp_path)) == 4
    models[1].save_adapter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, "backbone-of-mine.safetensors"]


# ---- other processes

SAVE_FOREVER = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
from small_adapters import make_model
models = [make_model(seed=seed) for seed in (0, 2)]
for turn in itertools.count():
    models[turn % 2].save_adapter(sys.argv[2], metadata={"seed": 2 * (turn % 2)})
    print(turn, flush=True)
"""


@other_save
def test_readers_and_a_killed_writer(tmp_path: Path) -> None:
    """While a process saves over and over, and after it is killed, each load gives one whole adapter."""
    states = {seed: learned(make_model(seed=seed)) for seed in (0, 2)}
    model, seen = make_model(seed=1), set()

    def check() -> None:
        model.load_adapter(tmp_path)
        assert same(learned(model), states[model.adapter_metadata["seed"]])
        seen.add(model.adapter_metadata["seed"])

    tools = str(Path(__file__).parents[1] / "tools")
    command = [sys.executable, "-c", SAVE_FOREVER, tools, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "0\n"
        while len(seen) < len(states) and writer.poll() is None:
            check()
        for _ in range(50):
            check()
    finally:
        writer.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        writer.wait(60)
        writer.stdout.close()
    check()
    assert seen == {0, 2}

"""``vapt-fast serve``: what it refuses before anything is started."""

from __future__ import annotations

import importlib
import io
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from command import error_of
from small_adapters import timm_model
from stacks import save_adapter

from vapt_fast import AdaptiveViT
from vapt_fast.serving import ServeOptions, token_digest
from vapt_fast.serving.store import Store
from vapt_fast.training import UserError

module = importlib.import_module("vapt_fast.cli.serve")


@pytest.fixture
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that must not be started."""

    def start(*args: object, **options: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(module, "check_installed", lambda: None)
    monkeypatch.setattr(module, "start", start)


@pytest.mark.usefixtures("without_engine")
@pytest.mark.parametrize(
    "arguments",
    [
        ["{folder}"],
        ["a="],
        ["={folder}"],
        ["a.b={folder}"],
        ["a={folder}", "a={folder}"],
        ["a={folder}/missing"],
        ["a={folder}", "b={folder}/missing"],
        ["a={folder}", "--token-file", "{folder}/missing"],
        ["a={folder}", "--token-file", "{empty}"],
        ["a={folder}", "--device", "nonsense"],
        ["a={folder}", "--backend", "nonsense"],
        ["a={folder}", "--host", "192.0.2.77"],  # of no machine
        ["a={folder}", "b={shallow}"],
        ["a={folder}", "b={diverged}"],
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str]) -> None:
    folder, empty = tmp_path / "a", tmp_path / "empty"
    save_adapter(folder, 0)
    empty.write_text("\n")
    shallow = tmp_path / "shallow"
    AdaptiveViT(timm_model(), kind="shallow", num_prompts=2).save_adapter(shallow)
    diverged = tmp_path / "diverged"
    model = AdaptiveViT(timm_model(), num_prompts=2)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    model.save_adapter(diverged)
    places = {"folder": folder, "empty": empty, "shallow": shallow, "diverged": diverged}
    filled = [argument.format(**places) for argument in arguments]
    error_of(
        "serve", *filled, "--store", tmp_path / "store", code=1 if "{folder}/missing" in arguments else 2
    )
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("without_engine")
def test_the_first_adapter_and_the_largest_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def start(options: ServeOptions, **places: Any) -> None:
        given.extend((options, places))
        raise UserError("as far as the test needs it")

    monkeypatch.setattr(module, "start", start)
    for name, classes in (("a", 3), ("b", 5)):
        save_adapter(tmp_path / name, 0, classes)
    (tmp_path / "token").write_text("secret\n")
    folders = [f"{name}={tmp_path / name}" for name in "ab"]
    places = ["--store", tmp_path / "store", "--token-file", tmp_path / "token"]
    error_of("serve", *folders, *places, "--device", "cpu", "--replicas", 2)
    options, others = given
    assert (options.first, options.max_classes) == (str(tmp_path / "a"), 5)
    assert options.token_sha256 == token_digest("secret")
    assert (others["replicas"], others["gpus"]) == (2, 0.0)
    assert Store(options.store).versions().keys() == {"a", "b"}


@pytest.mark.usefixtures("without_engine")
def test_an_adapter_that_no_replica_can_load_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    stopped: list[bool] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if url.endswith("/b"):
            answer = io.BytesIO(b'{"error": "it does not fit"}')
            raise urllib.error.HTTPError(url, 422, "", Message(), answer)
        return io.BytesIO(b"{}")

    monkeypatch.setattr(module, "start", lambda *args, **options: None)
    monkeypatch.setattr(module, "stop", lambda: stopped.append(True))
    monkeypatch.setattr(module.urllib.request, "urlopen", urlopen)
    for name in "ab":
        save_adapter(tmp_path / name, 0)
    folders = [f"{name}={tmp_path / name}" for name in "ab"]
    error = error_of("serve", *folders, "--store", tmp_path / "store", "--host", "0.0.0.0", "--port", 8150)
    assert "b: it does not fit" in error
    assert asked == [f"http://127.0.0.1:8150/adapters/{name}" for name in "ab"]
    assert stopped == [True]

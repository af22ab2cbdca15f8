"""Adapters on the Hugging Face Hub, for which a folder stands in."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, ModelCard, errors
from small_adapters import CONFIG, WEIGHTS, learned, make_model, same, timm_model

from vapt_fast import AdapterError, AdaptiveViT, adapters
from vapt_fast.adapters import AdapterNotFoundError
from vapt_fast.source import hub_repository


def http_error(kind: type[Exception]) -> Exception:
    request = SimpleNamespace(headers={}, method="GET", url="https://huggingface.co")
    return kind("the hub said no", response=SimpleNamespace(headers={}, request=request, status_code=404))


class Hub:
    """Repositories as folders: ``repositories/owner/name/commits/<commit>/``, and a file for each branch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads: list[tuple[str, tuple[str, ...]]] = []
        self.fails: Exception | None = None

    def __call__(self, **options: Any) -> Hub:
        """What HfApi(...) is."""
        if self.fails is not None:
            raise self.fails
        self.options = options
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        if not self._repo(repo_id).exists():
            self._branch(repo_id, "main").parent.mkdir(parents=True)
            self._commit(repo_id, "main", {".gitattributes": b""})

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        if not self._branch(repo_id, branch).exists():
            shutil.copy(self._branch(repo_id, "main"), self._branch(repo_id, branch))

    def list_repo_files(self, repo_id: str, *, revision: str | None) -> list[str]:
        return [path.name for path in self.snapshot(repo_id, revision).iterdir()]

    def create_commit(
        self, repo_id: str, operations: list[Any], *, commit_message: str, revision: Any, create_pr: bool
    ) -> Any:
        files = {path.name: path.read_bytes() for path in self.snapshot(repo_id, revision).iterdir()}
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
            else:
                del files[operation.path_in_repo]
        commit = self._commit(repo_id, "pr-1" if create_pr else revision or "main", files)
        return SimpleNamespace(pr_url="pull request" if create_pr else None, commit_url=commit)

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        source = self.snapshot(repo_id, revision)
        self.downloads.append((source.name, tuple(allow_patterns)))
        cache = self.folder / "cache" / repo_id / "snapshots" / source.name
        cache.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (source / name).exists():
                shutil.copy(source / name, cache / name)
        return str(cache)

    def snapshot(self, repo_id: str, revision: str | None = None) -> Path:
        if not self._repo(repo_id).exists():
            raise http_error(errors.RepositoryNotFoundError)
        branch = self._branch(repo_id, revision or "main")
        commit = self._repo(repo_id) / "commits" / (branch.read_text() if branch.exists() else str(revision))
        if not commit.exists():
            raise http_error(errors.RevisionNotFoundError)
        return commit

    def _repo(self, repo_id: str) -> Path:
        return self.folder / "repositories" / repo_id

    def _branch(self, repo_id: str, name: str) -> Path:
        return self._repo(repo_id) / "branches" / name

    def _commit(self, repo_id: str, branch: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:40]
        folder = self._repo(repo_id) / "commits" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        self._branch(repo_id, branch).write_text(commit)
        return commit


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def test_what_is_pushed_is_loaded(hub: Hub) -> None:
    model = make_model(seed=1)
    model.push_adapter("me/birds", class_names=["a", "b", "c"], metadata={"note": 1}, token="secret")
    assert hub.options["token"] == "secret"
    other = make_model(seed=2)
    other.load_adapter("hf-hub:me/birds")
    assert same(learned(other), learned(model))
    assert (other.class_names, other.adapter_metadata) == (("a", "b", "c"), {"note": 1})
    assert adapters.read_config("hf-hub:me/birds")["metadata"] == {"note": 1}
    assert {names for _, names in hub.downloads} == {(CONFIG, WEIGHTS)}


def test_a_revision_is_a_branch_or_a_commit(hub: Hub) -> None:
    first, second = make_model(seed=1), make_model(seed=2)
    commit = first.push_adapter("me/birds")
    second.push_adapter("me/birds", revision="better")
    loaded = make_model()
    for revision, expected in (("", first), ("@better", second), (f"@{commit}", first)):
        loaded.load_adapter(f"hf-hub:me/birds{revision}")
        assert same(learned(loaded), learned(expected))


def test_a_pull_request_leaves_the_branch_alone(hub: Hub) -> None:
    make_model(seed=1).push_adapter("me/birds")
    before = hub.snapshot("me/birds")
    assert make_model(seed=2).push_adapter("me/birds", create_pr=True) == "pull request"
    assert hub.snapshot("me/birds") == before


def test_the_backbone_comes_along_only_where_it_is_needed(hub: Hub) -> None:
    model = AdaptiveViT(timm_model(seed=1), num_prompts=2)
    model.push_adapter("me/whole", include_backbone=True)
    AdaptiveViT(timm_model(seed=2), num_prompts=2).push_adapter("me/whole", include_backbone=True)
    model.push_adapter("me/whole", include_backbone=True)
    pushed = {path.name for path in hub.snapshot("me/whole").iterdir()}
    (backbone,) = pushed - {CONFIG, WEIGHTS, "README.md", ".gitattributes"}  # that of the second is gone
    AdaptiveViT(timm_model(seed=1), num_prompts=2).load_adapter("hf-hub:me/whole")
    AdaptiveViT.from_adapter("hf-hub:me/whole", backbone=timm_model(seed=1))
    assert {names for _, names in hub.downloads} == {(CONFIG, WEIGHTS)}
    loaded = AdaptiveViT.from_adapter("hf-hub:me/whole")
    assert hub.downloads[-1] == (hub.snapshot("me/whole").name, (backbone,))
    assert same(loaded.state_dict(), model.state_dict())


def test_files_that_were_exchanged_on_the_hub_are_refused(hub: Hub) -> None:
    make_model().push_adapter("me/birds")
    path = hub.snapshot("me/birds") / CONFIG
    config = json.loads(path.read_text())
    config["backbone"]["num_classes"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="changed after it was saved"):
        make_model().load_adapter("hf-hub:me/birds")


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (http_error(errors.RepositoryNotFoundError), AdapterNotFoundError, "check the name, or log in"),
        (http_error(errors.GatedRepoError), AdapterNotFoundError, "ask for access"),
        (http_error(errors.RevisionNotFoundError), AdapterNotFoundError, "no such branch"),
        (errors.LocalEntryNotFoundError("offline"), AdapterError, "can't be reached"),
        (errors.OfflineModeIsEnabled("offline"), AdapterError, "HF_HUB_OFFLINE"),
        (errors.HFValidationError("bad name"), AdapterError, "owner/name"),
        (ConnectionError("cable"), AdapterError, "cable"),
    ],
)
def test_what_the_hub_refuses_is_one_error_with_advice(
    hub: Hub, error: Exception, kind: type[Exception], advice: str
) -> None:
    hub.fails = error
    model = make_model()
    for call in (
        lambda: model.load_adapter("hf-hub:me/birds@v1"),
        lambda: AdaptiveViT.from_adapter("hf-hub:me/birds@v1"),
        lambda: model.push_adapter("me/birds"),
    ):
        with pytest.raises(kind, match=advice) as raised:
            call()
        assert "me/birds" in str(raised.value)


def test_a_repository_without_adapter(hub: Hub) -> None:
    hub.create_repo("me/empty", private=None, exist_ok=True)
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        make_model().load_adapter("hf-hub:me/empty")
    with pytest.raises(AdapterNotFoundError):
        make_model().load_adapter("hf-hub:me/missing")
    make_model().push_adapter("me/birds")
    with pytest.raises(AdapterNotFoundError, match="branch"):
        make_model().load_adapter("hf-hub:me/birds@v9")


@pytest.mark.full
def test_the_real_client_refuses_offline(tmp_path: Path) -> None:
    code = (
        "import vapt_fast\n"
        "try: vapt_fast.adapters.read_config('hf-hub:me/birds')\n"
        "except vapt_fast.AdapterError as error: print(error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert "hf-hub:me/birds" in result.stdout


def test_an_adapter_is_not_saved_to_a_folder_of_the_hubs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="push_adapter"):
        make_model().save_adapter("hf-hub:me/birds")
    assert not any(tmp_path.iterdir())


# ---- the card


def card_of(hub: Hub, model: AdaptiveViT, **options: Any) -> ModelCard:
    model.push_adapter("me/birds", **options)
    return ModelCard((hub.snapshot("me/birds") / "README.md").read_text())


def test_card(hub: Hub) -> None:
    model = AdaptiveViT(timm_model(), num_prompts=2)
    names = ["crow", "owl\n---\nlicense: mit", "`tit`"]
    options = {"license": "apache-2.0", "datasets": ["birds"], "tags": ["birds"], "class_names": names}
    card = card_of(hub, model, metrics={"accuracy": 0.5}, **options)
    config = adapters.read_config("hf-hub:me/birds")
    assert config["base_model_name_or_path"] == card.data.base_model
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("vapt_fast", "image-classification")
    assert data["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert (data["base_model_relation"], data["license"]) == ("adapter", "apache-2.0")
    assert (data["datasets"], data["metrics"]) == (["birds"], ["accuracy"])
    assert "birds" in data["tags"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_value) == ("birds", 0.5)
    for name in names:
        assert json.dumps(name).replace("`", "\\u0060") in card.text


def test_card_of_a_backbone_that_the_hub_has_not(hub: Hub) -> None:
    card = card_of(hub, make_model(), metadata={"test_accuracy": 0.25})
    assert card.data.base_model is None
    assert card.data.metrics == ["accuracy"]
    assert "0.25" in card.text
    assert card.data.eval_results is None


def test_a_card_that_is_there_stays(hub: Hub) -> None:
    make_model().push_adapter("me/birds")
    path = hub.snapshot("me/birds") / "README.md"
    path.write_text("mine")
    make_model(seed=1).push_adapter("me/birds")
    assert (hub.snapshot("me/birds") / "README.md").read_text() == "mine"
    make_model(seed=2).push_adapter("me/birds", replace_card=True)
    assert (hub.snapshot("me/birds") / "README.md").read_text() != "mine"


@pytest.mark.parametrize(
    "options", [{"datasets": "birds"}, {"tags": "birds"}, {"metrics": {"accuracy": "good"}}, {"colour": 1}]
)
def test_wrong_options_push_nothing(hub: Hub, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        make_model().push_adapter("me/birds", **options)
    assert not hub._repo("me/birds").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"name": "vit_tiny_patch16_224.augreg_in21k"}, "timm/vit_tiny_patch16_224.augreg_in21k"),
        ({"name": "hf-hub:me/backbone"}, "me/backbone"),
        ({"name": "local-dir:/folder"}, None),
        ({"name": "vit_tiny_patch16_224.augreg_in21k", "weights_path": "weights.pt"}, None),
        ({"name": "vit_tiny_patch16_224"}, None),
        ({"name": None, "architecture": None}, None),
    ],
)
def test_hub_repository(source: dict[str, Any], expected: str | None) -> None:
    known = {"architecture": "vit_tiny_patch16_224", "weights_path": None}
    assert hub_repository(known | source) == expected

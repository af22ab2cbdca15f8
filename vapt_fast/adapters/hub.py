"""Adapters on the Hugging Face Hub: their two files, a card, and the backbone's file if they have one.

huggingface_hub is imported by the functions, so that ``import vapt_fast`` stays light.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .._version import __version__
from ..source import HUB_PREFIX
from .card import model_card
from .file import BACKBONES, CONFIG_NAME, WEIGHTS_NAME, AdapterError, AdapterFile, AdapterNotFoundError, read
from .saving import save

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from ..model import AdaptiveViT

__all__ = ["add_backbone", "local_folder", "push"]

CARD_NAME = "README.md"

Result = TypeVar("Result")


def push(
    model: AdaptiveViT,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    tags: Sequence[str] = (),
    replace_card: bool = False,
    **save_options: Any,
) -> str:
    """Save an adapter to a repository of the Hugging Face Hub, in one commit.

    Args:
        model: an AdaptiveViT.
        repo_id: "owner/name"; it is made if it does not exist.
        commit_message: of the commit; None for one that names the version of this library.
        private: whether a repository that is made is private; None for the owner's default.
        token: of the Hub; None for the one of ``hf auth login`` or the environment variable HF_TOKEN.
        revision: a branch, which is made if it does not exist; None for the main one.
        create_pr: open a pull request instead of changing the branch.
        license, datasets, tags: for the card, in the Hub's words: "apache-2.0", ["cifar100"], ...
        metrics: results for the card, as {"accuracy": 0.91}, of the first of ``datasets`` if there is one.
            None for the accuracy in the adapter's metadata, where ``vapt-fast train`` leaves it.
        replace_card: write the card anew where the repository has one; else that stays.
        **save_options: as for ``save``: ``name``, ``metadata``, ``class_names``, ``data_config``,
            ``include_backbone``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        TypeError: an option that neither this function nor ``save`` has.
        AdapterError: an adapter that can't be saved, or what the Hub answered, with advice.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, **save_options)
        card = model_card(
            read(Path(folder)), repo_id, license=license, datasets=datasets, metrics=metrics, tags=tags
        )
        (Path(folder) / CARD_NAME).write_text(card, encoding="utf-8")

        def upload(api: HfApi) -> str:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = set(api.list_repo_files(repo_id, revision=revision))
            commit = api.create_commit(
                repo_id,
                _operations(Path(folder), there, replace_card),
                commit_message=commit_message or f"Adapter saved by vapt_fast {__version__}",
                revision=revision,
                create_pr=create_pr,
            )
            return str(commit.pr_url or commit.commit_url)

        return _ask(f"the adapter can't be pushed to {repo_id!r}", upload, token)


def _operations(folder: Path, there: set[str], replace_card: bool) -> list[Any]:
    """The changes of one commit: all files of the folder, and no backbone of an earlier adapter."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    new = {path.name for path in folder.iterdir()}
    if CARD_NAME in there and not replace_card:
        new.remove(CARD_NAME)
    stale = sorted(name for name in there - new if BACKBONES.fullmatch(name))
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sorted(new)]
    return [*added, *(CommitOperationDelete(path_in_repo=name) for name in stale)]


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """Return ``folder``, or where an adapter of the Hub, "hf-hub:owner/name@revision", was downloaded to.

    Only the two files of the adapter are, both of one commit.

    Raises:
        AdapterNotFoundError: no such repository or revision, or no access to it.
        AdapterError: the Hub can't be reached, or a name that is none.
    """
    if not is_on_hub(folder):
        return Path(folder)
    repo_id, _, revision = os.fspath(folder).removeprefix(HUB_PREFIX).partition("@")
    return _download(folder, repo_id, revision or None, [CONFIG_NAME, WEIGHTS_NAME])


def add_backbone(folder: str | os.PathLike[str], adapter: AdapterFile) -> None:
    """Download the backbone's file that the adapter names, from the commit that the adapter is of."""
    if is_on_hub(folder) and adapter.backbone_path is not None:
        repo_id = os.fspath(folder).removeprefix(HUB_PREFIX).partition("@")[0]
        commit = adapter.folder.name  # so the Hub's client calls the folders of its cache
        _download(folder, repo_id, commit, [adapter.backbone_path.name])


def is_on_hub(folder: str | os.PathLike[str]) -> bool:
    """Return whether this names an adapter of the Hub, and no folder of this machine."""
    return os.fspath(folder).startswith(HUB_PREFIX)


def _download(source: object, repo_id: str, revision: str | None, names: list[str]) -> Path:
    def download(api: HfApi) -> str:
        return api.snapshot_download(repo_id, revision=revision, allow_patterns=names)

    return Path(_ask(f"{str(source)!r} can't be downloaded", download))


def _ask(summary: str, call: Callable[[HfApi], Result], token: str | None = None) -> Result:
    """Return what the call to the Hub returns, its errors being AdapterErrors with advice."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    not_found: dict[type[Exception], str] = {  # the special ones first
        GatedRepoError: "ask for access on its page, then log in: `hf auth login`, or HF_TOKEN",
        RepositoryNotFoundError: (
            "there is no such repository, or it is private: check the name, or log in: `hf auth login`, or "
            "HF_TOKEN"
        ),
        RevisionNotFoundError: "the repository has no such branch, tag or commit: check what follows the @",
    }
    refused: dict[type[Exception], str] = {
        LocalEntryNotFoundError: (
            "the Hub can't be reached and its cache on this machine lacks the files: go online once, or pass "
            "a folder that holds them"
        ),
        OfflineModeIsEnabled: "unset HF_HUB_OFFLINE",
        HFValidationError: f"expected owner/name; to load, {HUB_PREFIX}owner/name@revision",
    }
    try:
        return call(HfApi(token=token, library_name="vapt_fast", library_version=__version__))
    except Exception as error:  # whatever the client, its transports or the network raise
        reason = f"{type(error).__name__}: {error}"
        for kinds, result in ((not_found, AdapterNotFoundError), (refused, AdapterError)):
            for kind, advice in kinds.items():
                if isinstance(error, kind):
                    raise result(summary, [advice, reason]) from error
        raise AdapterError(summary, [reason]) from error

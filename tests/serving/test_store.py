"""The folder of adapters that all replicas of a server read."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_adapters import timm_model
from stacks import save_adapter

from vapt_fast import AdaptiveViT
from vapt_fast.serving import Refusal, ServeOptions
from vapt_fast.serving import store as module
from vapt_fast.serving.engine import add_adapters, make_stack
from vapt_fast.serving.store import FILE_NAMES, Store, check_name, files_below, read_files


def files(content: str) -> dict[str, bytes]:
    return {name: f"{name} {content}".encode() for name in FILE_NAMES}


def test_a_change_is_seen_by_who_has_read_the_store_before(tmp_path: Path) -> None:
    one, other = Store(tmp_path), Store(tmp_path)
    assert other.versions() == {}
    first, second = one.add(files("1")), one.add(files("2"))
    assert first != second
    assert one.publish("a", first)
    assert other.versions() == {"a": first}
    assert not one.publish("a", second)
    assert other.versions() == {"a": second}
    assert read_files(other.folder(second), most=1000) == files("2")
    assert other.remove("a")
    assert not other.remove("a")
    assert one.versions() == {}


def test_the_same_files_are_one_version(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.add(files("1")) == store.add(files("1"))
    assert len(list((tmp_path / "versions").iterdir())) == 1


def test_many_changes_at_a_time_lose_none(tmp_path: Path) -> None:
    def change(index: int) -> None:
        store = Store(tmp_path)
        store.publish(f"a{index}", store.add(files(str(index % 3))))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(change, range(32)))
    assert Store(tmp_path).versions().keys() == {f"a{index}" for index in range(32)}


def test_old_versions_are_removed_once_no_adapter_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    old, kept, fresh = (store.add(files(content)) for content in "123")
    store.publish("a", old)
    store.publish("b", kept)
    for version in (old, kept):
        os.utime(store.folder(version), (0, 0))
    store.remove("a")
    assert [store.folder(version).exists() for version in (old, kept, fresh)] == [False, True, True]
    store.discard(kept)
    store.discard(fresh)
    assert [store.folder(version).exists() for version in (kept, fresh)] == [True, False]


def test_a_version_that_comes_again_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    version = store.add(files("1"))
    os.utime(store.folder(version), (0, 0))
    store.add(files("1"))
    store.publish("b", store.add(files("2")))
    assert store.folder(version).exists()


def test_a_version_without_files_gets_no_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    version = store.add(files("1"))
    store.discard(version)
    with pytest.raises(Refusal) as raised:
        store.publish("a", version)
    assert raised.value.status == 503
    assert store.versions() == {}


@pytest.mark.parametrize("name", ["a", "A-1_b", "9" * 64])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a.b", "a/b", "../a", "-a", "ä", "a\n", "a b", "a" * 65, "a\0"]
)
def test_wrong_names(name: str) -> None:
    with pytest.raises(Refusal) as raised:
        check_name(name)
    assert raised.value.status == 422


# ---- folders that clients name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder to read from, with an adapter in it, one beside it, and links to that."""
    for folder in (tmp_path / "root" / "in" / "deep", tmp_path / "beside"):
        folder.mkdir(parents=True)
        for name, content in files(folder.name).items():
            (folder / name).write_bytes(content)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "beside")
    (tmp_path / "root" / "files").mkdir()
    for name in FILE_NAMES:
        (tmp_path / "root" / "files" / name).symlink_to(tmp_path / "beside" / name)
    (tmp_path / "root" / "inside").symlink_to(tmp_path / "root" / "in" / "deep")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root" / "loop")
    (tmp_path / "root" / "empty").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("folder", ["in/deep", "./in/../in/deep", "inside"])
def test_folders_below_the_root(root: Path, folder: str) -> None:
    assert files_below(root, folder, most=1000) == files("deep")


@pytest.mark.parametrize(
    "folder",
    ["../beside", "link", "files", "in/../../beside", "{beside}", "", ".", "/", "a\0b", "loop", "x" * 5000],
)
def test_no_others(root: Path, folder: str) -> None:
    with pytest.raises(Refusal) as raised:
        files_below(root, folder.format(beside=root.parent / "beside"), most=1000)
    assert raised.value.status in (403, 404, 422)


@pytest.mark.parametrize(
    ("folder", "most", "status"), [("empty", 1000, 404), ("none", 1000, 404), ("in/deep", 9, 413)]
)
def test_folders_that_hold_no_adapter_or_too_much(root: Path, folder: str, most: int, status: int) -> None:
    with pytest.raises(Refusal) as raised:
        files_below(root, folder, most)
    assert raised.value.status == status


def test_the_files_of_a_version_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "no space left")

    store = Store(tmp_path)
    monkeypatch.setattr(module, "write_files", full)
    with pytest.raises(OSError, match="no space"):
        store.add(files("1"))
    assert not any((tmp_path / "versions").iterdir())


def test_an_adapter_that_cant_be_served_does_not_keep_a_server_from_starting(tmp_path: Path) -> None:
    first, other, odd = (tmp_path / name for name in ("first", "other", "odd"))
    save_adapter(first, 0, include_backbone=True)
    AdaptiveViT(timm_model(), num_classes=3, kind="deep", num_prompts=4).save_adapter(other)
    AdaptiveViT(timm_model(), num_classes=3, kind="shallow", num_prompts=9).save_adapter(odd)
    store = Store(tmp_path / "store")
    add_adapters(tmp_path / "store", {"odd": str(odd), "other": str(other), "first": str(first)})
    store.publish("gone", store.add(files("1")))
    stack = make_stack(ServeOptions(first=str(first), store=tmp_path / "store", capacity=2, max_classes=3))
    for folder in (first, other):
        stack.load_adapter(folder, name=folder.name)
    with pytest.raises(ValueError, match="kind 'shallow'"):
        stack.load_adapter(odd, name="odd")

"""One replica, without the engine: its answers, changes of adapters, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed import malformed_adapters
from PIL import Image
from replicas import TOKEN, Answer, Server, adapter_form, form, make_server
from stacks import save_adapter

from vapt_fast import AdapterStack, AdaptiveViT
from vapt_fast.adapters import CONFIG_NAME, WEIGHTS_NAME

pytest.importorskip("starlette")
pytest.importorskip("python_multipart")


def make_full_server(folder: Path) -> Server:
    """A server of the adapters "a" and "b", with different numbers of classes, in folders of these names."""
    server = make_server(folder)
    for seed, (name, num_classes) in enumerate({"a": 3, "b": 5}.items()):
        save_adapter(folder / name, seed, num_classes)
        assert server("PUT", f"/adapters/{name}", *adapter_form(folder / name)).status == 201
    return server


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_full_server(tmp_path)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The same, for tests that change nothing."""
    return make_full_server(tmp_path_factory.mktemp("server"))


def picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def expected(model: AdaptiveViT, content: bytes) -> torch.Tensor:
    with torch.inference_mode():
        return model(model.transform()(Image.open(io.BytesIO(content)))[None]).softmax(1)[0]


def check_answer(answer: Answer, model: AdaptiveViT, content: bytes, top: int) -> None:
    assert answer.status == 200, answer.body
    probabilities = expected(model, content)
    best = probabilities.argsort(descending=True)[:top].tolist()
    entries = answer.json["top"]
    assert [entry["index"] for entry in entries] == best
    assert [entry["class"] for entry in entries] == [model.class_names[index] for index in best]
    found = torch.tensor([entry["probability"] for entry in entries])
    torch.testing.assert_close(found, probabilities[best], rtol=1e-5, atol=1e-6)


# ---- answers


def test_answers_are_the_models(server: Server, tmp_path: Path) -> None:
    content = picture()
    models = [save_adapter(tmp_path / "again", seed, classes) for seed, classes in ((0, 3), (1, 5))]
    for name, model in zip("ab", models, strict=True):
        raw = server("POST", f"/predict?adapter={name}&top=9", content, "image/png", token=None)
        check_answer(raw, model, content, model.num_classes)
        sent = server("POST", "/predict", *form(image=content, adapter=name, top="2"))
        check_answer(sent, model, content, 2)
        assert raw.json["adapter"] == name
        assert raw.headers["x-replica"] == "replica-1"
    listed = server("GET", "/adapters").json["adapters"]
    assert [entry["adapter"] for entry in listed] == ["a", "b"]
    assert listed[1]["version"] == raw.json["version"]
    described = server("GET", "/adapters/b").json
    assert (described["num_classes"], described["class_names"]) == (5, list(models[1].class_names))
    assert server("GET", "/health").json == {"status": "ok", "adapters": 2}
    assert server("GET", "/metrics").body == b"up 1\n"


def test_one_batch_of_several_adapters(server: Server, tmp_path: Path) -> None:
    models = {n: save_adapter(tmp_path / "again", s, c) for n, s, c in (("a", 0, 3), ("b", 1, 5))}
    waiting: list[Any] = []

    async def batch(item: Any) -> torch.Tensor:
        """As an engine does it: the sixth image has all computed together."""
        future = asyncio.get_running_loop().create_future()
        waiting.append((item, future))
        if len(waiting) == 6:
            results = await server.service.run([item for item, _ in waiting])
            for (_, other), result in zip(waiting, results, strict=True):
                other.set_result(result)
        return await future

    async def ask() -> list[Answer]:
        calls = [
            server.call("POST", f"/predict?adapter={name}&top=5", picture(index), "image/png")
            for index, name in enumerate("abbaba")
        ]
        return await asyncio.gather(*calls)

    server.service.batch = batch
    for index, (name, answer) in enumerate(zip("abbaba", server.loop.run_until_complete(ask()), strict=True)):
        check_answer(answer, models[name], picture(index), models[name].num_classes)


# ---- changes


def test_a_replaced_adapter_answers_at_once_on_every_replica(server: Server, tmp_path: Path) -> None:
    other = make_server(tmp_path)
    before = other("POST", "/predict?adapter=a", picture(), "image/png").json["version"]
    model = save_adapter(tmp_path / "new", seed=7)
    answer = server("PUT", "/adapters/a", *adapter_form(tmp_path / "new"))
    assert answer.status == 200
    assert answer.json["version"] != before
    for replica in (server, other):
        after = replica("POST", "/predict?adapter=a&top=3", picture(), "image/png")
        check_answer(after, model, picture(), 3)
        assert after.json["version"] == answer.json["version"]
    assert server("DELETE", "/adapters/a").status == 204
    for replica in (server, other):
        assert replica("POST", "/predict?adapter=a", picture(), "image/png").status == 404
        assert replica("DELETE", "/adapters/a").status == 404
    assert other("POST", "/adapters/a", b'{"folder": "a"}', "application/json").status == 201
    assert server("POST", "/predict?adapter=a", picture(), "image/png").json["version"] == before


def test_more_adapters_than_fit_into_memory(server: Server, tmp_path: Path) -> None:
    models = {}
    for seed in range(2, 8):
        models[f"n{seed}"] = save_adapter(tmp_path / "new", seed)
        server("PUT", f"/adapters/n{seed}", *adapter_form(tmp_path / "new"))
    for name in [*models, *reversed(models), *models]:
        check_answer(
            server("POST", f"/predict?adapter={name}&top=3", picture(), "image/png"),
            models[name],
            picture(),
            3,
        )
    assert len(server.service._stack.adapters) == 4


def test_adapters_in_use_stay_in_memory(server: Server, tmp_path: Path) -> None:
    """With every place in use a request for another adapter waits; none loses its adapter."""
    for seed in range(2, 5):
        save_adapter(tmp_path / "new", seed)
        server("PUT", f"/adapters/n{seed}", *adapter_form(tmp_path / "new"))

    async def ask() -> list[Answer]:
        arrived, go = asyncio.Event(), asyncio.Event()
        entered = 0

        async def batch(item: Any) -> torch.Tensor:
            nonlocal entered
            entered += 1
            if entered == 4:
                arrived.set()
            await go.wait()
            return (await server.service.run([item]))[0]

        server.service.batch = batch
        kinds = [
            ("POST", f"/predict?adapter={name}", picture(), "image/png") for name in ("n2", "n3", "n4", "a")
        ]
        calls = [asyncio.ensure_future(server.call(*kind)) for kind in kinds]
        await asyncio.wait_for(arrived.wait(), 20)
        other = asyncio.ensure_future(server.call("POST", "/predict?adapter=b", picture(), "image/png"))
        done, _ = await asyncio.wait([other], timeout=0.2)
        assert not done
        go.set()
        return await asyncio.gather(*calls, other)

    answers = server.loop.run_until_complete(asyncio.wait_for(ask(), 30))
    assert [answer.status for answer in answers] == [200] * 5
    assert len(server.service._stack.adapters) == 4


def test_an_adapter_in_demand_keeps_no_other_out(server: Server) -> None:
    """Not even where there is room for one, and requests for it overlap all the time."""
    replica = make_server(server.folder, capacity=1)
    a, b = (("POST", f"/predict?adapter={name}", picture(), "image/png") for name in "ab")

    async def ask() -> list[int]:
        statuses: list[int] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                statuses.append((await replica.call(*a)).status)

        clients = [asyncio.ensure_future(client()) for _ in range(4)]
        await asyncio.sleep(0.2)
        for _ in range(5):
            statuses.append((await replica.call(*b)).status)
        stop.set()
        await asyncio.gather(*clients)
        return statuses

    statuses = replica.loop.run_until_complete(asyncio.wait_for(ask(), 60))
    assert len(statuses) > 10
    assert set(statuses) == {200}
    assert not replica.service._requests


def test_a_client_that_goes_away_while_its_adapter_is_read(server: Server, tmp_path: Path) -> None:
    replica = make_server(tmp_path, capacity=1)

    async def ask() -> list[int]:
        statuses = []
        for name in "abab":
            call = asyncio.ensure_future(
                replica.call("POST", f"/predict?adapter={name}", picture(), "image/png")
            )
            await asyncio.sleep(0.002)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            statuses.append((await replica.call("POST", "/predict?adapter=a", picture(), "image/png")).status)
        while replica.service._requests:
            await asyncio.sleep(0.01)
        return statuses

    statuses = replica.loop.run_until_complete(asyncio.wait_for(ask(), 30))
    assert set(statuses) == {200}
    assert replica("POST", "/predict?adapter=a", picture(), "image/png").status == 200
    assert len(replica.service._stack.adapters) == 1


def test_a_client_that_goes_away_leaves_its_adapter_to_the_batch(server: Server) -> None:
    replica = make_server(server.folder, capacity=1)

    async def ask() -> int:
        arrived, go = asyncio.Event(), asyncio.Event()

        async def batch(item: Any) -> torch.Tensor:
            arrived.set()
            await go.wait()
            return (await replica.service.run([item]))[0]

        replica.service.batch = batch
        a, b = (("POST", f"/predict?adapter={name}", picture(), "image/png") for name in "ab")
        call = asyncio.ensure_future(replica.call(*a))
        await asyncio.wait_for(arrived.wait(), 20)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        waits = asyncio.ensure_future(replica.call(*b))
        done, _ = await asyncio.wait([waits], timeout=0.2)
        assert not done
        go.set()
        return (await waits).status

    assert replica.loop.run_until_complete(asyncio.wait_for(ask(), 30)) == 200


def test_files_that_go_while_they_are_read(server: Server, tmp_path: Path) -> None:
    """The name has another version by then; that one answers."""
    replica = make_server(tmp_path)
    store = replica.service._store
    model = save_adapter(tmp_path / "new", seed=7)
    gone = store.folder(store.versions()["a"])
    versions = iter([dict(store.versions())])
    server("PUT", "/adapters/a", *adapter_form(tmp_path / "new"))
    shutil.rmtree(gone)
    now = store.versions
    store.versions = lambda: next(versions, None) or now()
    check_answer(replica("POST", "/predict?adapter=a&top=3", picture(), "image/png"), model, picture(), 3)


# ---- refusals: each has a reason, and changes nothing


def refused(server: Server, status: int, *call: Any, **options: Any) -> str:
    before = server("GET", "/adapters").json
    answer = server(*call, **options)
    assert answer.status == status, (answer.status, answer.body)
    assert answer.json.keys() == {"error"}
    assert server("GET", "/adapters").json == before
    assert server("POST", "/predict?adapter=a", picture(), "image/png").status == 200
    return answer.json["error"]


def short(value: object) -> str | None:
    """The id of a body, which is long."""
    return value[:20].decode("ascii", "replace") if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    ("status", "query", "body", "kind"),
    [
        (404, "?adapter=c", picture(), "image/png"),
        (404, "?adapter=%2e%2e%2fa", picture(), "image/png"),
        (404, "?adapter=%00", picture(), "image/png"),
        (400, "", picture(), "image/png"),
        (400, "?adapter=a", b"", "image/png"),
        (415, "?adapter=a", picture(), "text/html"),
        (415, "?adapter=a", picture(), None),
        (415, "?adapter=a", b"no image", "image/png"),
        (422, "?adapter=a", picture()[:200], "image/png"),
        (400, "?adapter=a&top=0", picture(), "image/png"),
        (400, "?adapter=a&top=-1", picture(), "image/png"),
        (400, "?adapter=a&top=1e3", picture(), "image/png"),
        (400, "?adapter=a&top=%C2%B2", picture(), "image/png"),
        (400, "?adapter=a&top=99999", picture(), "image/png"),
        (400, "?adapter=a", *form(adapter="a")),
        (400, "?adapter=a", *form(image="text")),
        (400, "", *form(image=picture(), adapter=b"a")),
        (400, "?adapter=a", *form(**{f"f{index}": "x" for index in range(40)})),
        (400, "?adapter=a", b"--x\r\n", "multipart/form-data; boundary=x"),
        (400, "?adapter=a", b"nonsense", "multipart/form-data"),
        (400, "?adapter=a", b"nonsense", "multipart/form-data; boundary=x; charset=nonsense"),
    ],
    ids=short,
)
def test_wrong_images(calm: Server, status: int, query: str, body: bytes, kind: str | None) -> None:
    refused(calm, status, "POST", f"/predict{query}", body, kind)


@pytest.mark.parametrize(
    ("status", "method", "path"),
    [
        (404, "GET", "/"),
        (404, "GET", "/adapters/a/b"),
        (405, "GET", "/predict"),
        (405, "PATCH", "/adapters/a"),
    ],
)
def test_wrong_places(calm: Server, status: int, method: str, path: str) -> None:
    refused(calm, status, method, path)


@pytest.mark.parametrize("token", [None, "", "secre", "secret ", "Secret", "sécret"])
def test_changes_need_the_token(calm: Server, token: str | None) -> None:
    for method in ("PUT", "POST", "DELETE"):
        refused(calm, 401, method, "/adapters/a", *adapter_form(calm.folder / "b"), token=token)


def test_without_a_token_changes_are_refused(tmp_path: Path) -> None:
    server = make_server(tmp_path, token_sha256=None)
    for token in (None, TOKEN, ""):
        assert server("DELETE", "/adapters/a", token=token).status == 403


def test_bodies_are_read_no_further_than_the_limit(calm: Server) -> None:
    limited = make_server(calm.folder, max_body=20_000)

    def long() -> Iterator[bytes]:
        yield from (bytes(1000) for _ in range(100))

    for url, kind in (
        ("/predict?adapter=a", "image/png"),
        ("/predict?adapter=a", "multipart/form-data; boundary=x"),
        ("/adapters/a", "multipart/form-data; boundary=x"),
        ("/adapters/a", "application/json"),
    ):
        method = "POST" if "predict" in url else "PUT"
        refused(limited, 413, method, url, long(), kind)
        assert limited(method, url, long(), kind).status == 413
        assert limited.read == 21_000
        assert limited(method, url, long(), kind, headers={"content-length": "20001"}).status == 413
        assert limited.read == 0


def test_wrong_names(calm: Server) -> None:
    for name in ("a.b", "..", "ä", "-a", "a" * 65, "a b", "%2e%2e"):
        refused(calm, 422, "PUT", f"/adapters/{name}", *adapter_form(calm.folder / "a"))


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (415, b"", None),
        (415, b"<xml/>", "application/xml"),
        (400, b"{", "application/json"),
        (400, b"\xff", "application/json"),
        (400, b"[" * 100_000, "application/json"),
        (400, b'{"folder": 1}', "application/json"),
        (400, b'{"folder": "a", "name": "b"}', "application/json"),
        (403, b'{"folder": "../elsewhere"}', "application/json"),
        (403, b'{"folder": "/etc"}', "application/json"),
        (422, b'{"folder": "a\\u0000"}', "application/json"),
        (404, b'{"folder": "store"}', "application/json"),
        (400, *form(**{CONFIG_NAME: b"{}"})),
        (400, *form(**{CONFIG_NAME: b"{}", WEIGHTS_NAME: b"x", "../other": b"x"})),
        (400, *form(**{CONFIG_NAME: "{}", WEIGHTS_NAME: "x"})),
    ],
    ids=short,
)
def test_wrong_bodies_of_changes(calm: Server, status: int, body: bytes, kind: str | None) -> None:
    refused(calm, status, "PUT", "/adapters/new", body, kind)


@pytest.mark.filterwarnings("ignore:.*was not saved together with")
def test_damaged_adapters(calm: Server) -> None:
    for files in malformed_adapters(calm.folder / "a", 40):
        reason = refused(calm, 422, "PUT", "/adapters/new", *form(**files))
        assert str(calm.folder) not in reason
    kept = {path.name for path in (calm.folder / "store" / "versions").iterdir()}
    assert kept == set(calm.service._store.versions().values())


def test_adapters_that_do_not_fit(calm: Server) -> None:
    save_adapter(calm.folder / "many", 3, num_classes=6)
    refused(calm, 422, "PUT", "/adapters/new", *adapter_form(calm.folder / "many"))
    model = save_adapter(calm.folder / "wrong", 3)
    model.head.weight.data[0, 0] = torch.nan
    model.save_adapter(calm.folder / "wrong")
    assert "NaN" in refused(calm, 422, "PUT", "/adapters/new", *adapter_form(calm.folder / "wrong"))


def test_prompts_that_the_stack_has_no_place_for(calm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AdapterStack, folder: Path, *, name: str) -> None:
        raise ValueError("prompts that travel")

    save_adapter(calm.folder / "other", 5)
    with monkeypatch.context() as context:
        context.setattr(AdapterStack, "load_adapter", refuse)
        answer = calm("PUT", "/adapters/new", *adapter_form(calm.folder / "other"))
    assert (answer.status, "prompts that travel" in answer.json["error"]) == (422, True)


def test_a_fault_is_told_without_details(calm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: AdapterStack, *args: Any) -> torch.Tensor:
        raise RuntimeError("private")

    with monkeypatch.context() as context:
        context.setattr(AdapterStack, "forward", fail)
        answer = calm("POST", "/predict?adapter=a", picture(), "image/png")
    assert answer.status == 500
    assert b"private" not in answer.body
    assert calm("POST", "/predict?adapter=a", picture(), "image/png").status == 200

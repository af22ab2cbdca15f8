"""A server under load: answers compared while adapters come and go, then what is malformed. Prints JSON.

    python tests/tools/serving_load.py --requests 10000

Each answer is compared with the one that the adapter's own model gives, and its version with those that the
name had between the request and the answer.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from malformed import malformed_adapters, malformed_requests
from PIL import Image
from replicas import TOKEN, adapter_form, form
from stacks import MOST_CLASSES, save_adapter

from vapt_fast.serving import ServeOptions, token_digest
from vapt_fast.serving.engine import add_adapters, start, stop

CLIENTS = 16
STEADY, CHANGING = [f"steady-{index}" for index in range(3)], [f"changing-{index}" for index in range(4)]
MAKES, PICTURES = 10, 6
HOST = "127.0.0.1"


class Adapters:
    """Adapters in folders, and what each answers for each picture."""

    def __init__(self, folder: Path) -> None:
        self.pictures = [_picture(seed) for seed in range(PICTURES)]
        self.folders = [folder / f"{seed}" for seed in range(MAKES)]
        self.answers: list[list[dict[str, float]]] = []
        for seed, place in enumerate(self.folders):
            model = save_adapter(place, seed, 2 + seed % 4, include_backbone=seed == 0)
            images = torch.stack([model.transform()(Image.open(io.BytesIO(p))) for p in self.pictures])
            with torch.inference_mode():
                probabilities = model(images).softmax(1).tolist()
            self.answers.append([dict(zip(model.class_names, row, strict=True)) for row in probabilities])

    def is_answer(self, seed: int, picture: int, top: list[dict[str, Any]]) -> bool:
        expected = self.answers[seed][picture]
        found = {entry["class"]: entry["probability"] for entry in top}
        return found.keys() == expected.keys() and all(
            abs(found[name] - expected[name]) < 1e-4 for name in expected
        )


class History:
    """Which adapters a name may have had, as far as a client can know."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # For each name: when a change was asked for, when it was answered, and to which adapter.
        self._changes: dict[str, list[list[Any]]] = defaultdict(list)

    def change(self, name: str, seed: int | None, call: Callable[[], int]) -> int:
        entry = [time.monotonic(), float("inf"), seed]
        with self._lock:
            self._changes[name].append(entry)
        status = call()
        entry[1] = time.monotonic()
        return status

    def possible(self, name: str, begin: float, end: float) -> set[int | None]:
        """Adapters (None: none) that a request from ``begin`` to ``end`` may have seen."""
        with self._lock:
            changes = [[-1.0, -1.0, None], *self._changes[name]]
        until = [answered for _, answered, _ in changes[1:]] + [float("inf")]
        return {
            seed
            for (asked, _, seed), gone in zip(changes, until, strict=True)
            if asked <= end and gone >= begin
        }


class Client:
    """One connection, which is made again where the server or a malformed request ends it."""

    def __init__(self, port: int) -> None:
        self._port, self._connection = port, None

    def __call__(
        self, method: str, path: str, body: Any = None, kind: str | None = None, token: str | None = TOKEN
    ) -> tuple[int, dict[str, Any], str]:
        """The status, the JSON, and the replica that answered."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(HOST, self._port, timeout=60)
        headers = {"Content-Type": kind, "Authorization": token and f"Bearer {token}"}
        try:
            self._connection.request(method, path, body, {k: v for k, v in headers.items() if v})
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException):
            self._connection = None
            raise
        return response.status, json.loads(text) if text else {}, response.headers.get("X-Replica", "")


class Load:
    """What the clients saw."""

    def __init__(self, port: int, adapters: Adapters) -> None:
        self.port, self.adapters, self.history = port, adapters, History()
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.replicas: Counter[str] = Counter()
        self.faults: list[str] = []
        self._done = threading.Event()

    def put(self, client: Client, name: str, seed: int) -> None:
        body, kind = adapter_form(self.adapters.folders[seed])
        status = self.history.change(name, seed, lambda: client("PUT", f"/adapters/{name}", body, kind)[0])
        self.counts[f"change {status}"] += 1
        if status not in (200, 201):
            self.faults.append(f"PUT {name}: {status}")

    def remove(self, client: Client, name: str) -> None:
        status = self.history.change(name, None, lambda: client("DELETE", f"/adapters/{name}")[0])
        self.counts[f"change {status}"] += 1

    def run(self, requests: int) -> float:
        """Ask, from all clients, while one changes adapters; returns the seconds."""
        admin = threading.Thread(target=self._change)
        clients = [threading.Thread(target=self._ask, args=(i, requests // CLIENTS)) for i in range(CLIENTS)]
        begin = time.monotonic()
        for thread in (admin, *clients):
            thread.start()
        for thread in clients:
            thread.join()
        seconds = time.monotonic() - begin
        self._done.set()
        admin.join()
        return seconds

    def _change(self) -> None:
        client, draw = Client(self.port), random.Random(0)
        while not self._done.wait(0.02):
            name = draw.choice(CHANGING)
            if draw.random() < 0.3:
                self.remove(client, name)
            else:
                self.put(client, name, draw.randrange(MAKES))

    def _ask(self, number: int, requests: int) -> None:
        client, draw = Client(self.port), random.Random(100 + number)
        for _ in range(requests):
            name, picture = draw.choice(STEADY + CHANGING), draw.randrange(PICTURES)
            begin = time.monotonic()
            try:
                status, answer, replica = self._predict(client, draw, name, picture)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.counts["lost"] += 1
                self.faults.append(repr(error))
                continue
            end = time.monotonic()
            self.seconds.append(end - begin)
            self.replicas[replica] += 1
            self._judge(status, answer, picture, self.history.possible(name, begin, end))

    def _predict(self, client: Client, draw: random.Random, name: str, picture: int) -> tuple[int, Any, str]:
        image = self.adapters.pictures[picture]
        if draw.random() < 0.5:
            return client("POST", f"/predict?adapter={name}&top=9", image, "image/png", None)
        return client("POST", "/predict", *form(image=image, adapter=name, top="9"), None)

    def _judge(self, status: int, answer: dict[str, Any], picture: int, possible: set[int | None]) -> None:
        if status == 200:
            seeds = possible - {None}
            right = any(self.adapters.is_answer(seed, picture, answer["top"]) for seed in seeds)
        else:
            right = status == 503 or (status == 404 and None in possible)
        self.counts[f"answered {status}" if right else "wrong"] += 1
        if not right:
            self.faults.append(f"{status} {answer}, expected one of {possible}")


def attack(load: Load, requests: int, adapters: int) -> None:
    """Send what is malformed; each gets a reason, or its connection is closed, and the server goes on."""
    client, picture = Client(load.port), load.adapters.pictures[0]
    for index, call in enumerate(malformed_requests(STEADY[0], picture, requests)):
        if isinstance(call, bytes):
            load.counts[f"malformed {_send_raw(load.port, call)}"] += 1
        else:
            _expect_refusal(load, "malformed", client, *call)
        if index % 50 == 0:
            _hang_up(load.port, STEADY[1], picture)
            _expect_service(load, client)
    for files in malformed_adapters(load.adapters.folders[1], adapters):
        _expect_refusal(load, "bad adapter", client, "PUT", f"/adapters/{CHANGING[0]}-bad", *form(**files))
    _expect_service(load, client)


def _expect_refusal(load: Load, what: str, client: Client, *call: Any) -> None:
    try:
        status, answer, _ = client(*call)
    except (OSError, http.client.HTTPException) as error:
        # Where a body is refused while it is sent, the connection may end before the answer is read.
        load.counts[f"{what}: {type(error).__name__}"] += 1
        return
    load.counts[f"{what} {status}"] += 1
    if not (400 <= status < 500 and answer.get("error")):
        load.faults.append(f"{what}: {status} {answer} for {str(call)[:200]}")


def _expect_service(load: Load, client: Client) -> None:
    for name in STEADY:
        status, answer, _ = client(
            "POST", f"/predict?adapter={name}&top=9", load.adapters.pictures[0], "image/png"
        )
        now = time.monotonic()
        load._judge(status, answer, 0, load.history.possible(name, now, now))


def _hang_up(port: int, adapter: str, picture: bytes) -> None:
    """Ask, and go away before the answer."""
    head = f"POST /predict?adapter={adapter} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with socket.create_connection((HOST, port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(picture)}\r\n\r\n".encode() + picture)


def _send_raw(port: int, content: bytes) -> str:
    """Bytes that are not HTTP, or not all of it: the connection is closed, with an answer or without."""
    with socket.create_connection((HOST, port), timeout=20) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        try:
            answer = connection.recv(12).decode("latin-1")
        except OSError:
            return "reset"
    return answer[9:12] or "closed"


def measure(
    folder: Path, *, requests: int, malformed: int, bad_adapters: int, replicas: int, port: int
) -> dict[str, Any]:
    """Start a server, put it under load, attack it, stop it; returns the figures."""
    adapters = Adapters(folder / "made")
    options = ServeOptions(
        first=str(adapters.folders[0]),
        store=folder / "store",
        capacity=8,
        max_classes=MOST_CLASSES,
        token_sha256=token_digest(TOKEN),
        max_body=2 * 10**6,
        max_pixels=10**6,
        threads=1,
    )
    add_adapters(options.store, {"first": options.first})
    begin = time.monotonic()
    start(options, replicas=replicas, port=port)
    try:
        started = time.monotonic() - begin
        load = Load(port, adapters)
        for seed, name in enumerate(STEADY):
            load.put(Client(port), name, seed)
        seconds = load.run(requests)
        attack(load, malformed, bad_adapters)
        images = _images_by_metrics(f"http://{HOST}:{port}/metrics")
    finally:
        stop()
    times = np.array(load.seconds) * 1e3
    return {
        "start_seconds": round(started, 1),
        "requests": len(times),
        "requests_per_second": round(len(times) / seconds, 1),
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p99_ms": round(float(np.percentile(times, 99)), 1),
        "by_replica": sorted(load.replicas.values()),
        "counts": dict(sorted(load.counts.items())),
        "images_by_metrics": images,
        "faults": load.faults[:20],
    }


def _images_by_metrics(url: str, patience: float = 30.0) -> float:
    """The images that all replicas have counted; they report every few seconds."""
    end = time.monotonic() + patience
    while True:
        with urllib.request.urlopen(url, timeout=30) as response:
            lines = response.read().decode().splitlines()
        counted = sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith("ray_vapt_fast_images")
        )
        if counted or time.monotonic() > end:
            return counted
        time.sleep(1)


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--malformed", type=int, default=500)
    parser.add_argument("--bad-adapters", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8137)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), **vars(parser.parse_args()))
    print(json.dumps(figures, indent=2))
    return 1 if figures["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""A server without its engine: the application of one replica, called as ASGI has it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from stacks import make_stack

from vapt_fast.adapters import CONFIG_NAME, WEIGHTS_NAME
from vapt_fast.serving import ServeOptions, token_digest
from vapt_fast.serving.service import Service

TOKEN = "secret"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """The application of one replica; ``read`` is how many bytes of the last body it took."""

    folder: Path
    service: Service
    app: Any
    read: int = 0
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __call__(self, *args: Any, **kwargs: Any) -> Answer:
        return self.loop.run_until_complete(self.call(*args, **kwargs))

    async def call(
        self,
        method: str,
        url: str,
        body: bytes | Iterator[bytes] = b"",
        kind: str | None = None,
        *,
        token: str | None = TOKEN,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        parts = urlsplit(url)
        lines = {"content-type": kind, "authorization": token and f"Bearer {token}", **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": parts.path,
            "raw_path": quote(parts.path).encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "scheme": "http",
            "server": ("testserver", 80),
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in lines.items() if v is not None],
        }
        chunks = iter([body]) if isinstance(body, bytes) else body
        sent: list[dict[str, Any]] = []
        self.read = 0

        async def receive() -> dict[str, Any]:
            chunk = next(chunks, b"")
            self.read += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        lines = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], lines, b"".join(message.get("body", b"") for message in sent[1:]))


def form(**fields: str | bytes) -> tuple[bytes, str]:
    """The body and the content type of a form; bytes are files."""
    boundary = hashlib.sha256(repr(fields).encode()).hexdigest()[:32]  # the same in every process
    parts: list[bytes] = []
    for name, value in fields.items():
        file = "" if isinstance(value, str) else f'; filename="{name}"'
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts += [head.encode(), value.encode() if isinstance(value, str) else value, b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def adapter_form(folder: Path) -> tuple[bytes, str]:
    return form(**{name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)})


async def no_metrics() -> str:
    return "up 1\n"


def make_server(folder: Path, **options: Any) -> Server:
    from vapt_fast.serving.http import make_app

    capacity = options.setdefault("capacity", 4)
    options = {"store": folder / "store", "root": folder, "token_sha256": token_digest(TOKEN)} | options
    options = {"first": "unused", "max_classes": 5, "threads": 1} | options
    service = Service(ServeOptions(**options), make_stack(capacity))
    return Server(folder, service, make_app(lambda: service, "replica-1", no_metrics))

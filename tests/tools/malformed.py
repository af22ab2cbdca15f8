"""Requests and adapters that a server has to refuse."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from replicas import form

from vapt_fast.adapters import CONFIG_NAME, WEIGHTS_NAME
from vapt_fast.adapters.file import config_sha256

Call = tuple[Any, ...]


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has nothing but zeros, compressed."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min(width * height * 3, 10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def malformed_requests(adapter: str, picture: bytes, count: int) -> Iterator[Call | bytes]:
    """Arguments of a client's call, or the bytes of what is not HTTP."""
    draw, number = random.Random(0), 0
    while number < count:
        for call in _malformed_requests(adapter, picture, draw):
            if number < count:
                yield call
            number += 1


def _malformed_requests(adapter: str, picture: bytes, draw: random.Random) -> Iterator[Call | bytes]:
    """One of each kind."""
    good, noise = f"/predict?adapter={adapter}", draw.randbytes(draw.randrange(1, 3000))
    bomb = png_bomb(draw.randrange(2000, 2**31), 2**20)
    kind, other = (
        draw.choice(["text/html", "application/json", "a/b", "image"]),
        draw.choice(["x", "..", "%00"]),
    )
    top = draw.choice(["0", "-1", "x", "1e9", "%00", "9" * 50])
    name = draw.choice(["..%2fx", "%2e%2e", "a.b", "%C3%A4", "a" * 300])
    place = draw.choice(["", "etc/passwd", "../../etc/passwd", "predict/", "%00"])
    yield "POST", good, picture[: draw.randrange(1, len(picture) - 20)], "image/png"
    yield "POST", good, noise, "image/jpeg"
    yield "POST", good, bomb, "image/png"
    yield "POST", good, picture, kind
    yield "POST", good, bytes(3 * 10**6), "image/png"
    yield "POST", f"/predict?adapter={other}", picture, "image/png"
    yield "POST", f"{good}&top={top}", picture, "image/png"
    yield "POST", "/predict", noise, "multipart/form-data; boundary=x"
    yield "POST", "/predict", noise, "multipart/form-data"
    yield "POST", "/predict", *form(image=picture[:50], adapter=adapter)
    yield "PUT", "/adapters/x", b"{" * draw.randrange(1, 10**5), "application/json"
    yield "PUT", "/adapters/x", json.dumps({"folder": "../" * 9 + "etc"}), "application/json"
    yield "PUT", f"/adapters/{name}", noise, "a/b"
    yield "DELETE", f"/adapters/{adapter}", None, None, draw.choice(["wrong", None])
    yield draw.choice(["PATCH", "PUT", "GET"]), "/predict", None, None
    yield "GET", f"/{place}", None, None
    yield noise
    yield f"POST {good} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123".encode()
    yield f"POST {good} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n".encode()
    yield f"GET /health HTTP/1.1\r\nA: {noise.hex() * 30}\r\n\r\n".encode()


def edited(config: bytes, weights: bytes, **changes: Any) -> dict[str, bytes]:
    """The files of an adapter with another config, whose checksum is right."""
    value = json.loads(config) | changes
    value["config_sha256"] = config_sha256(value)
    text = json.dumps(value)
    tensors = safetensors.torch.load(weights)
    return {
        CONFIG_NAME: text.encode(),
        WEIGHTS_NAME: safetensors.torch.save(tensors, {"adapter_config": text}),
    }


def malformed_adapters(folder: Path, count: int) -> Iterator[dict[str, bytes]]:
    """The two files of an adapter, damaged."""
    config, weights = ((folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))
    backbone, prompts = (json.loads(config)[name] for name in ("backbone", "prompts"))
    draw = random.Random(0)

    def flipped() -> bytes:
        content = bytearray(weights)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        return bytes(content)

    kinds = [
        *(
            {CONFIG_NAME: config, WEIGHTS_NAME: length.to_bytes(8, "little") + weights[8:]}
            for length in (2**63, 2**64 - 1, 10**12, len(weights), 0)
        ),
        *({CONFIG_NAME: config, WEIGHTS_NAME: weights[:cut]} for cut in (0, 4, 8, 100, len(weights) - 1)),
        *(
            {CONFIG_NAME: text, WEIGHTS_NAME: weights}
            for text in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 10_000, b'{"format_version": 1}')
        ),
        edited(config, weights, format_version=99),
        edited(config, weights, class_names=["one"]),
        edited(config, weights, class_names=[1] * backbone["num_classes"]),
        edited(config, weights, tensors={}),
        edited(config, weights, prompts=prompts | {"num_prompts": 10**9}),
        edited(config, weights, prompts=[]),
        edited(config, weights, backbone=backbone | {"fingerprint": "0" * 64}),
        edited(config, weights, backbone=backbone | {"num_classes": 10**12}, class_names=None),
        edited(config, weights, backbone=backbone | {"num_classes": -1}, class_names=None),
        edited(config, weights, backbone=backbone | {"file_sha256": "../../etc/passwd"}),
    ]
    yield from kinds[:count]
    for _ in range(count - len(kinds)):
        yield {CONFIG_NAME: config, WEIGHTS_NAME: flipped()}

"""Images from clients, hostile ones among them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from malformed import png_bomb
from PIL import Image

from vapt_fast.serving import Refusal
from vapt_fast.serving.images import decode
from vapt_fast.training.images import open_image


def encoded(kind: str, size: tuple[int, int] = (8, 6), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_is_read_as_from_its_file(kind: str, tmp_path: Path) -> None:
    content = encoded(kind)
    (tmp_path / "image").write_bytes(content)
    expected = np.asarray(open_image(tmp_path / "image"))
    assert np.array_equal(np.asarray(decode(content, 48)), expected)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"hello", 415),
        (b"\0" * 1000, 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (encoded("PPM"), 415),  # one that Pillow reads
        (encoded("PNG")[:60], 422),
        (encoded("JPEG")[:300], 422),
        (encoded("BMP")[:60], 422),
        (encoded("PNG", (9, 6)), 413),
        (png_bomb(20_000, 20_000), 413),
        (png_bomb(2**31 - 1, 2**31 - 1), 413),
    ],
)
def test_refused(content: bytes, status: int) -> None:
    with pytest.raises(Refusal) as raised:
        decode(content, 48)
    assert raised.value.status == status, raised.value.reason


def test_an_image_that_would_grow_when_it_is_scaled() -> None:
    """Its short side becomes as long as the model's."""
    decode(encoded("PNG", (64, 1)), 1000)
    for size in ((65, 1), (1, 65)):
        with pytest.raises(Refusal) as raised:
            decode(encoded("PNG", size), 1000)
        assert raised.value.status == 422


def test_compressed_text_is_not_unpacked_without_end() -> None:
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(200 * 10**6))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    content = encoded("PNG")
    with pytest.raises(Refusal) as raised:
        decode(content[:33] + chunk + content[33:], 1000)
    assert raised.value.status == 422


def test_a_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(Refusal):
        decode(png_bomb(10_000, 10_000), 10**6)

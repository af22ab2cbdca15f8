"""Image files are read as a person sees them, and what can't be read is named in one line."""

import struct
import warnings

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms

from vapt_fast.data import eval_transform, full_data_config
from vapt_fast.pixels import as_seen
from vapt_fast.training import UserError, open_image
from vapt_fast.training.images import check_images, images_in

RAMP = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
GRAY = np.round(RAMP / 257).astype(np.uint8)


@pytest.fixture
def read(tmp_path):
    """Save an image in a format, and give the pixels that are read back."""

    def save_and_read(image, suffix="png", **options):
        path = tmp_path / f"image.{suffix}"
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(path, **options)
        opened = open_image(path)
        assert opened.mode == "RGB"
        assert (np.asarray(as_seen(opened)) == np.asarray(opened)).all()
        return np.asarray(opened)

    return save_and_read


def gray(pixels):
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# ---- more than 8 bits


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_their_range(read, suffix):
    assert (gray(read(RAMP, suffix)) == GRAY).all()


def test_sixteen_bits_of_the_other_byte_order(read):
    image = Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes())
    assert (gray(read(image, "tif")) == GRAY).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_fewer_bits_in_a_larger_file_are_scaled_by_their_depth(read, bits, dtype):
    white = 2**bits - 1
    assert gray(read(np.array([[0, white // 2 + 1, white]], dtype), "tif")).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.uint16, [40_000, 40_000], [156, 156]),  # darker than white, of the same depth
        (np.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
        (np.float32, [0.25, 0.25], [64, 64]),
        (np.float32, [-1.0, 0.0, 1.0], [0, 128, 255]),
        (np.float32, [100.0, 150.0, 300.0], [0, 64, 255]),
        (np.float32, [7.0, 7.0], [0, 0]),
        (np.float32, [-3e38, 0.0, 3e38], [0, 128, 255]),
        (np.int32, [-1000, 0, 1000], [0, 128, 255]),
        (np.int32, [0, 50_000, 100_000], [0, 128, 255]),
        (np.int32, [-5, -5], [0, 0]),
    ],
)
def test_numbers_become_brightness(read, dtype, values, expected):
    assert gray(read(np.array([values], dtype), "tif")).tolist() == [expected]


def test_unsigned_integers_of_32_bits(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(np.array([[0, 2**31, 2**32 - 1]], np.uint32).view(np.int32)).save(path)
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, sample_format) for sample_format in (2, 1))
    content = path.read_bytes()
    assert content.count(signed) == 1
    path.write_bytes(content.replace(signed, unsigned))
    assert gray(np.asarray(open_image(path))).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(read, value):
    with pytest.raises(UserError, match=r"image\.tif can't be read as an image: it has pixels that are NaN"):
        read(np.array([[0.5, value]], np.float32), "tif")


# ---- colours, transparency, orientation, frames


def plain(mode, colour):
    return Image.new(mode, (4, 4), colour)


def palette(index):
    image = plain("P", index)
    image.putpalette([250, 0, 0, 0, 240, 0])
    return image


def lab(colour):
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.profileToProfile(plain("RGB", colour), *profiles, outputMode="LAB")


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "suffix", "options", "expected"),
    [
        (plain("1", 1), "png", {}, WHITE),
        (plain("L", 99), "png", {}, (99, 99, 99)),
        (plain("LA", (0, 255)), "png", {}, (0, 0, 0)),
        (plain("LA", (0, 0)), "png", {}, WHITE),
        (plain("RGBA", (200, 0, 0, 255)), "png", {}, (200, 0, 0)),
        (plain("RGBA", (200, 0, 0, 0)), "png", {}, WHITE),
        (plain("RGBA", (0, 0, 0, 51)), "png", {}, (204, 204, 204)),
        (plain("CMYK", (255, 0, 0, 0)), "jpg", {}, (0, 255, 255)),
        (plain("CMYK", (255, 0, 0, 0)), "tif", {}, (0, 255, 255)),
        pytest.param(
            *(plain("YCbCr", (128, 128, 128)), "tif", {}, (128, 128, 128)),
            marks=pytest.mark.skipif(
                PIL.__version__ < "13", reason="Pillow 12 can't read what it has written"
            ),
        ),
        (lab((200, 30, 60)), "tif", {}, (200, 30, 60)),
        (palette(1), "png", {}, (0, 240, 0)),
        (palette(1), "png", {"transparency": 1}, WHITE),
        (palette(0), "png", {"transparency": 1}, (250, 0, 0)),
        (palette(1), "png", {"transparency": bytes([255, 0])}, WHITE),
        (plain("L", 7), "png", {"transparency": 7}, WHITE),
        (plain("RGB", (7, 8, 9)), "png", {"transparency": (7, 8, 9)}, WHITE),
        (Image.fromarray(np.full((4, 4), 999, np.uint16)), "png", {"transparency": 999}, WHITE),
        # Damaged EXIF data are no reason to refuse a picture.
        (plain("RGB", (9, 9, 9)), "jpg", {"exif": b"Exif\0\0II*\0nonsense"}, (9, 9, 9)),
        # Of several frames the first.
        *(
            (plain("L", 10), suffix, {"save_all": True, "append_images": [plain("L", 200)]}, (10, 10, 10))
            for suffix in ("gif", "tif")
        ),
    ],
)
def test_colours(read, image, suffix, options, expected):
    tolerance = 3 if image.mode == "LAB" else 1 if image.mode in ("CMYK", "YCbCr") else 0
    colour = read(image, suffix, **options)[0, 0].tolist()
    assert colour == pytest.approx(list(expected), abs=tolerance)


@pytest.mark.parametrize(("suffix", "bits"), [("png", 8), ("png", 16), ("tif", 8), ("tif", 16), ("jpg", 8)])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(read, suffix, bits, orientation, turns):
    pixels = (RAMP if bits == 16 else GRAY)[:16]
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.rot90(GRAY[:16], turns)
    assert np.abs(gray(read(pixels, suffix, exif=exif)).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("image", "orientation"), [(RAMP, 6), (plain("RGBA", (0, 0, 0, 51)), 1), (palette(1), 3)]
)
def test_a_models_transform_takes_what_pillow_opens(tmp_path, channels, image, orientation):
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, exif=exif)
    transform = eval_transform(full_data_config({"input_size": (channels, 32, 32)}))
    with Image.open(path) as opened:
        assert torch.equal(transform(opened), transform(open_image(path)))


def test_the_images_in_folders_that_link_to_each_other(tmp_path):
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / name).mkdir()
        plain("L", 1).save(tmp_path / name / "1.png")
        for other in names:
            (tmp_path / name / f"to {other}").symlink_to(tmp_path / other, target_is_directory=True)
    assert images_in(tmp_path) == [tmp_path / name / "1.png" for name in names]


# ---- what can't be read

BROKEN = ["cut.jpg", "empty.png", "folder.png", "gone.png", "huge.png", "notes\n[red].png"]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A folder with one file of every kind that can't be read, and some that can."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    for name, side in (("good.png", 10), ("large.png", 25), ("huge.png", 30)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    Image.effect_noise((20, 20), 100).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes\n[red].png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_a_large_picture_below_the_limit_is_read_without_a_warning(broken):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(broken / "large.png").size == (25, 25)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_that_can_not_be_read_are_named_together(broken, workers):
    names, seen = ["good.png", *BROKEN, "whole.jpg"], []
    with pytest.raises(UserError) as raised:
        check_images([broken / name for name in names], workers, lambda *done: seen.append(done))
    first, *lines = str(raised.value).splitlines()
    assert first == "6 of 8 images can't be read:"
    assert [name.replace("\n", "\\n") in line for name, line in zip(BROKEN, lines, strict=True)] == [True] * 6
    assert seen == [(done, 8) for done in range(1, 9)]
    check_images([broken / "good.png", broken / "whole.jpg"], workers)


def test_of_many_only_the_first_are_named(tmp_path):
    with pytest.raises(UserError) as raised:
        check_images([tmp_path / f"{index}.png" for index in range(25)])
    lines = str(raised.value).splitlines()
    assert len(lines) == 22
    assert "19.png" in lines[-2]
    assert lines[-1].endswith("and 5 more")

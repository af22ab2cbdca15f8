"""Image files are read as a person sees them, and what can't be read is named in one line."""

import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from vapt_fast.training import UserError, open_image
from vapt_fast.training.images import check_images

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
    pixels = gray(read(np.array([[0, white // 2 + 1, white]], dtype=dtype), "tif"))
    assert pixels.tolist() == [[0, 128, 255]]


def test_darker_pictures_of_the_same_depth_stay_darker(read):
    assert gray(read(np.full((4, 4), 40_000, np.uint16))).max() == round(40_000 / 65_535 * 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.25, 0.25, 0.25], [64, 64, 64]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([100.0, 150.0, 300.0], [0, 64, 255]),
        ([7.0, 7.0, 7.0], [0, 0, 0]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
    ],
)
def test_floats(read, values, expected):
    assert gray(read(np.array([values], np.float32), "tif")).tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([-1000, 0, 1000], [0, 128, 255]), ([0, 50_000, 100_000], [0, 128, 255]), ([-5, -5, -5], [0, 0, 0])],
)
def test_integers_of_32_bits(read, values, expected):
    assert gray(read(np.array([values], np.int32), "tif")).tolist() == [expected]


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


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 99, "png", (99, 99, 99)),
        ("LA", (0, 255), "png", (0, 0, 0)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), "png", (200, 0, 0)),
        ("RGBA", (200, 0, 0, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("CMYK", (255, 0, 0, 0), "jpg", (0, 255, 255)),
        ("CMYK", (255, 0, 0, 0), "tif", (0, 255, 255)),
        ("YCbCr", (128, 128, 128), "tif", (128, 128, 128)),
    ],
)
def test_modes(read, mode, colour, suffix, expected):
    assert read(Image.new(mode, (8, 8), colour), suffix)[0, 0].tolist() == pytest.approx(
        list(expected), abs=1
    )


def test_lab(read):
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 30, 60)), *profiles, outputMode="LAB")
    assert read(lab, "tif")[0, 0].tolist() == pytest.approx([200, 30, 60], abs=3)


def palette(index):
    image = Image.new("P", (4, 4), index)
    image.putpalette([250, 0, 0, 0, 240, 0])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (palette(1), {}, (0, 240, 0)),
        (palette(1), {"transparency": 1}, (255, 255, 255)),
        (palette(0), {"transparency": 1}, (250, 0, 0)),
        (palette(1), {"transparency": bytes([255, 0])}, (255, 255, 255)),
        (Image.new("L", (4, 4), 7), {"transparency": 7}, (255, 255, 255)),
        (Image.new("RGB", (4, 4), (7, 8, 9)), {"transparency": (7, 8, 9)}, (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 999, np.uint16)), {"transparency": 999}, (255, 255, 255)),
    ],
)
def test_palettes_and_transparent_colours(read, image, options, expected):
    assert tuple(read(image, "png", **options)[0, 0]) == expected


@pytest.mark.parametrize(
    ("suffix", "pixels"),
    [("png", GRAY[:16]), ("tif", GRAY[:16]), ("jpg", GRAY[:16]), ("png", RAMP[:16]), ("tif", RAMP[:16])],
    ids=["png", "tif", "jpg", "16-bit png", "16-bit tif"],
)
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(read, suffix, pixels, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.rot90(GRAY[:16], turns)
    assert np.abs(gray(read(pixels, suffix, exif=exif)).astype(int) - expected).max() <= 3


def test_damaged_exif_is_no_reason_to_refuse_a_picture(read):
    assert read(Image.new("RGB", (8, 8), (9, 9, 9)), "jpg", exif=b"Exif\0\0II*\0nonsense").max() == 9


def test_the_first_frame(read):
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    assert gray(read(frames[0], "gif", save_all=True, append_images=frames[1:])).max() == 10
    assert gray(read(frames[0], "tif", save_all=True, append_images=frames[1:])).max() == 10


# ---- what can't be read


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A folder with one file of every kind that can't be read, and one that can."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    Image.new("RGB", (10, 10)).save(tmp_path / "good.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "huge.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(
        tmp_path / "whole.jpg"
    )
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes\n[red].png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


BROKEN = ["cut.jpg", "empty.png", "folder.png", "gone.png", "huge.png", "notes\n[red].png"]


@pytest.mark.parametrize("name", BROKEN)
def test_one_line_names_the_file(broken, name):
    with pytest.raises(UserError) as raised:
        open_image(broken / name)
    (line,) = str(raised.value).splitlines()
    assert name.replace("\n", "\\n") in line


def test_a_large_picture_below_the_limit_is_read_without_a_warning(broken):
    Image.new("RGB", (25, 25)).save(broken / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(broken / "large.png").size == (25, 25)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_that_can_not_be_read_are_named_together(broken, workers):
    names = ["good.png", *BROKEN, "whole.jpg"]
    seen = []
    with pytest.raises(UserError) as raised:
        check_images([broken / name for name in names], workers, lambda *done: seen.append(done))
    first, *lines = str(raised.value).splitlines()
    assert first == "6 of 8 images can't be read:"
    assert [name.replace("\n", "\\n") in line for name, line in zip(BROKEN, lines, strict=True)] == [True] * 6
    assert seen == [(done, 8) for done in range(1, 9)]
    check_images([broken / "good.png", broken / "whole.jpg"], workers)


def test_of_many_only_the_first_are_named(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(25)]
    with pytest.raises(UserError) as raised:
        check_images(paths)
    lines = str(raised.value).splitlines()
    assert len(lines) == 22
    assert "19.png" in lines[-2]
    assert lines[-1].endswith("and 5 more")

"""Cutting ears out: arithmetic by hand, and images of every bad kind."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ear_teacher_cli.config import AUGMENTATIONS
from ear_teacher_cli.data.crop import buffered_box, check_box, check_box_inside, cut, load_crop, read_image
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.errors import ImageError

PLAIN = Preprocessing(64, 0.10, True, "bilinear", (0.5, 0.25, 0.0), (0.5, 0.5, 0.5))


def test_policies_of_augmentation_are_those_of_the_command_line():
    from ear_teacher_cli.data.augment import POLICIES

    assert tuple(POLICIES) == AUGMENTATIONS


def test_buffer_is_a_tenth_of_each_side():
    assert buffered_box((100, 50, 200, 90), (640, 480), 0.10) == pytest.approx((90, 46, 210, 94))


def test_buffer_is_clamped_to_the_image():
    assert buffered_box((0, 5, 100, 475), (104, 480), 0.10) == pytest.approx((0, 0, 104, 480))


def test_pad_keeps_the_proportions_and_fills_with_the_mean():
    red = Image.new("RGB", (100, 50), (255, 0, 0))
    crop = np.asarray(cut(red, None, PLAIN))
    assert crop.shape == (64, 64, 3)
    assert (crop[16:48] == [255, 0, 0]).all()  # 100 x 50 -> 64 x 32, centred
    assert (crop[:16] == [128, 64, 0]).all() and (crop[48:] == [128, 64, 0]).all()


def test_no_pad_squashes():
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    squashed = cut(image, None, Preprocessing(64, 0.1, False, "bilinear", PLAIN.mean, PLAIN.std))
    assert (np.asarray(squashed) == [255, 0, 0]).all()


def test_the_box_is_where_the_ear_is():
    image = Image.new("RGB", (200, 200))
    image.paste((0, 255, 0), (60, 80, 120, 140))
    crop = np.asarray(cut(image, (60, 80, 120, 140), Preprocessing(72, 0.10, True, "nearest", PLAIN.mean, PLAIN.std)))
    # 60 px box + 2 x 6 px buffer = 72 px: one to one
    assert (crop[6:66, 6:66] == [0, 255, 0]).all()
    assert (crop[:6] == 0).all() and (crop[66:] == 0).all()


@pytest.mark.parametrize(
    "box, reason",
    [
        ((10, 10, 10, 20), "box-empty"),
        ((10, 20, 20, 10), "box-empty"),
        ((float("nan"), 0, 5, 5), "box-not-finite"),
        ((0, 0, float("inf"), 5), "box-not-finite"),
    ],
)
def test_impossible_boxes(box, reason):
    with pytest.raises(ImageError) as caught:
        check_box(box)
    assert caught.value.reason == reason


def test_box_outside_with_a_pixel_of_grace():
    check_box_inside((-1, 0, 101, 50), (100, 50))
    for box in [(-2, 0, 50, 50), (0, 0, 102, 50), (500, 500, 600, 600)]:
        with pytest.raises(ImageError) as caught:
            check_box_inside(box, (100, 50))
        assert caught.value.reason == "box-outside"


def test_a_box_wholly_outside_is_not_cut():
    with pytest.raises(ImageError):
        cut(Image.new("RGB", (100, 100)), (300, 300, 400, 400), PLAIN)


def test_exif_orientation_turns_the_image_upright(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    image.save(tmp_path / "turned.png", exif=exif)
    upright = read_image(str(tmp_path / "turned.png"))
    assert upright.orientation == 6 and upright.image.size == (20, 40)
    assert upright.image.getpixel((10, 5)) == (255, 0, 0)


def bad_images(folder):
    """{name: (path, reason)} of files that are no whole image."""
    whole = folder / "whole.jpg"
    Image.effect_noise((300, 200), 60).convert("RGB").save(whole)
    half = folder / "half.jpg"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    return {
        "half": (half, "truncated"),
        "empty": (folder / "empty.jpg", "truncated"),
        "text": (folder / "text.jpg", "not-an-image"),
        "folder": (folder / "folder.jpg", "unreadable"),
        "fifo": (folder / "fifo.jpg", "unreadable"),
        "bomb": (folder / "bomb.png", "too-large"),
        "missing": (folder / "nowhere.jpg", "missing"),
    }


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["half", "empty", "text", "folder", "fifo", "bomb", "missing"])
def test_bad_images_have_their_reason(tmp_path, name):
    path, reason = bad_images(tmp_path)[name]
    with pytest.raises(ImageError) as caught:
        load_crop(str(path), None, PLAIN)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("I;16", 257 * 50, (50, 50, 50)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_unusual_modes_become_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / "x.tif"
    Image.new(mode, (32, 32), colour).save(path)
    assert (load_crop(str(path), None, PLAIN).transpose(1, 2, 0) == expected).all()


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (60, 60)])
@pytest.mark.parametrize("pad", [True, False])
def test_a_crop_has_the_bands_of_the_cut_image_and_can_be_changed(tmp_path, size, pad):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    noise.save(tmp_path / "x.png")
    preprocessing = Preprocessing(64, 0.1, pad, "bilinear", (0.5, 0.25, 0.0), (0.5, 0.5, 0.5))
    crop, cut_image = load_crop(tmp_path / "x.png", None, preprocessing), np.asarray(cut(noise, None, preprocessing))
    assert all((crop[band] == cut_image[..., band]).all() for band in range(3))
    assert crop.flags.c_contiguous and crop.flags.writeable  # as torch.from_numpy expects
    assert (tuple(crop[:, 0, 0]) == preprocessing.fill) == (pad and size != (60, 60))


@pytest.mark.parametrize("box", [(-0.9, 10, -0.1, 50), (200.2, 10, 200.9, 50), (-40, 0, 30, 50), (150, 0, 260, 50)])
def test_a_box_off_the_edge_is_an_image_error_never_a_strip(box):
    with pytest.raises(ImageError) as caught:
        cut(Image.new("RGB", (200, 100)), box, PLAIN)
    assert caught.value.reason in ("box-outside", "box-tiny")


def test_a_malformed_exif_does_not_cost_the_image(tmp_path):
    image = Image.new("RGB", (40, 20), (9, 9, 9))
    exif = Image.Exif()
    exif[0x0112], exif[0x829A] = 6, 1.5
    image.save(tmp_path / "x.jpg", exif=exif)
    data = bytearray((tmp_path / "x.jpg").read_bytes())
    start = data.index(b"Exif")
    end = start - 2 + int.from_bytes(data[start - 2 : start], "big")
    for offset in range(start + 6, end):  # every byte of the tags in turn
        spoilt = data.copy()
        spoilt[offset] ^= 0xFF
        (tmp_path / "y.jpg").write_bytes(spoilt)
        assert read_image(str(tmp_path / "y.jpg")).image.size in ((40, 20), (20, 40))


def test_no_program_is_started_for_an_image(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError) as caught:
        read_image(str(tmp_path / "x.jpg"))
    assert caught.value.reason == "not-an-image"

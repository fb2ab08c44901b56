"""The Python API: `load_embedder(path).embed(...)` gives the rows that `earteach embed` writes, and `load_crop` the crops."""

import csv
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROUNDING, apart
from PIL import Image, ImageOps
from safetensors.torch import save_file

import ear_teacher_cli
from ear_teacher_cli import EarTeachError, load_crop, load_embedder
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.errors import ImageError
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.run_folder import best_checkpoint

PLAIN = Preprocessing(64, 0.10, True, "bilinear", (0.5, 0.25, 0.0), (0.5, 0.5, 0.5))
CLOSE = 1e-5  # on one machine; batches may round otherwise


def load(path) -> np.ndarray:
    return np.load(path)  # noqa: TID251  (what our users will call)


def opened(paths) -> list[Image.Image]:
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.copy())
    return images


@pytest.fixture(scope="module")
def embedder(exports):
    return load_embedder(exports / "teacher.safetensors")


@pytest.fixture(scope="module")
def drawn(ears, tmp_path_factory):
    """(list, its paths, its boxes): eval.csv with its photos as PNG, which are always decoded in full."""
    source, folder = read_manifest(ears / "eval.csv"), tmp_path_factory.mktemp("lossless")
    lines = [["image_path", "x1", "y1", "x2", "y2", "side"]]
    for number, box in enumerate(source.boxes):
        with Image.open(source.file(number)) as photo:
            photo.save(folder / f"{number:02}.png")
        lines.append([f"{number:02}.png", *box, source.sides[number]])
    write(folder / "list.csv", lines)
    manifest = read_manifest(folder / "list.csv")
    return folder / "list.csv", [manifest.file(i) for i in range(len(manifest))], list(manifest.boxes)


def write(path: Path, lines: list) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)


@pytest.mark.parametrize("form", ["teacher.safetensors", "teacher", "run", "checkpoint", "plain.safetensors"])
def test_rows_are_those_that_embed_writes(form, exports, whitened, drawn, tmp_path, earteach):
    path, words = {"run": whitened, "checkpoint": best_checkpoint(whitened)}.get(form, exports / form), []
    if form == "plain.safetensors":  # a state dict that says nothing of itself
        path = tmp_path / form
        save_file(read_checkpoint(best_checkpoint(whitened)).backbone_state, path)
        words = ["--backbone", "test_convnext", "--image-size", 64]
    embedder = load_embedder(path, *words[1::2])
    source, paths, boxes = drawn
    arrays = [np.asarray(image) for image in opened(paths)]
    for flags, options in (
        ([], {}),
        (["--no-whiten"], {"whiten": False}),
        (["--no-normalize"], {"normalize": False}),
    ):
        out = tmp_path / f"{'-'.join(flags) or 'x'}.npy"
        assert earteach("embed", source, out, "--weights", path, *words, *flags).code == 0
        rows = load(out)
        for images in (paths, [Path(path) for path in paths], opened(paths), arrays, np.array(paths)):
            found = embedder.embed(images, boxes, **options)
            assert found.dtype == np.float32 and found.shape == rows.shape
            assert np.abs(found - rows).max() < CLOSE * max(1, np.abs(rows).max()), (form, flags)
        found = embedder.embed(iter(paths), (box for box in boxes), batch_size=5, **options)
        assert np.abs(found - rows).max() < CLOSE * max(1, np.abs(rows).max())
    assert (embedder.whitening is None) == (form == "plain.safetensors")


def test_crops_and_one_image_alone(embedder, exports, drawn, tmp_path, earteach):
    folder = tmp_path / "crops"
    folder.mkdir()
    for number, (path, box) in enumerate(zip(*drawn[1:], strict=True)):
        with Image.open(path) as photo:
            photo.crop(tuple(map(round, box))).save(folder / f"{number:02}.png")
    assert earteach("embed", folder, tmp_path / "x.npy", "--weights", exports / "teacher").code == 0
    rows, files = load(tmp_path / "x.npy"), sorted(folder.iterdir())
    crops = [np.asarray(image) for image in opened(files)]
    for images in (files, crops, opened(files)):
        assert np.abs(embedder.embed(images) - rows).max() < CLOSE
        assert np.abs(embedder.embed(images, [None] * len(files)) - rows).max() < CLOSE
    for image in (files[3], str(files[3]), crops[3], opened(files)[3]):
        assert np.abs(embedder.embed(image) - rows[3]).max() < CLOSE
    same = [crops[3], crops[3]]
    assert np.abs(embedder.embed(np.stack(same)) - rows[[3, 3]]).max() < CLOSE
    path, box = drawn[1][3], drawn[2][3]
    one = embedder.embed(path, box)
    assert one.shape == (1, rows.shape[1])
    for again in ([box], np.array(box), np.array([box]), list(box)):
        assert np.array_equal(embedder.embed(path, again), one)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_images_are_turned_by_exif_wherever_they_are(suffix, embedder, exports, drawn, tmp_path, earteach):
    with Image.open(drawn[1][1]) as photo:
        photo = photo.convert("RGB")
    box = drawn[2][1]
    lines = [["image_path", "x1", "y1", "x2", "y2"]]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = next(s for s in every_turn(photo) if turned_upright(s, orientation).tobytes() == photo.tobytes())
        stored.save(tmp_path / f"{orientation}{suffix}", exif=exif, **({"quality": 95} if suffix == ".jpg" else {}))
        lines.append([f"{orientation}{suffix}", *box])
    write(tmp_path / "list.csv", lines)
    words = ["embed", tmp_path / "list.csv", tmp_path / "x.npy", "--weights", exports / "teacher.safetensors"]
    assert earteach(*words).code == 0
    rows, paths = load(tmp_path / "x.npy"), [tmp_path / f"{n}{suffix}" for n in range(1, 9)]
    assert np.linalg.norm(rows - rows[0], axis=1).max() < 0.2  # all upright; JPEGs were compressed lying
    boxes = [box] * 8
    assert np.abs(embedder.embed(paths, boxes) - rows).max() < CLOSE
    with_exif, converted, upright = [], [], []
    for path in paths:
        with Image.open(path) as image:
            with_exif.append(image.copy())
            converted.append(image.convert("RGB"))
            upright.append(np.asarray(ImageOps.exif_transpose(image)))
    undecoded = [Image.open(path) for path in paths]
    for images in (with_exif, converted, upright, undecoded):
        assert np.abs(embedder.embed(images, boxes) - rows).max() < CLOSE
    for image in undecoded:
        image.close()


def every_turn(photo: Image.Image) -> list[Image.Image]:
    return [photo, *(photo.transpose(turn) for turn in Image.Transpose)]


def turned_upright(stored: Image.Image, orientation: int) -> Image.Image:
    """By Pillow's own hand."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = stored.copy()
    stored.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(stored)


def test_a_large_jpeg_is_nearly_what_its_pixels_are(embedder, tmp_path):
    """From its path no more is decoded than the crop needs (crop.load_crop), so the crop is another by a little."""
    noise = Image.effect_noise((1200, 900), 40).resize((2400, 1800), Image.Resampling.BICUBIC).convert("RGB")
    noise.paste((180, 120, 90), (800, 500, 1500, 1400))
    noise.save(tmp_path / "x.jpg", quality=90)
    boxes = [(700, 400, 1600, 1500), (100, 100, 900, 1300)]
    paths = [tmp_path / "x.jpg"] * 2
    with Image.open(paths[0]) as undecoded:
        raw = [embedder.embed(images, boxes, whiten=False) for images in (paths, [undecoded] * 2, opened(paths))]
    assert np.abs(raw[0] - raw[1]).max() < CLOSE
    assert 0.99 < (raw[0] * raw[2]).sum(1).min() < 1 - CLOSE  # noise is the worst case: drawn ears have above 0.9995
    with Image.open(paths[0]) as smaller, Image.open(paths[0]) as other:
        smaller.draft("RGB", (600, 450))  # what its owner did to it holds
        assert smaller.size == (600, 450)
        half = embedder.embed(smaller, [value / 4 for value in boxes[0]], whiten=False)
        other.getexif()[0x0112] = 3
        turned = embedder.embed(other, boxes[1], whiten=False)
    assert np.linalg.norm(half - raw[0][0]) < 0.2 and np.linalg.norm(turned - raw[0][1]) > 0.001


MISFITS = {
    "float": (np.zeros((8, 8, 3), np.float32), "is an array float32 8 x 8 x 3; give uint8 H x W x 3"),
    "grey": (np.zeros((8, 8), np.uint8), "is an array uint8 8 x 8; give"),
    "alpha": (np.zeros((8, 8, 4), np.uint8), "is an array uint8 8 x 8 x 4; give"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), "is an array uint8 3 x 8 x 8; give"),
    "empty": (np.zeros((0, 8, 3), np.uint8), "is an array uint8 0 x 8 x 3; give"),
    "no pixels": (Image.new("RGB", (0, 4)), "has 0 x 4 pixels; give"),
    "bytes": (b"\xff\xd8", "is of type bytes; give a path, a PIL image, or an array"),
    "none": (None, "is of type NoneType; give a path"),
    "missing": ("nowhere.jpg", "(nowhere.jpg): no such file"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_image_that_is_none_is_named_by_its_place(name, embedder):
    image, message = MISFITS[name]
    whole = np.zeros((8, 8, 3), np.uint8)
    for images, place in (([whole, whole, image], 2), ([image], 0), (iter([whole, image]), 1)):
        with pytest.raises(ImageError, match=f"^image {place}( |:)") as caught:
            embedder.embed(images)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    if image is not None:
        with pytest.raises(ImageError, match=f"^image 0.*{re.escape(message)}"):
            embedder.embed(image)
    with pytest.raises(ImageError, match=re.escape(message.split("): ")[-1])):
        load_crop(image, None, PLAIN)


@pytest.mark.parametrize("image", [np.zeros((1, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8)])
def test_a_stack_of_misfits_is_named_too(image, embedder):
    with pytest.raises(ImageError, match="^image 0: is an array"):
        embedder.embed(image)


def test_a_tensor_is_no_image(embedder):
    import torch

    with pytest.raises(ImageError, match="^image 0: is of type Tensor; give"):
        embedder.embed(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((float("nan"), 0, 5, 5), "box [nan, 0, 5, 5] holds NaN or infinity"),
        ((0, 0, float("inf"), 5), "holds NaN or infinity"),
        ((5, 0, 5, 5), "has x2 <= x1"),
        ((0, 0, 50, 5), "box [0, 0, 50, 5] leaves the image of 20 x 10"),
        ((0, 0, 5), "box (0, 0, 5) is not four numbers; give x1, y1, x2, y2"),
        ((0, 0, 5, 5, 0.9), "is not four numbers"),
        (("a", 0, 5, 5), "is not four numbers"),
        ("1234", "box '1234' is not four numbers"),
        (7, "box 7 is not four numbers"),
    ],
)
def test_a_box_that_is_none_is_named_by_its_place(box, message, embedder):
    image = np.zeros((10, 20, 3), np.uint8)
    with pytest.raises(ImageError, match=f"^image 1: .*{re.escape(message)}"):
        embedder.embed([image, image], [None, box])
    with pytest.raises(ImageError, match=re.escape(message)):
        load_crop(image, box, PLAIN)


def test_numbers_of_images_and_boxes_agree(embedder):
    image = np.zeros((10, 20, 3), np.uint8)
    box = (0, 0, 10, 10)
    for images, boxes, message in (
        ([], None, "images: there are none; give at least one"),
        (iter([]), None, "images: there are none"),
        ((), [], "images: there are none"),
        (np.zeros((0, 8, 8, 3), np.uint8), None, "images: there are none"),
        (7, None, "images: is of type int; give"),
        (None, None, "images: is of type NoneType; give"),
        ([image, image], [box], "boxes: there are 1 for 2 images; give one or None for each"),
        (image, [box, box], "boxes: there are 2 for 1 image; give"),
        (image, [], "boxes: there are 0 for 1 image; give"),
        ([image, image], box, "boxes: is one box, but there may be several images"),
        ([image] * 4, np.array(box), "boxes: is one box"),
        (iter([image, image]), [box], "boxes: there are 1, but more images"),
        (iter([image]), [box, box], "boxes: there are more than the 1 images"),
        ([image], 7, "boxes: is of type int; give x1, y1, x2, y2"),
        ([image], {"x1": 1}, "boxes: is of type dict"),
    ):
        with pytest.raises(EarTeachError, match=f"^{re.escape(message)}"):
            embedder.embed(images, boxes)
    with pytest.raises(EarTeachError, match="^batch_size: 0 is less than 1"):
        embedder.embed(image, batch_size=0)
    with pytest.raises(EarTeachError, match="^image 0: side 'up' is unknown; give left, right or None"):
        embedder.embed(image, sides="up")


def test_an_iterator_is_read_a_batch_at_a_time(embedder, monkeypatch):
    alive, most, done = [], [0], [0]
    kind = type(embedder)
    call = kind.__call__

    def counted(self, pixels):
        done[0] += len(pixels)
        return call(self, pixels)

    monkeypatch.setattr(kind, "__call__", counted)

    class Photo(np.ndarray):
        """An array that can be counted."""

    def photos():
        for number in range(40):
            assert number - done[0] <= 8
            photo = np.full((80, 60, 3), number, np.uint8).view(Photo)
            alive.append(weakref.ref(photo))
            most[0] = max(most[0], sum(kept() is not None for kept in alive))
            yield photo
            del photo

    assert embedder.embed(photos(), batch_size=8).shape == (40, 64)
    assert most[0] <= 3


def test_right_ears_are_mirrored_where_the_weights_want_it(embedder, drawn):
    path, box = drawn[1][2], drawn[2][2]
    mirroring = replace(embedder, preprocessing=replace(embedder.preprocessing, mirror=True))
    plain = embedder.embed([path, path], [box, box], sides=["left", "right"])
    assert apart(plain[1], plain[0]) < ROUNDING
    left, right, unknown = mirroring.embed([path] * 3, [box] * 3, sides=["L", "right", None])
    assert apart(left, plain[0]) < ROUNDING and apart(unknown, left) < ROUNDING and apart(right, left) > 1e-3
    crop = load_crop(path, box, embedder.preprocessing)
    flipped = np.ascontiguousarray(crop[:, :, ::-1].transpose(1, 2, 0))
    assert np.abs(embedder.embed(flipped) - right).max() < CLOSE
    with pytest.warns(UserWarning, match="want right ears mirrored, and no sides were given"):
        assert apart(mirroring.embed(path, box)[0], left) < ROUNDING  # another batch size
    assert apart(mirroring.embed(path, box, sides="right")[0], right) < ROUNDING


def test_mirrored_rows_are_those_of_embed(exports, drawn, tmp_path, earteach):
    """A teacher of --side-policy mirror, by its header alone: its fingerprint is another one."""
    from ear_teacher_cli.model.checkpoint import read_safetensors
    from ear_teacher_cli.model.export_format import about_of
    from ear_teacher_cli.model.weights import fingerprint

    tensors, header = read_safetensors(exports / "teacher.safetensors")
    header["mirror"] = "true"
    about = about_of(header, "x")
    header["fingerprint"] = fingerprint(about.architecture, tensors, about.preprocessing)
    save_file(tensors, tmp_path / "teacher.safetensors", metadata=header)
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path)
    words = ["embed", drawn[0], tmp_path / "x.npy", "--weights", tmp_path / "teacher.safetensors"]
    assert earteach(*words).code == 0
    manifest = read_manifest(drawn[0])
    assert {manifest.side(i) for i in range(len(manifest))} == {"left", "right"}
    paths = [manifest.file(i) for i in range(len(manifest))]
    found = load_embedder(tmp_path / "teacher.safetensors").embed(paths, manifest.boxes, sides=manifest.sides)
    assert np.abs(found - load(tmp_path / "x.npy")).max() < CLOSE


def test_onnx_is_said_to_be_for_onnxruntime(exports):
    with pytest.raises(EarTeachError, match=r"teacher.onnx: is for onnxruntime; give the checkpoint or a"):
        load_embedder(exports / "teacher.onnx")


def test_a_path_is_needed_and_a_missing_whitening_can_be_done_without(exports, tmp_path):
    for load_weights in (load_embedder, ear_teacher_cli.load_backbone):
        with pytest.raises(EarTeachError, match="no path was given"):
            load_weights("")
    shutil.copy(exports / "teacher.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(EarTeachError, match="its whitening, alone.whitening.safetensors, is not beside it"):
        load_embedder(tmp_path / "alone.safetensors")
    image = np.zeros((10, 20, 3), np.uint8)
    raw = load_embedder(exports / "teacher").embed(image, whiten=False)
    assert np.array_equal(load_embedder(tmp_path / "alone.safetensors", whiten=False).embed(image), raw)


@pytest.mark.parametrize("box", [None, (36, 32, 118, 190), np.array([36, 32, 118, 190], np.float32)])
def test_load_crop_is_the_same_from_everywhere(box, ears):
    path = ears / "images" / "p008" / "00.jpg"
    small = replace(PLAIN, image_size=192)  # more than a third of the photo
    with Image.open(path) as image:
        crops = [load_crop(kind, box, small) for kind in (str(path), path, image, np.asarray(image), image.copy())]
    assert crops[0].dtype == np.uint8 and crops[0].shape == (3, 192, 192)
    assert all(np.array_equal(crop, crops[0]) for crop in crops)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1", "F"])
def test_pil_images_of_any_mode_are_what_their_files_are(mode, tmp_path):
    image = Image.linear_gradient("L").resize((80, 60))
    image = image.convert(mode) if mode != "I;16" else image.convert("I").point(lambda v: v * 256).convert("I;16")
    image.save(tmp_path / "x.tif")
    assert np.array_equal(load_crop(image, None, PLAIN), load_crop(tmp_path / "x.tif", None, PLAIN))


def test_a_damaged_pil_image_is_a_image_error(ears, embedder, tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes((ears / "images" / "p008" / "00.jpg").read_bytes()[:3000])
    with Image.open(path) as image, pytest.raises(ImageError, match="^image 0: cut short or damaged"):
        embedder.embed(image)

"""Fast crops equal slow ones: JPEGs that are decoded in part, and cached crops."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, metrics_of, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from ear_teacher_cli.data import crop as crops
from ear_teacher_cli.data import jpeg
from ear_teacher_cli.data.crop_cache import CropCaches
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.errors import ImageError

WIDTH, HEIGHT = 1200, 900
PLAIN = Preprocessing(64, 0.1, True, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """1200 x 900 of something like a photograph: shapes at every scale, and grain."""
    draw = np.random.default_rng(0)
    layers = [
        np.asarray(
            Image.fromarray(draw.integers(0, 256, (HEIGHT // size, WIDTH // size, 3), np.uint8)).resize(
                (WIDTH, HEIGHT), Image.Resampling.BICUBIC
            )
        )
        for size in (300, 60, 12, 3)
    ]
    mixed = sum(weight * layer for weight, layer in zip((0.5, 0.3, 0.15, 0.05), layers, strict=True))
    return Image.fromarray(mixed.clip(1, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


def both_ways(path: Path, box, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    quick = crops.load_crop(str(path), box, preprocessing)
    slow = crops.cut(crops.read_image(str(path)).image, box, preprocessing)
    return quick.astype(int), np.asarray(slow).transpose(2, 0, 1).astype(int)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    orientation=st.integers(0, 9),
    mode=st.sampled_from(["RGB", "RGB", "L", "CMYK", "MPO"]),
    progressive=st.booleans(),
    pad=st.booleans(),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos", "nearest"]),
    side=st.sampled_from([32, 64, 224]),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_part_of_a_jpeg_gives_the_crop_of_the_whole(
    photo, tmp_path_factory, orientation, mode, progressive, pad, interpolation, side, corners
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path_factory.getbasetemp() / "part.jpg"
    if mode == "MPO":
        photo.save(path, "MPO", quality=90, exif=exif, save_all=True, append_images=[photo.resize((300, 200))])
    else:
        photo.convert(mode).save(path, quality=90, exif=exif, progressive=progressive)
    width, height = (HEIGHT, WIDTH) if 5 <= orientation <= 8 else (WIDTH, HEIGHT)
    x1, x2 = sorted((corners[0] * (width - 40), corners[1] * (width - 40)))
    y1, y2 = sorted((corners[2] * (height - 40), corners[3] * (height - 40)))
    box = (x1, y1, x2 + 40, y2 + 40)
    preprocessing = Preprocessing(side, 0.1, pad, interpolation, (0.5,) * 3, (0.5,) * 3)
    quick, slow = both_ways(path, box, preprocessing)
    difference = abs(quick - slow)
    assert difference.mean() <= 1.5 and difference.max() <= 12
    region, inner, _ = crops._placement((width, height), box, preprocessing)
    if min(crops._scale(region, inner, preprocessing)) < 2 * jpeg.SPARE:  # nothing is decoded smaller
        assert difference.max() == 0


def test_a_large_photo_is_decoded_small_and_from_the_top(photo, tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    photo.resize((2400, 1800)).save(path, quality=95)
    read, parts = [], []

    class Counted(jpeg._Feed):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(jpeg, "_Feed", Counted)
    monkeypatch.setattr(crops, "part_of", lambda *words: parts.append(jpeg.part_of(*words)) or parts[-1])
    crops.load_crop(str(path), (300, 200, 1100, 700), PLAIN)
    assert parts[0].image.width <= 960 / 8 + 20 and parts[0].image.height <= 600 / 8 + 20
    assert 0.2 * path.stat().st_size < sum(read) < 0.6 * path.stat().st_size


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_photo_that_is_cut_short_is_found_though_the_crop_is_above(photo, tmp_path, share):
    path = tmp_path / "x.jpg"
    photo.save(path, quality=90)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageError) as error:
        crops.load_crop(str(path), (100, 20, 300, 120), PLAIN)
    assert error.value.reason == "truncated"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_format_is_turned_upright_once(photo, tmp_path, format, orientation):
    """The image is stored turned back, so that upright it is the one that was turned back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x"
    upright = photo.resize((120, 90))
    stored = upright.transpose(jpeg.UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)]) if orientation > 1 else upright
    stored.save(path, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    for found in both_ways(path, (10, 20, 100, 80), PLAIN):
        wanted = np.asarray(crops.cut(upright, (10, 20, 100, 80), PLAIN)).transpose(2, 0, 1).astype(int)
        assert abs(found - wanted).mean() < (6 if format == "JPEG" else 0.01)  # turned wrongly: 40


def test_a_black_photo_is_a_crop_all_the_same(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (900, 900)).save(path)
    quick, slow = both_ways(path, (100, 100, 700, 700), PLAIN)
    assert (quick == slow).all()


# The cache.


def cache_of(folder: Path, ears: Path, kind: str = "disk", limit: float = 1e9) -> CropCaches:
    return CropCaches(kind, folder, limit, 1, [read_manifest(ears / "train_teacher.npy", ears)], PLAIN)


def ear(number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (3, 64, 64), np.uint8)


def never():
    raise AssertionError("it is cached, and need not be cut again")


@pytest.fixture
def image(tmp_path) -> str:
    path = tmp_path / "image.jpg"
    path.write_bytes(b"an image")
    return str(path)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached_crops_are_returned_to_the_byte_here_and_in_other_processes(kind, ears, tmp_path, image):
    caches = cache_of(tmp_path / "crops", ears, kind)
    cache = caches.caches[0]
    assert (cache.crop(5, image, ear) == ear()).all() and (cache.crop(5, image, never) == ear()).all()
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(cache))
    script = (
        "import pickle, sys\n"
        f"cache = pickle.load(open({str(tmp_path / 'cache.pkl')!r}, 'rb'))\n"
        f"print(cache.crop(5, {image!r}, lambda: sys.exit('cut again')).sum())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert int(done.stdout) == ear().sum(), done.stderr


def test_an_image_that_changes_is_cut_again(ears, tmp_path, image):
    cache = cache_of(tmp_path / "crops", ears).caches[0]
    cache.crop(5, image, ear)
    Path(image).write_bytes(b"another image")
    assert (cache.crop(5, image, lambda: ear(1)) == ear(1)).all()
    Path(image).unlink()
    assert (cache.crop(5, image, lambda: ear(2)) == ear(2)).all()  # cutting raises the error for a missing file


@pytest.mark.parametrize("at", [3, 20, 5000])
def test_a_record_that_is_damaged_or_half_written_is_written_again(ears, tmp_path, image, at):
    cache = cache_of(tmp_path / "crops", ears).caches[0]
    for row in (0, 1):
        cache.crop(row, image, ear)
    record = 40 + 3 * 64 * 64
    with open(cache.name, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 8]))
        file.truncate(2 * record - 100)
    for row in (0, 1):
        assert (cache.crop(row, image, lambda: ear(1)) == ear(1)).all()
        assert (cache.crop(row, image, never) == ear(1)).all()


def test_other_preprocessing_boxes_or_images_are_another_cache(ears, tmp_path):
    manifest = read_manifest(ears / "train_teacher.npy", ears)
    moved = replace(manifest, boxes=[*manifest.boxes[:3], (1.0, 2.0, 30.0, 40.0), *manifest.boxes[4:]])
    squashed = Preprocessing(64, 0.1, False, "bicubic", PLAIN.mean, PLAIN.std)
    kinds = [(manifest, PLAIN), (moved, PLAIN), (manifest.subset(range(5)), PLAIN), (manifest, squashed)]
    paths = [CropCaches("disk", tmp_path, 1e9, 1, [m], p).caches[0].name for m, p in kinds]
    assert len(set(paths)) == 4 and CropCaches("disk", tmp_path, 1e9, 1, [manifest], PLAIN).caches[0].name == paths[0]


def test_the_limit_holds_and_unused_old_caches_make_room(ears, tmp_path, image):
    folder = tmp_path / "crops"
    full = cache_of(folder, ears)
    count = full.caches[0].capacity
    for row in range(count):
        full.caches[0].crop(row, image, ear)
    old = Path(full.caches[0].name)
    manifest = read_manifest(ears / "val_teacher.npy", ears)
    while_used = CropCaches("disk", folder, old.stat().st_size + 5 * 12328, 1, [manifest], PLAIN)
    assert old.exists() and while_used.caches[0].capacity == 5 < len(manifest)
    assert "5 of" not in while_used.summary and "% of them" in while_used.summary
    while_used.caches[0].crop(5, image, ear)  # beyond
    assert (while_used.caches[0].crop(5, image, lambda: ear(1)) == ear(1)).all()
    del full, while_used
    after = CropCaches("disk", folder, 8 * 12328, 1, [manifest], PLAIN)
    assert not old.exists() and after.caches[0].capacity == 8


def test_a_lower_limit_shrinks_a_cache_and_none_at_all_is_off(ears, tmp_path, image):
    cache = cache_of(tmp_path, ears).caches[0]
    for row in range(cache.capacity):
        cache.crop(row, image, ear)
    del cache
    assert Path(cache_of(tmp_path, ears, limit=4 * 12328).caches[0].name).stat().st_size == 4 * 12328
    off = cache_of(tmp_path, ears, limit=0.0)
    assert off.caches == [None] and off.summary == "not kept"


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_foreign_file_under_the_name_of_a_cache_is_not_written(ears, tmp_path, image, link):
    name = Path(cache_of(tmp_path / "crops", ears).caches[0].name)
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    name.unlink()
    link(precious, name)
    caches = cache_of(tmp_path / "crops", ears)
    assert caches.caches == [None] and caches.summary.startswith("not kept (")
    assert precious.read_text() == "years of work"


def test_a_changed_image_of_the_same_size_and_time_is_cut_again(ears, tmp_path, image):
    cache = cache_of(tmp_path / "crops", ears).caches[0]
    cache.crop(5, image, ear)
    status = os.stat(image)
    Path(image).write_bytes(b"b image")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (cache.crop(5, image, lambda: ear(1)) == ear(1)).all()


@pytest.mark.slow
def test_two_workers_cut_each_crop_once_in_all_epochs(manifests, tmp_path, monkeypatch, earteach):
    """Each cut leaves a byte in a file, from whatever process."""
    count = tmp_path / "count"
    cut = crops.load_crop

    def counted(*words):
        with open(count, "ab", buffering=0) as file:
            file.write(b".")
        return cut(*words)

    monkeypatch.setattr("ear_teacher_cli.data.dataset.load_crop", counted)
    words = ["train", *manifests, *SMALL, "--max-epochs", 3, "--output-dir", tmp_path, "--num-workers", 2]
    cuts = {}
    for kind in ("off", "ram", "disk"):
        assert earteach(*words, "--cache", kind, "--overwrite").code == 0
        cuts[kind] = count.stat().st_size
        count.unlink()
    assert cuts["off"] >= 3 * 32 and cuts["ram"] <= 1.3 * 32 and cuts["disk"] <= 1.3 * 32, cuts


def test_in_a_folder_that_cannot_be_written_nothing_is_cached(ears, tmp_path):
    (tmp_path / "file").write_text("no folder")
    caches = cache_of(tmp_path / "file" / "crops", ears)
    assert caches.caches == [None] and caches.summary.startswith("not kept (")


def test_a_full_disk_ends_caching_but_not_the_run(ears, tmp_path, image, monkeypatch):
    cache = cache_of(tmp_path / "crops", ears).caches[0]

    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ear_teacher_cli.platform.write_at", full)
    assert (cache.crop(0, image, ear) == ear()).all() and cache.capacity == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_run_gives_the_same_result_with_cached_crops(kind, run, manifests, tmp_path, earteach):
    """`run` keeps them in memory; two workers fill the file, and a second run finds it filled."""
    words = ["train", *manifests, *SMALL, "--max-epochs", 6, "--output-dir", tmp_path]
    said = earteach(*words, "--cache", "off", "--num-workers", 2)
    assert said.code == 0 and "crops:" not in said.err
    wanted = metrics_of(tmp_path / "ear_teacher")
    for _ in range(2):
        said = earteach(*words, "--cache", kind, "--num-workers", 2, "--overwrite")
        assert said.code == 0 and "crops: kept in " in said.err
        assert metrics_of(tmp_path / "ear_teacher") == wanted
    kept = list((tmp_path / ".crops").glob("*.crops")) if kind == "disk" else []
    assert len(kept) == (2 if kind == "disk" else 0) and all(path.stat().st_mode & 0o077 == 0 for path in kept)


def test_from_the_second_time_on_no_photo_is_decoded(manifests, tmp_path, monkeypatch):
    data = EarDataModule(small_config(manifests, output_dir=str(tmp_path), cache="disk"))
    data.setup("fit")
    data.train_set.cache = CropCaches(
        "disk", tmp_path, 1e9, 1, [data.train_set.manifest], data.train_set.preprocessing
    ).caches[0]
    first = [data.train_set[i]["pixels"] for i in range(len(data.train_set))]
    monkeypatch.setattr("ear_teacher_cli.data.dataset.load_crop", lambda *words: never())
    second = [data.train_set[i]["pixels"] for i in range(len(data.train_set))]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_no_images_keeps_no_images_on_disk(manifests, tmp_path, earteach):
    words = ["train", *manifests, *SMALL, "--output-dir", tmp_path, "--no-images"]
    said = earteach(*words, "--cache", "disk")
    assert said.code == 2 and "--cache ram" in said.err
    said = earteach(*words, "--max-epochs", 1)
    assert said.code == 0 and "crops: kept in memory" in said.err and not (tmp_path / ".crops").exists()

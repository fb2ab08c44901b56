"""Images to measure with: drawn ears, enlarged, with grain that gives a JPEG the file size of a camera's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from make_sample_ears import main as make_sample_ears
from PIL import Image

from ear_teacher_cli.data.manifest import Box, Manifest, read_manifest

SIZES = {"12 MP": (4000, 3000), "2 MP": (1632, 1224)}


def drawn(folder: Path, people: int = 12) -> Manifest:
    """Draw ears in `folder`/ears, unless they exist, and return the training manifest: `people` x 8 photos with boxes."""
    if not (folder / "ears").exists():
        arguments = ["--people", str(people + 2), "--val-people", "1", "--eval-people", "1"]
        make_sample_ears([str(folder / "ears"), *arguments])
    return read_manifest(folder / "ears" / "train_teacher.npy", folder / "ears")


def manifest_of(paths: list[str], boxes: Sequence[Box | None]) -> Manifest:
    """Return a manifest of images in one folder, without identities."""
    folder = Path(paths[0]).parent
    return replace(
        drawn(folder.parent),
        root=folder,
        paths=[Path(path).name for path in paths],
        boxes=boxes,
        rows=range(len(paths)),
        identities=None,
        sides=None,
    )


def enlarged(folder: Path, size: str, count: int, suffix: str = ".jpg") -> tuple[list[str], list[Box]]:
    """Return the paths of `count` photos of `size` and the ears' boxes.

    JPEG files have quality 90, which makes about 4 MB of 12 megapixels.
    """
    manifest, (width, height) = drawn(folder), SIZES[size]
    random = np.random.default_rng(0)
    grain = random.normal(0, 6, (height, width, 1))
    coarse = Image.fromarray(random.normal(128, 20, (height // 4, width // 4)).clip(0, 255).astype(np.uint8))
    grain += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)[..., None] - 128
    target = folder / f"{size.replace(' ', '')}{suffix.replace('.', '-')}"
    target.mkdir(exist_ok=True)
    paths, boxes = [], []
    for number in range(count):
        small = Image.open(manifest.file(number % len(manifest))).convert("RGB")
        scale = width / small.width, height / small.height
        x1, y1, x2, y2 = manifest.boxes[number % len(manifest)]
        boxes.append((x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]))
        path = target / f"{number:04d}{suffix}"
        if not path.exists():
            large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float64)
            noisy = Image.fromarray((large + np.roll(grain, number * 37, 1)).clip(0, 255).astype(np.uint8))
            noisy.save(path, quality=90) if suffix == ".jpg" else noisy.save(path, compress_level=1)
        paths.append(str(path))
    return paths, boxes


def crops(folder: Path, count: int, suffix: str = ".jpg") -> tuple[list[str], list[None]]:
    """Return the paths of `count` crops of ears of about 200 x 200 px, and no boxes."""
    manifest = drawn(folder)
    target = folder / f"crops{suffix.replace('.', '-')}"
    target.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        path = target / f"{number:04d}{suffix}"
        if not path.exists():
            row = number % len(manifest)
            ear = Image.open(manifest.file(row)).convert("RGB").crop(tuple(map(int, manifest.boxes[row])))
            ear.resize((180, 220), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
    return paths, [None] * count

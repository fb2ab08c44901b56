"""Speed of cutting crops of 224 px from photos, on one core.

Compared with OpenCV (imread, cut, resize, BGR to RGB, as the original package does it), with timm's loader (ImageDataset
and its evaluation transform, whole images), and with the upper bound: Pillow's decoder alone, at the scale that the crop
allows.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench import Line, Work, in_turn
from photos import crops, enlarged
from PIL import Image

from ear_teacher_cli.data import jpeg
from ear_teacher_cli.data.crop import buffered_box, cut, load_crop, read_image
from ear_teacher_cli.data.preprocessing import Preprocessing

SIDE = 224
PREPROCESSING = Preprocessing(SIDE, 0.1, True, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    torch.set_num_threads(1)
    count = 3 if quick else 12
    for name in ("12 MP.jpg", "2 MP.jpg", "2 MP.png"):
        yield from _photos(folder, rounds, count, *name.split("."))
    for suffix in ("jpg", "png"):
        yield from _crops(folder, rounds, 20 * count, suffix)
    paths, _ = enlarged(folder, "12 MP", count)
    dataset = timm_dataset(Path(paths[0]).parent)
    functions = {
        "ours": lambda: [load_crop(path, None, PREPROCESSING) for path in paths],
        "timm": lambda: [dataset[i] for i in range(count)],
    }
    work = Work("images", "12 MP photo, whole, JPEG", count, "images")
    yield work.compare(in_turn(functions, rounds), "timm", "timm's ImageDataset and transform")


def _photos(folder: Path, rounds: int, count: int, size: str, suffix: str) -> Iterator[Line]:
    files = list(zip(*enlarged(folder, size, count, f".{suffix}"), strict=True))
    functions = {
        "ours": lambda: [load_crop(*file, PREPROCESSING) for file in files],
        "decoder": lambda: [decode(*file) for file in files],
        "whole": lambda: [_decode_whole(*file) for file in files],
    }
    if opencv := _opencv_version():
        functions["opencv"] = lambda: [_with_opencv(*file) for file in files]
    seconds = in_turn(functions, rounds)
    work = Work("images", f"{size} photo, {suffix.upper()}", count, "crops")
    if opencv:
        yield work.compare(seconds, "opencv", f"OpenCV {opencv}: imread, cut, resize", 3.0 if size == "12 MP" else None)
    yield work.compare(seconds, "whole", "the whole image decoded (earlier versions of earteach, and validate-data)")
    yield work.compare(seconds, "decoder", "Pillow's decoder alone, at the scale that the crop allows", 0.9)


def _crops(folder: Path, rounds: int, count: int, suffix: str) -> Iterator[Line]:
    """Measure small crops, for which enlarging costs more than decoding and is part of the upper bound."""
    files = list(zip(*crops(folder, count, f".{suffix}"), strict=True))
    functions = {
        "ours": lambda: [load_crop(*file, PREPROCESSING) for file in files],
        "resized": lambda: [decode(path).resize((184, SIDE), Image.Resampling.BICUBIC) for path, _ in files],
    }
    if opencv := _opencv_version():
        functions["opencv"] = lambda: [_with_opencv(*file) for file in files]
    seconds = in_turn(functions, rounds)
    work = Work("images", f"200 px crop, {suffix.upper()}", count, "crops")
    if opencv:
        yield work.compare(seconds, "opencv", f"OpenCV {opencv}: imread, cut, resize")
    yield work.compare(seconds, "resized", "Pillow's decoder and resize alone", 0.9)


def _opencv_version() -> str | None:
    try:
        import cv2
    except ImportError:  # pip install opencv-python-headless
        return None
    cv2.setNumThreads(1)
    return cv2.__version__


def _with_opencv(path: str, box) -> object:
    import cv2

    image = cv2.imread(path)
    height, width = image.shape[:2]
    if box is not None:
        x1, y1, x2, y2 = (round(v) for v in buffered_box(box, (width, height), PREPROCESSING.bbox_buffer))
        image = image[y1:y2, x1:x2]
    return cv2.cvtColor(cv2.resize(image, (SIDE, SIDE)), cv2.COLOR_BGR2RGB)


def _decode_whole(path: str, box) -> None:
    np.asarray(cut(read_image(path).image, box, PREPROCESSING))


def decode(path: str, box=None) -> Image.Image:
    """Decode all rows of an image at 1/1, 1/2, 1/4 or 1/8 of its size, the part of the work that Pillow can do alone."""
    image = Image.open(io.BytesIO(Path(path).read_bytes()))
    x1, y1, x2, y2 = box or (0, 0, *image.size)
    scale = max(x2 - x1, y2 - y1) * (1.2 if box else 1) / SIDE
    shrink = next((k for k in (8, 4, 2) if k * jpeg.SPARE <= scale), 1)
    image.draft(None, (image.width // shrink, image.height // shrink))
    image.load()
    return image


def timm_dataset(folder: Path):
    """Return timm's ImageDataset of the JPEG files of a folder, with its evaluation transform."""
    from timm.data import ImageDataset, create_transform

    transform = create_transform((3, SIDE, SIDE), is_training=False, crop_pct=1.0, interpolation="bicubic")
    root = folder.with_name(folder.name + "-of-timm")  # ImageDataset expects a folder per class, and reads all of them
    (root / "one").mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.jpg"):
        if not (root / "one" / path.name).exists():
            (root / "one" / path.name).hardlink_to(path)
    return ImageDataset(str(root), transform=transform)

"""From a photo to a crop of 224 px, on one core.

Against the straightforward path with OpenCV (imread, cut the array, resize, BGR to RGB: what the seed does), timm's
own loader (ImageDataset and its evaluation transform, whole images), and Pillow's decoder alone at the scale that
the crop allows, the limit.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench import Line, in_turn, rate, speed_up
from photos import crops, enlarged
from PIL import Image

from ear_teacher_cli.data import jpeg
from ear_teacher_cli.data.crop import buffered_box, cut, load_crop, read_image
from ear_teacher_cli.data.preprocessing import Preprocessing

SIDE = 224
PREPROCESSING = Preprocessing(SIDE, 0.1, True, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    torch.set_num_threads(1)
    count = 3 if quick else 12
    for name, suffix in (("12 MP", ".jpg"), ("2 MP", ".jpg"), ("2 MP", ".png"), ("crops", ".jpg"), ("crops", ".png")):
        many = count * 20 if name == "crops" else count
        paths, boxes = crops(folder, many, suffix) if name == "crops" else enlarged(folder, name, many, suffix)
        what = f"{'200 px crop' if name == 'crops' else name + ' photo'}, {suffix[1:].upper()}"
        ways = {
            "ours": lambda p=paths, b=boxes: (
                [load_crop(*each, PREPROCESSING) for each in zip(p, b, strict=True)] and None
            ),
            "decoder": lambda p=paths, b=boxes: [_decode(*each) for each in zip(p, b, strict=True)] and None,
        }
        if name != "crops":
            ways["whole"] = lambda p=paths, b=boxes: [_whole(*each) for each in zip(p, b, strict=True)] and None
        if name == "crops":
            ways["resized"] = lambda p=paths: (
                [_decode(each, None).resize((184, SIDE), Image.Resampling.BICUBIC) for each in p] and None
            )
        if _opencv():
            ways["opencv"] = lambda p=paths, b=boxes: [_straight(*each) for each in zip(p, b, strict=True)] and None
        seconds = in_turn(ways, rounds)
        mine = rate(seconds["ours"], many, "crops")
        if "opencv" in seconds:
            aim = 3.0 if name == "12 MP" else None
            against = f"OpenCV {_opencv()}: imread, cut, resize"
            yield Line(
                "pictures",
                what,
                against,
                speed_up(seconds, "ours", "opencv"),
                aim,
                mine,
                rate(seconds["opencv"], many, "crops"),
            )
        if name == "crops":  # it costs more to enlarge them than to decode them
            against = "Pillow decoding and resizing alone"
            yield Line(
                "pictures",
                what,
                against,
                speed_up(seconds, "ours", "resized"),
                0.9,
                mine,
                rate(seconds["resized"], many, "crops"),
            )
            continue
        against = "the whole image decoded (earteach before, and still validate-data)"
        yield Line(
            "pictures",
            what,
            against,
            speed_up(seconds, "ours", "whole"),
            None,
            mine,
            rate(seconds["whole"], many, "crops"),
        )
        against = "Pillow decoding alone, at the scale the crop allows"
        yield Line(
            "pictures",
            what,
            against,
            speed_up(seconds, "ours", "decoder"),
            0.9,
            mine,
            rate(seconds["decoder"], many, "crops"),
        )
    paths, _ = enlarged(folder, "12 MP", count)
    dataset = _of_timm(Path(paths[0]).parent)
    seconds = in_turn(
        {
            "ours": lambda: [load_crop(path, None, PREPROCESSING) for path in paths] and None,
            "timm": lambda: [dataset[i] for i in range(count)] and None,
        },
        rounds,
    )
    yield Line("pictures", "12 MP photo, whole, JPEG", "timm's ImageDataset and transform", speed_up(seconds, "ours", "timm"), None,
               rate(seconds["ours"], count, "pictures"), rate(seconds["timm"], count, "pictures"))  # fmt: skip


def _opencv() -> str | None:
    try:
        import cv2
    except ImportError:  # pip install opencv-python-headless
        return None
    cv2.setNumThreads(1)
    return cv2.__version__


def _straight(path: str, box) -> object:
    import cv2

    image = cv2.imread(path)
    height, width = image.shape[:2]
    if box is not None:
        x1, y1, x2, y2 = (round(v) for v in buffered_box(box, (width, height), PREPROCESSING.bbox_buffer))
        image = image[y1:y2, x1:x2]
    return cv2.cvtColor(cv2.resize(image, (SIDE, SIDE)), cv2.COLOR_BGR2RGB)


def _whole(path: str, box) -> None:
    np.asarray(cut(read_image(path).image, box, PREPROCESSING))


def _decode(path: str, box) -> Image.Image:
    """The whole image at 1/1, 1/2, 1/4 or 1/8: all that a program can leave to Pillow."""
    image = Image.open(io.BytesIO(Path(path).read_bytes()))
    x1, y1, x2, y2 = box or (0, 0, *image.size)
    scale = max(x2 - x1, y2 - y1) * (1.2 if box else 1) / SIDE
    shrink = next((k for k in (8, 4, 2) if k * jpeg.SPARE <= scale), 1)
    image.draft(None, (image.width // shrink, image.height // shrink))
    image.load()
    return image


def _of_timm(folder: Path):
    from timm.data import ImageDataset, create_transform

    transform = create_transform((3, SIDE, SIDE), is_training=False, crop_pct=1.0, interpolation="bicubic")
    root = folder.with_name(folder.name + "-of-timm")  # it wants a folder a class, and takes all that is below its root
    (root / "one").mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.jpg"):
        if not (root / "one" / path.name).exists():
            (root / "one" / path.name).hardlink_to(path)
    return ImageDataset(str(root), transform=transform)

"""Cut ears out of images that Python code passes, one or many, from disk or memory.

The command line reads lists (manifest.py) and leaves out unreadable images. Here the caller expects a row for each
image: the first that cannot be used raises an error that names its position, counted from 0.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from ..errors import EarTeachError, ImageError
from ..files import printable
from .crop import ImageSource, load_crop
from .manifest import side_of
from .preprocessing import Preprocessing

_END = object()  # marks the end of an iterator: no image, box or side is equal to it


def crops_given(
    images: ImageSource | Iterable[ImageSource],
    boxes: Any = None,
    sides: str | Iterable[str | None] | None = None,
    *,
    preprocessing: Preprocessing,
) -> Iterator[np.ndarray]:
    """Yield the crop uint8 3,S,S of each image, in order, as `embed` cuts it. Iterators are read one image at a time.

    `images`: one that `load_crop` reads, or many. `boxes`: four numbers for one image; for many, a box or None for
    each. `sides`: likewise 'left', 'right' or None; right ears are mirrored if `preprocessing.mirror`. Raises
    ImageError for an unusable image or box, EarTeachError if the numbers of images, boxes and sides differ, or if there
    are no images.
    """
    one = _is_one(images)
    if one:
        boxes = [boxes] if _is_box(boxes) else boxes
        sides = [sides] if isinstance(sides, str) else sides
    many = _require_iterable("images", [images] if one else images, "a path, a PIL image, an array, or many of them")
    wanted = {
        "boxes": (boxes, "x1, y1, x2, y2 for one image, or a list with a box or None for each"),
        "sides": (sides, "'left', 'right' or None for each image"),
    }
    columns = {
        name: _require_iterable(name, values, advice) for name, (values, advice) in wanted.items() if values is not None
    }
    if not one and _is_box(boxes):
        raise EarTeachError(
            "boxes: is one box, but there may be several images; give a list with a box or None for each"
        )
    for name, column in columns.items():
        _require_same_length(name, column, many)
    return _crops(iter(many), {name: iter(column) for name, column in columns.items()}, preprocessing)


def _crops(
    images: Iterator[ImageSource], columns: dict[str, Iterator[Any]], preprocessing: Preprocessing
) -> Iterator[np.ndarray]:
    count = 0
    for image in images:
        found = {name: next(column, _END) for name, column in columns.items()}
        for name, value in found.items():
            if value is _END:
                raise EarTeachError(f"{name}: there are {count}, but more images; give one or None for each image")
        yield _crop(image, found.get("boxes"), found.get("sides"), preprocessing, count)
        count += 1
    if not count:
        raise EarTeachError("images: there are none; give at least one")
    for name, column in columns.items():
        if next(column, _END) is not _END:
            raise EarTeachError(f"{name}: there are more than the {count} images; give one or None for each image")


def _crop(image: ImageSource, box: Any, side: Any, preprocessing: Preprocessing, place: int) -> np.ndarray:
    """Return the crop of the image at position `place`, mirrored if required. Raises ImageError, naming the
    position."""
    known_side = side_of(side) if isinstance(side, str) else None
    if side is not None and known_side is None:
        raise EarTeachError(f"image {place}: side {printable(repr(side))[:40]} is unknown; give left, right or None")
    try:
        crop = load_crop(image, box, preprocessing)
    except ImageError as error:
        name = f" ({printable(os.fspath(image))[:200]})" if isinstance(image, str | os.PathLike) else ""
        raise ImageError(error.reason, f"image {place}{name}: {error.detail}") from error
    return crop[:, :, ::-1] if preprocessing.mirror and known_side == "right" else crop


def _is_one(images: Any) -> bool:
    """Whether it is one image, usable or not."""
    if isinstance(images, np.ndarray):
        return images.ndim != 4 and images.dtype.kind not in "OU"  # not a stack of images, not an array of paths
    return isinstance(images, str | bytes | os.PathLike | Image.Image)


def _is_box(boxes: Any) -> bool:
    """Whether it is one box, well formed or not, rather than a list of boxes."""
    first = boxes[0] if isinstance(boxes, list | tuple) and boxes else None
    return getattr(boxes, "ndim", None) == 1 or isinstance(first, int | float | np.number)


def _require_iterable(name: str, values: Any, wanted: str) -> Iterable[Any]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict):
        raise EarTeachError(f"{name}: is of type {type(values).__name__}; give {wanted}")
    return values


def _require_same_length(name: str, column: Any, images: Any) -> None:
    """Raise EarTeachError if both have a length, and these differ."""
    if hasattr(column, "__len__") and hasattr(images, "__len__") and len(column) != len(images):
        counts = f"{len(column)} for {len(images)} image{'s' if len(images) != 1 else ''}"
        raise EarTeachError(
            f"{name}: there are {counts}; give one or None for each, and an image with several ears several times"
        )

"""Images that Python code hands over, one or many, from disk or memory: checked, and cut one after the other.

The command line reads lists (manifest.py) and leaves out what cannot be read. Here the caller has a row in mind for each
image: the first that cannot be used is an error that names its place, counted from 0.
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

_END = object()  # no image, box or side is


def crops_given(
    images: ImageSource | Iterable[ImageSource],
    boxes: Any = None,
    sides: str | Iterable[str | None] | None = None,
    *,
    preprocessing: Preprocessing,
) -> Iterator[np.ndarray]:
    """uint8 3,S,S of each image, in order, as `embed` sees it. Of an iterator no image is asked for before the crop of the
    last one was taken.

    `images`: one that `load_crop` reads, or many. `boxes`: for one image four numbers, for many as many boxes or Nones.
    `sides`: likewise 'left', 'right' or None; right ears are mirrored if `preprocessing.mirror`. Raises ImageError for an
    image or a box, EarTeachError for another number of boxes or sides than images, or none.
    """
    one = _is_one(images)
    if one:
        boxes = [boxes] if _is_box(boxes) else boxes
        sides = [sides] if isinstance(sides, str) else sides
    listed = _column("images", [images] if one else images, "a path, a PIL image, an array, or many of them")
    columns = {
        "boxes": _column("boxes", boxes, "x1, y1, x2, y2 for one image, or a list with a box or None for each"),
        "sides": _column("sides", sides, "'left', 'right' or None for each image"),
    }
    if not one and _is_box(boxes):
        raise EarTeachError(
            "boxes: is one box, and there may be several images; give a list with a box or None for each"
        )
    columns = {name: column for name, column in columns.items() if column is not None}
    for name, column in columns.items():
        _require_as_many(name, column, listed)
    return _crops(iter(listed), {name: iter(column) for name, column in columns.items()}, preprocessing)


def _crops(
    images: Iterator[ImageSource], columns: dict[str, Iterator[Any]], preprocessing: Preprocessing
) -> Iterator[np.ndarray]:
    count = 0
    for image in images:
        found = {name: next(column, _END) for name, column in columns.items()}
        for name, value in found.items():
            if value is _END:
                raise EarTeachError(f"{name}: end after {count}, images go on; give one or None for each image")
        yield _crop(image, found.get("boxes"), found.get("sides"), preprocessing, count)
        count += 1
    if not count:
        raise EarTeachError("images: there are none; give at least one")
    for name, column in columns.items():
        if next(column, _END) is not _END:
            raise EarTeachError(f"{name}: go on after {count} images; give one or None for each image")


def _crop(image: ImageSource, box: Any, side: Any, preprocessing: Preprocessing, place: int) -> np.ndarray:
    """The crop, mirrored if it has to be. Raises ImageError, naming the place."""
    turned = side_of(side) if isinstance(side, str) else None
    if side is not None and turned is None:
        raise EarTeachError(f"image {place}: side {printable(repr(side))[:40]} is unknown; give left, right or None")
    try:
        crop = load_crop(image, box, preprocessing)
    except ImageError as error:
        name = f" ({printable(os.fspath(image))[:200]})" if isinstance(image, str | os.PathLike) else ""
        raise ImageError(error.reason, f"image {place}{name}: {error.detail}") from error
    return crop[:, :, ::-1] if preprocessing.mirror and turned == "right" else crop


def _is_one(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim != 4 and images.dtype.kind not in "OU"  # not a stack of images, not an array of paths
    return isinstance(images, str | bytes | os.PathLike | Image.Image)


def _is_box(boxes: Any) -> bool:
    """Whether it is one box, well formed or not, and no list of boxes."""
    first = boxes[0] if isinstance(boxes, list | tuple) and boxes else None
    return getattr(boxes, "ndim", None) == 1 or isinstance(first, int | float | np.number)


def _column(name: str, values: Any, wanted: str) -> Iterable[Any] | None:
    if values is None and name != "images":
        return None
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict):
        raise EarTeachError(f"{name}: is of type {type(values).__name__}; give {wanted}")
    return values


def _require_as_many(name: str, column: Any, images: Any) -> None:
    """Raise EarTeachError if two that know their lengths have different ones."""
    if hasattr(column, "__len__") and hasattr(images, "__len__") and len(column) != len(images):
        counts = f"{len(column)} for {len(images)} image{'s' if len(images) != 1 else ''}"
        raise EarTeachError(
            f"{name}: are {counts}; give one or None for each, an image with several ears several times"
        )

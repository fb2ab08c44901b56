"""What a reader of a format returns (Rows), and checks of single values that all readers share.

`where` is the name of the file in messages, `row` the number of the row.
"""

import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import ManifestError
from ...files import printable
from ..boxes import BOX_FORMATS, Box, Boxes
from ..texts import Texts

_MAX_CHARACTERS = 4096  # of a path on Linux


@dataclass
class Rows:
    """A list as it was read, one entry per ear; boxes are in the order and units of the list."""

    paths: Texts = field(default_factory=Texts)
    boxes: Boxes = field(default_factory=Boxes)
    numbers: array = field(default_factory=lambda: array("q"))  # of rows or annotations, from 0
    identities: Texts = field(default_factory=Texts)
    sides: Texts = field(default_factory=Texts)
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)  # path -> width, height that the list states
    # Order (of BOX_FORMATS) and units that the list itself names; None: see resolve_boxes.py.
    order: str | None = None
    ambiguous_shares: bool = False  # names are x, y, w, h: as shares of the image, they may also be YOLO's centres
    units: str | None = None
    named_by: str = ""  # what names the order, for messages: "columns xmin, ymin, xmax, ymax"
    from_points: bool = False  # boxes are around keypoints; they may leave the image and are clamped to it
    warnings: list[str] = field(default_factory=list)  # about what the reader did not use

    def add(self, number: int, path: str, box: Box | None, identity: Any = "", side: Any = "") -> None:
        """Append one ear. Raises ManifestError if a text is longer than a path can be."""
        texts = path, label(identity), label(side)
        if max(map(len, texts)) > _MAX_CHARACTERS:
            raise ManifestError(f"row {number}: has a path or a name of over {_MAX_CHARACTERS} characters; correct it")
        self.numbers.append(number)
        self.paths.append(path.replace("\\", "/"))
        self.boxes.append(box)
        self.identities.append(texts[1])
        self.sides.append(texts[2])

    def extend(self, other: "Rows", numbers: Iterable[int]) -> None:
        """Append the rows of another list whose boxes are in the same order and units."""
        for number, path, box, identity, side in zip(
            numbers, other.paths, other.boxes, other.identities, other.sides, strict=True
        ):
            self.add(number, path, box, identity, side)


def label(value: Any) -> str:
    """Return an identity or a side as text; '' for None and NaN. Raises ManifestError for a list of several."""
    if type(value) is str:
        return value
    if isinstance(value, list | tuple | dict | np.ndarray):
        raise ManifestError(f"identity or side {printable(value)[:60]}: is not one text per ear; correct the row")
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def per_box(labels: Any, boxes: list) -> list:
    """Return the labels of one row's boxes: one each if `labels` is a list of that length, else the same for all."""
    if not isinstance(labels, str) and isinstance(labels, list | tuple | np.ndarray) and len(labels) == len(boxes):
        return list(labels)
    return [labels] * len(boxes)


def stated_size(width: Any, height: Any) -> tuple[float, float] | None:
    """Return the size of an image that a list states; None if it is not a size, or a placeholder."""
    try:
        size = float(width), float(height)
    except (TypeError, ValueError):
        return None
    return size if min(size) > 1 and np.isfinite(size).all() else None


def path_text(value: Any, where: str, row: int) -> str:
    """Return a path as text. Raises ManifestError if it is empty or of another type."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f"{where} row {row}: path is {printable(repr(value))[:80]}; give a path as text")
    return str(value)


def four_numbers(entry: Any, where: str, row: int) -> Box:
    """Return a box as four floats, in any order, perhaps NaN: validate-data checks boxes against their images.

    Raises ManifestError for anything but four numbers.
    """
    try:
        a, b, c, d = (float(v) for v in entry)
    except (TypeError, ValueError):
        commas = any(isinstance(v, str) and re.fullmatch(r"-?\d+,\d+", v.strip()) for v in entry) if entry else False
        why = " (decimal commas: write 1.5)" if commas else ""
        raise ManifestError(
            f"{where} row {row}: box {printable(entry)[:80]} is not four numbers{why}; correct the row"
        ) from None
    return a, b, c, d


def boxes_of(entry: Any, where: str, row: int) -> list[Box | None]:
    """Return the boxes of one row: None, four numbers, or a list of fours (an empty one: no ear is marked).

    Raises ManifestError.
    """
    if entry is None:
        return [None]
    if isinstance(entry, np.ndarray):
        entry = entry.tolist()
    if isinstance(entry, list | tuple) and entry and isinstance(entry[0], list | tuple | np.ndarray):
        return [four_numbers(box, where, row) for box in entry]
    if isinstance(entry, list | tuple) and not entry:
        return []
    return [four_numbers(entry, where, row)]


def points_of(entry: Any, where: str, row: int) -> np.ndarray:
    """Return the keypoints [P, 2] of one ear, from P x 2, P x 3 (x, y, visibility) or a flat list of the latter (COCO).

    Points that are not visible (visibility 0) or not finite are left out. Raises ManifestError if the others span no
    box.
    """
    try:
        points = np.asarray(entry, dtype=np.float64)
        if points.ndim == 1:
            points = points.reshape(-1, 3)
        if points.ndim != 2 or points.shape[1] not in (2, 3):
            raise ValueError
    except (TypeError, ValueError):
        raise ManifestError(
            f"{where} row {row}: keypoints are not P x 2 or P x 3 numbers (x, y, visibility); correct the row"
        ) from None
    if points.shape[1] == 3:
        points = points[points[:, 2] > 0]
    points = points[np.isfinite(points[:, :2]).all(axis=1), :2]
    if len(points) < 2 or (np.ptp(points, axis=0) <= 0).any():
        raise ManifestError(f"{where} row {row}: its visible keypoints span no box; correct the row or remove it")
    return points


def order_named(value: Any, where: str) -> str | None:
    """Return the order that a list's own `box_format` names, None if it is empty. Raises ManifestError if it is
    unknown."""
    if value is None or label(value).strip() == "":
        return None
    order = label(value).strip().casefold()
    if order not in BOX_FORMATS:
        raise ManifestError(f"{where}: box_format is {printable(order)[:40]!r}; use one of {', '.join(BOX_FORMATS)}")
    return order

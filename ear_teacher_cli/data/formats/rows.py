"""What a reader of one format returns, and the checks that all readers share."""

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

_LONGEST = 4096  # characters of a path on Linux


@dataclass
class Rows:
    """A list as it was read, one entry per ear; the boxes are still in the order and units of the list."""

    paths: list[str] = field(default_factory=list)
    boxes: Boxes = field(default_factory=Boxes)
    numbers: array = field(default_factory=lambda: array("q"))  # of the row or annotation, from 0
    identities: list[str] = field(default_factory=list)
    sides: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)  # path -> width, height that the list states
    # How the list itself says that its boxes are to be read; None: it does not, and they are judged.
    order: str | None = None
    open_in_shares: bool = False  # x, y, w, h as shares of the image: YOLO's centres have these names, too
    units: str | None = None
    named_by: str = ""  # what says so, for messages: "columns xmin, ymin, xmax, ymax"
    from_points: bool = False  # boxes around keypoints; they may leave the image and are clamped to it
    warnings: list[str] = field(default_factory=list)  # what the reader left unused

    def add(self, number: int, path: str, box: Box | None, identity: Any = "", side: Any = "") -> None:
        """Append one ear. Raises ManifestError if a text is longer than a path can be."""
        texts = path, label(identity), label(side)
        if max(map(len, texts)) > _LONGEST:
            raise ManifestError(f"row {number}: holds a path or a name of over {_LONGEST} characters; mend it")
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
    """An identity or a side as text; '' for None and NaN. Raises ManifestError for a list of several."""
    if isinstance(value, list | tuple | dict | np.ndarray):
        raise ManifestError(f"identity or side {printable(value)[:60]}: is not one text per ear; correct the row")
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def per_box(labels: Any, boxes: list) -> list:
    """Labels of one row's boxes: one each if a list of that length is given, else the same for all."""
    if isinstance(labels, list | tuple | np.ndarray) and len(labels) == len(boxes):
        return list(labels)
    return [labels] * len(boxes)


def stated_size(width: Any, height: Any) -> tuple[float, float] | None:
    """The size of an image as a list states it; None if it is none, or a placeholder."""
    try:
        size = float(width), float(height)
    except (TypeError, ValueError):
        return None
    return size if min(size) > 1 and np.isfinite(size).all() else None


def path_text(value: Any, where: str, row: int) -> str:
    """A path as text. Raises ManifestError if it is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f"{where} row {row}: path is {printable(repr(value))[:80]}; give a text")
    return str(value)


def four_numbers(entry: Any, where: str, row: int) -> Box:
    """A box as four floats. NaN and any order are allowed: validate-data reports those with the image at hand."""
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
    """One row's boxes: None, four numbers, or a list of such fours (an empty one: an image without a marked ear)."""
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
    """Keypoints [P, 2] of one ear, from P x 2, P x 3 (x, y, visibility) or a flat x, y, visibility, ... as in COCO.

    Points that are not visible (visibility 0) or not finite are left out. Raises ManifestError if fewer than two stay.
    """
    try:
        points = np.asarray(entry, dtype=np.float64)
        if points.ndim == 1:
            points = points.reshape(-1, 3)
        if points.ndim != 2 or points.shape[1] not in (2, 3):
            raise ValueError
    except (TypeError, ValueError):
        raise ManifestError(
            f"{where} row {row}: keypoints are not P x 2 or P x 3 numbers (x, y, visibility); mend them"
        ) from None
    if points.shape[1] == 3:
        points = points[points[:, 2] > 0]
    points = points[np.isfinite(points[:, :2]).all(axis=1), :2]
    if len(points) < 2 or (np.ptp(points, axis=0) <= 0).any():
        raise ManifestError(f"{where} row {row}: its visible keypoints span no box; mend the row or remove it")
    return points


def order_named(value: Any, where: str) -> str | None:
    """What a list's own `box_format` says, None for none. Raises ManifestError for an unknown word."""
    if value is None or label(value).strip() == "":
        return None
    order = label(value).strip().casefold()
    if order not in BOX_FORMATS:
        raise ManifestError(f"{where}: box_format is {printable(order)[:40]!r}; use one of {', '.join(BOX_FORMATS)}")
    return order

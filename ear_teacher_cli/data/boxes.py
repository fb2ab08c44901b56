"""Bounding boxes: their container, the three orders of their numbers, and the conversion to corners in pixels."""

from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright image, unless said otherwise

# Order of a box's four numbers -> its name in messages. COCO uses xywh; YOLO cxcywh, relative.
BOX_FORMATS = {
    "xyxy": "x1,y1,x2,y2",
    "xywh": "x,y,width,height",
    "cxcywh": "centre x,centre y,width,height",
}
# Units are "pixels", or "relative": shares of the image's width (x) and height (y), 0 to 1.

# Numbers up to here are shares of the image: no ear is one pixel wide, and boxes of detectors may slightly exceed 1.
_LARGEST_SHARE, _LARGEST_OUTLIER = 1.1, 2.0
_BLOCK = 1 << 16  # boxes that are converted at a time
_EXCEPTIONS = 0.1  # share of boxes (damaged rows) that may contradict the others


class Boxes(Sequence):
    """A sequence of N boxes or Nones that takes 33 bytes each, instead of 192 as a list of tuples; 1 byte each if all
    are None. It equals a list of the same boxes."""

    def __init__(self, boxes: Iterable[Box | None] = ()):
        # NaN cannot stand for None: files may contain it. There are no numbers before the first box.
        self._numbers, self._given = array("d"), bytearray()
        for box in boxes:
            self.append(box)

    @classmethod
    def of(cls, boxes: Iterable[Box | None]) -> "Boxes":
        """Return the boxes themselves if they are Boxes, else a copy of them."""
        return boxes if isinstance(boxes, cls) else cls(boxes)

    def append(self, box: Box | None) -> None:
        """Add one box, or None."""
        if box is not None and not self._numbers:
            self._numbers = array("d", bytes(32 * len(self)))
        if box is not None or self._numbers:
            self._numbers.extend(box or (0.0,) * 4)
        self._given.append(box is not None)

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return tuple(self._numbers[4 * index : 4 * index + 4]) if self._given[index] else None

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Boxes | list) else NotImplemented

    @property
    def given(self) -> np.ndarray:
        """Which rows have a box, bool [N]."""
        return np.frombuffer(self._given, dtype=bool) if self._given else np.empty(0, dtype=bool)

    @property
    def numbers(self) -> np.ndarray:
        """float64 [N, 4]: the numbers of the boxes, zeros for None."""
        return np.frombuffer(self._numbers).reshape(-1, 4) if self._numbers else np.zeros((len(self), 4))

    def subset(self, indices: np.ndarray) -> "Boxes":
        """Return the boxes at these positions, int [M]."""
        boxes = Boxes()
        boxes._given = bytearray(self.given[indices])
        if self._numbers:
            boxes._numbers.frombytes(self.numbers[indices].view(np.uint8))
        return boxes

    def converted(self, convert: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> "Boxes":
        """Return the boxes with other numbers: of M boxes at positions [M], with numbers float64 [M, 4], those that
        `convert` returns."""
        boxes = Boxes()
        boxes._numbers, boxes._given = self._numbers[:], self._given[:]
        rows, numbers = np.flatnonzero(self.given), boxes.numbers
        for start in range(0, len(rows), _BLOCK):  # what is computed in between takes several times their memory
            block = rows[start : start + _BLOCK]
            numbers[block] = convert(block, numbers[block])
        return boxes


def to_corners(numbers: np.ndarray, order: str) -> np.ndarray:
    """Convert boxes [..., 4] in an order of BOX_FORMATS to x1, y1, x2, y2, in the same units."""
    if order == "xyxy":
        return numbers
    first, size = numbers[..., :2], numbers[..., 2:]
    start = first if order == "xywh" else first - size / 2
    return np.concatenate([start, start + size], axis=-1)


def units_of(numbers: np.ndarray) -> str:
    """Return the units of boxes [N, 4]: "relative" if they are shares of an image, "pixels" if not, "" if they are
    mixed."""
    largest = np.maximum(numbers.max(axis=1), -numbers.min(axis=1))
    largest = largest[np.isfinite(largest) & (largest > 0)]  # zeros stand for no box
    small = (largest <= _LARGEST_SHARE).mean() if len(largest) else 0.0
    if small < _EXCEPTIONS:
        return "pixels"
    if small > 1 - _EXCEPTIONS and largest.max() <= _LARGEST_OUTLIER:
        return "relative"
    return ""


def scaled(numbers: np.ndarray, sizes: np.ndarray, units: str) -> np.ndarray:
    """Convert boxes [N, 4] of images of `sizes` [N, 2] to pixels; any order, as each has x, y in both pairs."""
    return numbers * np.tile(sizes, 2) if units == "relative" else numbers


def from_corners(box: Box, order: str) -> Box:
    """Convert one box x1, y1, x2, y2 to an order of BOX_FORMATS."""
    x1, y1, x2, y2 = box
    if order == "xyxy":
        return box
    width, height = x2 - x1, y2 - y1
    return (x1, y1, width, height) if order == "xywh" else (x1 + width / 2, y1 + height / 2, width, height)


def box_around(points: np.ndarray, margin: float = 0.10) -> Box:
    """Return the bounding rectangle x1, y1, x2, y2 of points [P, 2], extended by `margin` of its size on each side.

    The original package's scripts add 10 % around ear landmarks. The box may leave the image; the caller clamps it.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    grow = margin * (high - low)
    (x1, y1), (x2, y2) = low - grow, high + grow
    return float(x1), float(y1), float(x2), float(y2)

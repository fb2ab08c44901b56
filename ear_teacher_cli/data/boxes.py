"""Bounding boxes: the container, the three orders of their numbers, and how they become corners in pixels."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright image, unless said otherwise

# Order of a box's four numbers -> how messages name it. COCO's order is xywh; YOLO's is cxcywh, relative.
BOX_FORMATS = {
    "xyxy": "x1,y1,x2,y2",
    "xywh": "x,y,width,height",
    "cxcywh": "centre x,centre y,width,height",
}
# Units are pixels, or relative: a share of the image's width (x) and height (y), 0 to 1.

# Numbers up to here are shares of the image: no ear is a pixel wide. Boxes of detectors reach a little beyond 1.
_LARGEST_SHARE, _LARGEST_OUTLIER = 1.1, 2.0
_FEW = 0.1  # share of boxes that may be otherwise: damaged rows


class Boxes(Sequence):
    """N boxes or Nones, 33 bytes each instead of the 192 of a list of tuples."""

    def __init__(self, boxes: Iterable[Box | None] = ()):
        self._numbers, self._given = array("d"), bytearray()  # no number can stand for None: a file may hold NaN
        for box in boxes:
            self.append(box)

    def append(self, box: Box | None) -> None:
        self._numbers.extend(box or (0.0,) * 4)
        self._given.append(box is not None)

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return tuple(self._numbers[4 * index : 4 * index + 4]) if self._given[index] else None

    @property
    def given(self) -> np.ndarray:
        """bool [N]: which rows have a box."""
        return np.frombuffer(self._given, dtype=bool) if self._given else np.empty(0, dtype=bool)

    @property
    def numbers(self) -> np.ndarray:
        """float64 [N, 4]: the boxes as they stand in the list; zeros where there is none."""
        return np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, 4) if self._given else np.empty((0, 4))

    def replaced(self, numbers: np.ndarray) -> "Boxes":
        """The same rows with other numbers, float64 [N, 4]."""
        boxes = Boxes()
        boxes._numbers, boxes._given = array("d", np.ascontiguousarray(numbers, np.float64).tobytes()), self._given
        return boxes


def to_corners(numbers: np.ndarray, order: str) -> np.ndarray:
    """Boxes [..., 4] in one of BOX_FORMATS to x1, y1, x2, y2, in the same units."""
    if order == "xyxy":
        return numbers
    first, size = numbers[..., :2], numbers[..., 2:]
    start = first if order == "xywh" else first - size / 2
    return np.concatenate([start, start + size], axis=-1)


def units_of(numbers: np.ndarray) -> str:
    """ "relative" if the boxes [N, 4] are shares of an image, "pixels" if not, "" where some are and others are not."""
    largest = np.abs(numbers[np.isfinite(numbers).all(axis=1)]).max(axis=1, initial=0.0)
    largest = largest[largest > 0]  # zeros stand for no box
    small = (largest <= _LARGEST_SHARE).mean() if len(largest) else 0.0
    if small < _FEW:
        return "pixels"
    if small > 1 - _FEW and largest.max() <= _LARGEST_OUTLIER:
        return "relative"
    return ""


def scaled(numbers: np.ndarray, sizes: np.ndarray, units: str) -> np.ndarray:
    """Boxes [N, 4] of images of `sizes` [N, 2] in pixels, in the order they are in: both pairs are along x and y."""
    return numbers * np.tile(sizes, 2) if units == "relative" else numbers


def from_corners(box: Box, order: str) -> Box:
    """One box x1, y1, x2, y2 to one of BOX_FORMATS."""
    x1, y1, x2, y2 = box
    if order == "xyxy":
        return box
    width, height = x2 - x1, y2 - y1
    return (x1, y1, width, height) if order == "xywh" else (x1 + width / 2, y1 + height / 2, width, height)


def box_around(points: np.ndarray, margin: float = 0.10) -> Box:
    """The bounding rectangle of points [P, 2], grown by `margin` of its size on each side.

    10 % is what the original package's scripts add around ear landmarks. It may leave the image; cutting clamps it.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    grow = margin * (high - low)
    (x1, y1), (x2, y2) = low - grow, high + grow
    return float(x1), float(y1), float(x2), float(y2)

"""Convert the boxes of a list to corners in pixels.

Their order and units come from the list itself (names of columns, its format), else from the user (--box-format,
--box-units), else from the numbers (box_format.py). If none of them decides, the user is asked by an error.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from .. import library_messages
from ..config import AUTO, Reading
from ..errors import ImageError, ManifestError
from ..files import printable
from .box_drawing import draw_readings
from .box_format import Judgement, could_be_centres, impossible, judge
from .boxes import BOX_FORMATS, Boxes, scaled, to_corners, units_of
from .crop import as_box, image_size
from .formats.rows import Rows
from .texts import Texts

_SAMPLE = 400  # images whose sizes are read to judge the order of a list
_BLOCK = 1 << 16  # images whose sizes are read at a time
_READERS = 8  # threads that read sizes: they wait for the disk or the network
# Units -> orders between which the numbers may decide.
_ORDERS = {"pixels": ("xyxy", "xywh"), "relative": ("xyxy", "xywh", "cxcywh")}


@dataclass
class Corners:
    """Boxes as x1, y1, x2, y2 in pixels, and how they were read."""

    boxes: Boxes
    how: str = ""  # for a message: "x,y,width,height: as x1,y1,x2,y2 280 of 336 boxes are impossible"
    order: str = ""  # one of BOX_FORMATS; "" if no row has a box
    units: str = ""
    warnings: list[str] = field(default_factory=list)


def to_pixels(rows: Rows, sizes: "ImageSizes", reading: Reading, where: str) -> Corners:
    """Convert the boxes of `rows` to corners in pixels of the upright images.

    `where`: name of the list in messages. Raises ManifestError if order or units cannot be determined, or if the images
    do not have the sizes that the list states.
    """
    boxed = np.flatnonzero(rows.boxes.given)  # rows with a box
    if not len(boxed):
        return Corners(rows.boxes)
    numbers = rows.boxes.numbers if len(boxed) == len(rows.boxes) else rows.boxes.numbers[boxed]
    units = _units(rows, numbers, reading, where)
    sample = _Sample.of(boxed, numbers, units, sizes)
    _check_sizes(rows, sample, where)
    result = Corners(rows.boxes, units=units)
    result.order, result.how = order, _ = _order(rows, sample, units, reading, where, result.warnings)
    if units == "relative":
        result.how += f"{', ' if result.how else ''}as shares of the image"
    if units == "relative" or rows.from_points:
        sizes.read(boxed)
        result.boxes = rows.boxes.converted(
            lambda part, numbers: _in_image(numbers, sizes.of(part), order, units, clamp=rows.from_points)
        )
    elif order != "xyxy":
        result.boxes = rows.boxes.converted(lambda _, numbers: to_corners(numbers, order))
    return result


def _in_image(numbers: np.ndarray, sizes: np.ndarray, order: str, units: str, clamp: bool) -> np.ndarray:
    """Convert boxes [N, 4] of images of `sizes` [N, 2] to corners in pixels; `clamp`: to the image. Numbers of images of
    unknown size (NaN) are only reordered."""
    known = ~np.isnan(sizes).any(axis=1, keepdims=True)
    corners = to_corners(np.where(known, scaled(numbers, sizes, units), numbers), order)
    return np.where(known, np.clip(corners, 0, np.tile(sizes, 2)), corners) if clamp else corners


@dataclass(frozen=True)
class _Sample:
    """The M boxes of at most _SAMPLE images, spread over a list of `count` boxes."""

    images: "ImageSizes"
    rows: np.ndarray  # [M]
    numbers: np.ndarray  # [M, 4] in pixels, in the order of the list
    sizes: np.ndarray  # [M, 2] of the images; NaN if one could not be opened
    count: int

    @classmethod
    def of(cls, rows: np.ndarray, numbers: np.ndarray, units: str, sizes: "ImageSizes") -> "_Sample":
        """Take the boxes of a list: `rows` [N] with `numbers` [N, 4]."""
        kept = np.ones(len(rows), dtype=bool)
        images = sizes.images(rows)
        first = np.sort(np.unique(images, return_index=True)[1])  # box of each image
        if len(first) > _SAMPLE:
            chosen = first[np.linspace(0, len(first) - 1, _SAMPLE).astype(int)]
            kept = np.isin(images, images[chosen])
        sampled = rows[kept]
        sizes.read(sampled)
        found = sizes.of(sampled)
        return cls(sizes, sampled, scaled(numbers[kept], found, units), found, len(rows))


def _units(rows: Rows, numbers: np.ndarray, reading: Reading, where: str) -> str:
    """Return "pixels" or "relative": what the user says, what the list says, or what the numbers say."""
    if reading.box_units != AUTO:
        return reading.box_units
    if rows.units:
        return rows.units
    units = units_of(numbers)
    if not units:
        small = int((np.abs(numbers).max(axis=1) <= 1.1).sum())
        raise ManifestError(
            f"{where}: {small} of {len(numbers)} boxes have no number above 1.1, like shares of an image, but the "
            "others have; write all in pixels, or give --box-units pixels or relative"
        )
    return units


def _check_sizes(rows: Rows, sample: _Sample, where: str) -> None:
    """Raise ManifestError if most images do not have the sizes that the list states: its boxes are of other files."""
    if not rows.sizes:
        return
    stated = np.array([rows.sizes.get(rows.paths[row], (np.nan, np.nan)) for row in sample.rows])
    both = ~(np.isnan(stated) | np.isnan(sample.sizes)).any(axis=1)
    if rows.order is not None:  # a column `width` beside `left` and `right` may be that of the box
        corners = to_corners(sample.numbers, rows.order)
        both &= (np.abs(corners[:, 2:] - corners[:, :2] - stated) > 1).any(axis=1)
    other = both & (np.abs(stated - sample.sizes) > 1).any(axis=1)
    if other.sum() <= both.sum() / 2:
        return
    first = int(np.flatnonzero(other)[0])
    listed, found = ("{:g} x {:g}".format(*size) for size in (stated[first], sample.sizes[first]))
    raise ManifestError(
        f"{where}: gives {printable(rows.paths[sample.rows[first]])} as {listed}, but the file is {found}, and "
        f"{int(other.sum()) - 1} others differ, too: the images were resized or turned after they were annotated. Use "
        "the original images, or, if the boxes fit these, remove width and height from the list"
    )


def _order(
    rows: Rows, sample: _Sample, units: str, reading: Reading, where: str, warnings: list[str]
) -> tuple[str, str]:
    """Return (order of the boxes, how it was found); add warnings. Raises ManifestError if it cannot be determined."""
    ambiguous = rows.ambiguous_shares and units == "relative"
    if rows.order is not None and not ambiguous:
        order, how = rows.order, f"{BOX_FORMATS[rows.order]} by {rows.named_by}"
        if reading.box_format not in (AUTO, order):
            warnings.append(
                f"{where}: its boxes are {how}; --box-format {reading.box_format} applies only to lists that do not "
                "name their order, and was not used"
            )
    elif reading.box_format != AUTO:
        order, how = reading.box_format, f"{BOX_FORMATS[reading.box_format]} by --box-format"
    else:
        orders = ("xywh", "cxcywh") if ambiguous else _ORDERS[units]
        return _order_by_numbers(sample, orders, where, warnings)
    judged = judge(sample.numbers, sample.sizes, _ORDERS[units])
    if judged.order not in (None, order) and judged.differ and order in judged.impossible:
        assert judged.order is not None
        if judged.impossible[order] > judged.impossible[judged.order]:
            warnings.append(f"{where}: its boxes are {how}, but {judged.reason}; is that order right?")
    return order, how


def _order_by_numbers(sample: _Sample, orders: tuple[str, ...], where: str, warnings: list[str]) -> tuple[str, str]:
    """As `_order`, from the numbers alone."""
    judged = judge(sample.numbers, sample.sizes, orders)
    if not judged.differ:
        return judged.order or "xyxy", ""
    offered = orders
    if judged.order == "xywh" and "cxcywh" not in orders and could_be_centres(sample.numbers, sample.sizes):
        judged, offered = replace(judged, order=None), (*orders, "cxcywh")
    if judged.order is not None:
        of = "" if len(sample.rows) == sample.count else f", judged from {len(sample.rows)} of {sample.count} boxes"
        how = f"{BOX_FORMATS[judged.order]}, inferred from the numbers: {judged.reason}{of}"
        return judged.order, how + _centres_note(sample, judged.order, orders)
    if np.isnan(sample.sizes).all() and "xyxy" in orders:
        warnings.append(
            f"{where}: none of its images could be opened, so its boxes could not be checked and are read as corners; "
            "check --root-dir"
        )
        return "xyxy", BOX_FORMATS["xyxy"]
    offered = offered if "cxcywh" in offered else (*offered, "cxcywh")
    raise ManifestError(_undecided(sample, judged, offered, where))


def _centres_note(sample: _Sample, order: str, orders: tuple[str, ...]) -> str:
    """Return a note if boxes that are read as x,y,width,height could also be centres."""
    if order != "xywh" or "cxcywh" in orders:
        return ""
    excluded = impossible(sample.numbers, sample.sizes, "cxcywh").mean() > 0.1
    return "" if excluded else "; if they are centres in pixels, give --box-format cxcywh"


def _undecided(sample: _Sample, judged: Judgement, orders: tuple[str, ...], where: str) -> str:
    """Return the message for a list whose order cannot be determined, and draw its readings."""
    paths = (sample.images.path(int(row)) for row in sample.rows)
    boxes = [(path, as_box(box)) for path, box in zip(paths, sample.numbers.tolist(), strict=True)]
    image = draw_readings(where, boxes, orders)
    advice = f"look at {image} and " if image else ""
    return (
        f"{where}: its boxes can be {' or '.join(BOX_FORMATS[o] for o in orders)} ({judged.reason}); {advice}give "
        f"--box-format ({', '.join(orders)})"
    )


class ImageSizes:
    """Sizes of the images of a list in pixels, read from their headers, each once."""

    def __init__(self, paths: Iterable[str], locate: Callable[[int], str]):
        """`paths`: per row. `locate(row)`: the absolute path of a row's image; raises ImageError if it leaves the
        root."""
        self._paths, self._locate = Texts.of(paths), locate
        self._sizes = np.zeros((len(self._paths), 2))  # by first row of the image; zeros: not read yet

    @cached_property
    def _firsts(self) -> np.ndarray:
        return self._paths.firsts()

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return a number of the image of each row, int [M]."""
        return self._firsts[rows]

    def path(self, row: int) -> str | None:
        """Return the absolute path of the image, None if it leaves the root."""
        try:
            return self._locate(row)
        except ImageError:
            return None

    def read(self, rows: np.ndarray) -> None:
        """Read the sizes of the images of these rows."""
        images = np.unique(self._firsts[rows])
        images = images[self._sizes[images, 0] == 0]
        for start in range(0, len(images), _BLOCK):
            block = images[start : start + _BLOCK]
            self._sizes[block] = list(_sizes([self.path(int(row)) for row in block]))

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return width and height of the images of these rows, which were read, float64 [M, 2]; NaN if one could not be
        opened."""
        return self._sizes[self._firsts[rows]]


def _sizes(paths: list[str | None]) -> Iterator[tuple[float, float]]:
    with warnings.catch_warnings():  # about unusual headers: validate-data reports them
        warnings.simplefilter(library_messages.warning_action())
        if len(paths) < 64:
            yield from map(_size, paths)
            return
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(_size, paths)


def _size(path: str | None) -> tuple[float, float]:
    try:
        width, height = image_size(path) if path else (np.nan, np.nan)
    except ImageError:
        return np.nan, np.nan
    return float(width), float(height)

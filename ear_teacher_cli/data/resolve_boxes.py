"""Convert the boxes of a list to corners in pixels.

Their order and units come from the list itself (names of columns, its format), else from the user (--box-format,
--box-units), else from the numbers (box_format.py). If none of them decides, the user is asked by an error.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

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

_SAMPLE = 400  # images whose sizes are read to judge the order of a list
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
    numbers = rows.boxes.numbers[boxed]
    units = _units(rows, numbers, reading, where)
    sample = _Sample.of(boxed, numbers, units, sizes)
    _check_sizes(rows, sample, where)
    result = Corners(rows.boxes, units=units)
    result.order, result.how = _order(rows, sample, units, reading, where, result.warnings)
    if units == "relative":
        result.how += f"{', ' if result.how else ''}as shares of the image"
    if units == "relative" or rows.from_points:
        image_sizes = np.array([sizes.size(int(row)) for row in sizes.read(boxed)])
        known = ~np.isnan(image_sizes).any(axis=1, keepdims=True)
        pixels = scaled(numbers, image_sizes, units)
        corners = to_corners(np.where(known, pixels, numbers), result.order)
        if rows.from_points:
            corners = np.where(~known, corners, np.clip(corners, 0, np.tile(image_sizes, 2)))
    elif result.order == "xyxy":
        return result
    else:
        corners = to_corners(numbers, result.order)
    all_numbers = rows.boxes.numbers.copy()
    all_numbers[boxed] = corners
    result.boxes = rows.boxes.replaced(all_numbers)
    return result


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
        images = np.unique(np.array([sizes.number(int(row)) for row in rows]), return_inverse=True)[1]
        kept = np.ones(len(rows), dtype=bool)
        if (count := int(images.max()) + 1) > _SAMPLE:
            chosen = np.zeros(count, dtype=bool)
            chosen[np.linspace(0, count - 1, _SAMPLE).astype(int)] = True
            kept = chosen[images]
        sampled = sizes.read(rows[kept])
        found = np.array([sizes.size(int(row)) for row in sampled]).reshape(-1, 2)
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

    def __init__(self, paths: Sequence[str], locate: Callable[[int], str]):
        """`paths`: per row. `locate(row)`: the absolute path of a row's image; raises ImageError if it leaves the
        root."""
        self._paths, self._locate = paths, locate
        self._numbers: dict[str, int] = {}
        self._sizes: dict[str, tuple[float, float]] = {}

    def number(self, row: int) -> int:
        """Return a number of the image, the same for all its rows."""
        return self._numbers.setdefault(self._paths[row], len(self._numbers))

    def path(self, row: int) -> str | None:
        """Return the absolute path of the image, None if it leaves the root."""
        try:
            return self._locate(row)
        except ImageError:
            return None

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read the sizes of the images of these rows; return `rows`."""
        new = {self._paths[int(row)]: int(row) for row in rows if self._paths[int(row)] not in self._sizes}
        for path, size in zip(new, _sizes([self.path(row) for row in new.values()]), strict=True):
            self._sizes[path] = size
        return rows

    def size(self, row: int) -> tuple[float, float]:
        """Return (width, height) of an image whose size was read; NaN if it could not be opened."""
        return self._sizes[self._paths[row]]


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

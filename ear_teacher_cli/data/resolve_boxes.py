"""The boxes of a list to corners in pixels: by what the list says, what the user says, or what the numbers say."""

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
from .crop import image_size
from .formats.rows import Rows

_SAMPLE = 400  # images whose sizes are read to judge a list
_READERS = 8  # threads: what they wait for is the disk, or the network
_ORDERS = {"pixels": ("xyxy", "xywh"), "relative": ("xyxy", "xywh", "cxcywh")}


@dataclass
class Corners:
    """Boxes as x1, y1, x2, y2 in pixels, and how they were read."""

    boxes: Boxes
    how: str = ""  # for a message: "x,y,width,height: as x1,y1,x2,y2 280 of 336 boxes are impossible"
    order: str = ""  # one of BOX_FORMATS; "" where no row has a box
    units: str = ""
    warnings: list[str] = field(default_factory=list)


def to_pixels(rows: Rows, files: "Files", reading: Reading, where: str) -> Corners:
    """Convert the boxes of `rows` to corners in pixels of the upright images.

    Raises ManifestError where their order or units are open, or the images are not of the sizes that the list states.
    """
    places = np.flatnonzero(rows.boxes.given)
    if not len(places):
        return Corners(rows.boxes)
    numbers = rows.boxes.numbers[places]
    units = _units(rows, numbers, reading, where)
    sample = _Sample.of(places, numbers, units, files)
    _check_sizes(rows, sample, files, where)
    result = Corners(rows.boxes, units=units)
    result.order, result.how = _order(rows, sample, files, units, reading, where, result.warnings)
    if units == "relative":
        result.how += f"{', ' if result.how else ''}as shares of the image"
    if units == "relative" or rows.from_points:
        sizes = np.array([files.size(int(place)) for place in files.read(places)])
        known = ~np.isnan(sizes).any(axis=1, keepdims=True)
        pixels = scaled(numbers, sizes, units)
        corners = to_corners(np.where(known, pixels, numbers), result.order)
        if rows.from_points:
            corners = np.where(~known, corners, np.clip(corners, 0, np.tile(sizes, 2)))
    elif result.order == "xyxy":
        return result
    else:
        corners = to_corners(numbers, result.order)
    all_numbers = rows.boxes.numbers.copy()
    all_numbers[places] = corners
    result.boxes = rows.boxes.replaced(all_numbers)
    return result


@dataclass(frozen=True)
class _Sample:
    """The boxes of at most _SAMPLE images, spread over a list of `count` boxes."""

    places: np.ndarray  # [M] rows
    numbers: np.ndarray  # [M, 4] in pixels, in the order of the list
    sizes: np.ndarray  # [M, 2] of the images; NaN where one could not be opened
    count: int

    @classmethod
    def of(cls, places: np.ndarray, numbers: np.ndarray, units: str, files: "Files") -> "_Sample":
        images = np.unique(np.array([files.number(int(place)) for place in places]), return_inverse=True)[1]
        kept = np.ones(len(places), dtype=bool)
        if (count := int(images.max()) + 1) > _SAMPLE:
            chosen = np.zeros(count, dtype=bool)
            chosen[np.linspace(0, count - 1, _SAMPLE).astype(int)] = True
            kept = chosen[images]
        files.read(places[kept])
        sizes = np.array([files.size(int(place)) for place in places[kept]]).reshape(-1, 2)
        return cls(places[kept], scaled(numbers[kept], sizes, units), sizes, len(places))


def _units(rows: Rows, numbers: np.ndarray, reading: Reading, where: str) -> str:
    if rows.units or reading.box_units != AUTO:
        return rows.units if reading.box_units == AUTO else reading.box_units
    units = units_of(numbers)
    if not units:
        small = int((np.abs(numbers).max(axis=1) <= 1.1).sum())
        raise ManifestError(
            f"{where}: {small} of {len(numbers)} boxes have no number above 1.1, as shares of an image have, and the others "
            "have; write all in pixels, or give --box-units pixels or relative"
        )
    return units


def _check_sizes(rows: Rows, sample: _Sample, files: "Files", where: str) -> None:
    """Raise ManifestError where most images are not of the sizes that the list states: its boxes are of other files."""
    if not rows.sizes:
        return
    stated = np.array([rows.sizes.get(rows.paths[place], (np.nan, np.nan)) for place in sample.places])
    both = ~(np.isnan(stated) | np.isnan(sample.sizes)).any(axis=1)
    if rows.order is not None:  # `width` beside `left` and `right` may be the box's
        corners = to_corners(sample.numbers, rows.order)
        both &= (np.abs(corners[:, 2:] - corners[:, :2] - stated) > 1).any(axis=1)
    other = both & (np.abs(stated - sample.sizes) > 1).any(axis=1)
    if other.sum() <= both.sum() / 2:
        return
    first = int(np.flatnonzero(other)[0])
    says, found = ("{:g} x {:g}".format(*size) for size in (stated[first], sample.sizes[first]))
    raise ManifestError(
        f"{where}: says that {printable(rows.paths[sample.places[first]])} is {says}, but the file is {found}, as are "
        f"{int(other.sum()) - 1} others: the images were resized or turned after they were annotated. Use the images as "
        "they were; or if the boxes fit these, take width and height out of the list"
    )


def _order(
    rows: Rows, sample: _Sample, files: "Files", units: str, reading: Reading, where: str, warnings: list[str]
) -> tuple[str, str]:
    """(order of the boxes, how it was found); warnings are added. Raises ManifestError where it is open."""
    open_in_shares = rows.open_in_shares and units == "relative"
    if rows.order is not None and not open_in_shares:
        order, how = rows.order, f"{BOX_FORMATS[rows.order]} by {rows.named_by}"
        if reading.box_format not in (AUTO, order):
            warnings.append(
                f"{where}: its boxes are {how}; --box-format {reading.box_format} is only for lists that do not say, and "
                "was not used"
            )
    elif reading.box_format != AUTO:
        order, how = reading.box_format, f"{BOX_FORMATS[reading.box_format]} by --box-format"
    else:
        orders = ("xywh", "cxcywh") if open_in_shares else _ORDERS[units]
        return _by_numbers(sample, files, orders, where, warnings)
    judged = judge(sample.numbers, sample.sizes, _ORDERS[units])
    if judged.order not in (None, order) and judged.differ and order in judged.impossible:
        if judged.impossible[order] > judged.impossible[judged.order]:
            warnings.append(f"{where}: its boxes are {how}, but {judged.reason}; is that order right?")
    return order, how


def _by_numbers(
    sample: _Sample, files: "Files", orders: tuple[str, ...], where: str, warnings: list[str]
) -> tuple[str, str]:
    judged = judge(sample.numbers, sample.sizes, orders)
    if not judged.differ:
        return judged.order or "xyxy", ""
    offered = orders
    if judged.order == "xywh" and "cxcywh" not in orders and could_be_centres(sample.numbers, sample.sizes):
        judged, offered = replace(judged, order=None), (*orders, "cxcywh")
    if judged.order is not None:
        of = "" if len(sample.places) == sample.count else f", judged from {len(sample.places)} of {sample.count} boxes"
        how = f"{BOX_FORMATS[judged.order]} by their numbers ({judged.reason}{of})"
        return judged.order, how + _or_centres(sample, judged.order, orders)
    if np.isnan(sample.sizes).all() and "xyxy" in orders:
        warnings.append(
            f"{where}: not one of its images could be opened, so nothing shows whether its boxes are corners, as they are "
            "taken to be; check --root-dir"
        )
        return "xyxy", BOX_FORMATS["xyxy"]
    offered = offered if "cxcywh" in offered else (*offered, "cxcywh")
    raise ManifestError(_open_question(sample, files, judged, offered, where))


def _or_centres(sample: _Sample, order: str, orders: tuple[str, ...]) -> str:
    """What is left open where x,y,width,height is taken."""
    if order != "xywh" or "cxcywh" in orders:
        return ""
    excluded = impossible(sample.numbers, sample.sizes, "cxcywh").mean() > 0.1
    return "" if excluded else "; not told apart from centres in pixels, which are --box-format cxcywh"


def _open_question(sample: _Sample, files: "Files", judged: Judgement, orders: tuple[str, ...], where: str) -> str:
    """What to say of a list whose order is open, with an image of its readings where one can be drawn."""
    rows = [(files.path(int(p)), tuple(box)) for p, box in zip(sample.places, sample.numbers.tolist(), strict=True)]
    image = draw_readings(where, rows, orders)
    seen = f"look at {image} and " if image else ""
    return (
        f"{where}: its boxes can be {' or '.join(BOX_FORMATS[o] for o in orders)} ({judged.reason}); {seen}give "
        f"--box-format ({', '.join(orders)})"
    )


class Files:
    """Sizes of the images of a list, read from their headers, each once."""

    def __init__(self, paths: Sequence[str], locate: Callable[[int], str]):
        """`locate(place)`: the absolute path of a row's image, or ImageError."""
        self._paths, self._locate = paths, locate
        self._numbers: dict[str, int] = {}
        self._sizes: dict[str, tuple[float, float]] = {}

    def number(self, place: int) -> int:
        """The same number for rows of one image."""
        return self._numbers.setdefault(self._paths[place], len(self._numbers))

    def path(self, place: int) -> str | None:
        try:
            return self._locate(place)
        except ImageError:
            return None

    def read(self, places: np.ndarray) -> np.ndarray:
        """Read the sizes of the images of these rows; returns `places`."""
        new = {self._paths[int(place)]: int(place) for place in places if self._paths[int(place)] not in self._sizes}
        for path, size in zip(new, _sizes([self.path(place) for place in new.values()]), strict=True):
            self._sizes[path] = size
        return places

    def size(self, place: int) -> tuple[float, float]:
        """(width, height) of an image that was read; NaN where it could not be opened."""
        return self._sizes[self._paths[place]]


def _sizes(paths: list[str | None]) -> Iterator[tuple[float, float]]:
    with warnings.catch_warnings():  # of odd headers, which validate-data reports
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

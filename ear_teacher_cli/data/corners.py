"""The boxes of a list to corners in pixels: by what the list says, what the user says, or what the numbers say."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..config import AUTO, Reading
from ..errors import ManifestError, PictureError
from .box_format import Judgement, judge
from .box_pictures import draw_readings
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

    Raises ManifestError where nothing says their order and `judge` cannot decide.
    """
    given = rows.boxes.given
    places = np.flatnonzero(given)
    if not len(places):
        return Corners(rows.boxes)
    numbers = rows.boxes.numbers[places]
    units = rows.units or (units_of(numbers) if reading.box_units == AUTO else reading.box_units)
    sample, sizes = _sampled(places, files)
    judged = judge(scaled(numbers[sample], sizes, units), sizes, _ORDERS[units])
    result = Corners(rows.boxes, units=units)
    if rows.order is not None:
        result.order, result.how = rows.order, f"{BOX_FORMATS[rows.order]} by {rows.named_by}"
        if reading.box_format not in (AUTO, rows.order):
            result.warnings.append(
                f"{where}: its boxes are {result.how}; --box-format {reading.box_format} is only for lists that do not "
                "say, and was not used"
            )
    elif reading.box_format != AUTO:
        result.order, result.how = reading.box_format, f"{BOX_FORMATS[reading.box_format]} by --box-format"
    else:
        result.order, result.how = _judged(judged, len(sample), len(places), sizes, rows, sample, places, files, where)
        if not judged.differ:
            result.how = ""
        elif judged.order is None:
            result.warnings.append(
                f"{where}: not one of its images could be opened, so nothing shows whether its boxes are corners, as "
                "they are taken to be; check --root-dir"
            )
    if result.order != judged.order and (rows.order or reading.box_format != AUTO):
        result.warnings += _doubts(judged, result, where)
    if units == "relative":
        result.how += f"{', ' if result.how else ''}as shares of the image"
    if units == "relative" or rows.from_points:
        sizes = np.array([files.size(int(place)) for place in files.read(places)])
        known = ~np.isnan(sizes).any(axis=1, keepdims=True)
        corners = to_corners(np.where(known, scaled(numbers, sizes, units), numbers), result.order)
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


def _sampled(places: np.ndarray, files: "Files") -> tuple[np.ndarray, np.ndarray]:
    """(indices into `places` of the boxes of at most _SAMPLE images, spread over the list, sizes [M, 2] of those)."""
    images = np.unique(np.array([files.number(int(place)) for place in places]), return_inverse=True)[1]
    count = images.max() + 1
    if count > _SAMPLE:
        chosen = np.zeros(count, dtype=bool)
        chosen[np.linspace(0, count - 1, _SAMPLE).astype(int)] = True
        sample = np.flatnonzero(chosen[images])
    else:
        sample = np.arange(len(places))
    files.read(places[sample])
    return sample, np.array([files.size(int(place)) for place in places[sample]]).reshape(-1, 2)


def _judged(
    judged: Judgement,
    sampled: int,
    count: int,
    sizes: np.ndarray,
    rows: Rows,
    sample: np.ndarray,
    places: np.ndarray,
    files: "Files",
    where: str,
) -> tuple[str, str]:
    """(order, how it was found). Raises ManifestError where it is open."""
    if judged.order is not None:
        of = "" if sampled == count else f", judged from {sampled} of {count} boxes"
        return judged.order, f"{BOX_FORMATS[judged.order]} by their numbers ({judged.reason}{of})"
    if np.isnan(sizes).all():
        return "xyxy", BOX_FORMATS["xyxy"]
    orders = tuple(judged.impossible)
    picture = draw_readings(
        [
            (files.path(int(places[i])), rows.boxes[int(places[i])], tuple(size))
            for i, size in zip(sample, sizes, strict=True)
        ],
        orders,
    )
    seen = f"look at {picture} and " if picture else ""
    raise ManifestError(
        f"{where}: its boxes can be {' or '.join(BOX_FORMATS[o] for o in orders)} ({judged.reason}); {seen}"
        f"give --box-format {', '.join(orders[:-1])} or {orders[-1]}"
    )


def _doubts(judged: Judgement, result: Corners, where: str) -> list[str]:
    """A warning where the boxes are impossible as the list or the user says, and possible otherwise."""
    if judged.order is None or result.order not in judged.impossible or not judged.differ:
        return []
    if judged.impossible[result.order] <= judged.impossible[judged.order]:
        return []
    return [f"{where}: its boxes are {result.how}, but {judged.reason}; is that order right?"]


class Files:
    """Sizes of the images of a list, read from their headers, each once."""

    def __init__(self, paths: Sequence[str], locate: Callable[[int], str]):
        """`locate(place)`: the absolute path of a row's image, or PictureError."""
        self._paths, self._locate = paths, locate
        self._numbers: dict[str, int] = {}
        self._sizes: dict[str, tuple[float, float]] = {}

    def number(self, place: int) -> int:
        """The same number for rows of one image."""
        return self._numbers.setdefault(self._paths[place], len(self._numbers))

    def path(self, place: int) -> str | None:
        try:
            return self._locate(place)
        except PictureError:
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
        warnings.simplefilter("ignore")
        if len(paths) < 64:
            yield from map(_size, paths)
            return
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(_size, paths)


def _size(path: str | None) -> tuple[float, float]:
    try:
        width, height = image_size(path) if path else (np.nan, np.nan)
    except PictureError:
        return np.nan, np.nan
    return float(width), float(height)

"""Names of columns: which name of a list means the path, the box, the identity, and which are unknown.

The tables below list the accepted names, for CSV, JSON Lines, Parquet and the original package's `.npy`. Names are
compared without case, spaces, underscores, hyphens and dots. A test compares the page "formats" with these tables.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ManifestError
from ...files import printable
from ..boxes import Box, box_around
from .rows import boxes_of, four_numbers, order_named, path_text, points_of

PATH = (
    "image_path",
    "image_paths",
    "path",
    "paths",
    "file_name",
    "filename",
    "file_path",
    "file",
    "image",
    "image_name",
)
# Four columns whose names give the order. Names as `compare` returns them, perhaps after a prefix such as "bbox".
CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("minx", "miny", "maxx", "maxy"),
    ("left", "top", "right", "bottom"),
    ("xtl", "ytl", "xbr", "ybr"),
    ("startx", "starty", "endx", "endy"),
    ("xstart", "ystart", "xend", "yend"),
    ("topleftx", "toplefty", "bottomrightx", "bottomrighty"),
    ("upperleftx", "upperlefty", "lowerrightx", "lowerrighty"),
)
SIZES = (
    ("x", "y", "w", "h"),
    ("x", "y", "width", "height"),
    ("left", "top", "w", "h"),
    ("left", "top", "width", "height"),
    ("xmin", "ymin", "width", "height"),
    ("xmin", "ymin", "w", "h"),
    ("x1", "y1", "w", "h"),
    ("x1", "y1", "width", "height"),
    ("xtopleft", "ytopleft", "width", "height"),
)
CENTRES = (
    ("cx", "cy", "w", "h"),
    ("cx", "cy", "width", "height"),
    ("xc", "yc", "w", "h"),
    ("xcenter", "ycenter", "width", "height"),
    ("xcentre", "ycentre", "width", "height"),
    ("centerx", "centery", "width", "height"),
    ("centrex", "centrey", "width", "height"),
)
GROUPS = {"xyxy": CORNERS, "xywh": SIZES, "cxcywh": CENTRES}
# One column with all four numbers, perhaps with the order in its name (bbox_xywh).
BOX = ("bbox", "bboxes", "box", "boxes")
BOX_ORDER = ("box_format", "bbox_format", "bbox_mode")
KEYPOINTS = ("keypoints", "landmarks")
IDENTITY = ("identity", "identities")
SIDE = ("side", "sides", "ear_side")
# May be identities, or categories ("ear"): used only if --identity-column names them.
MAYBE_IDENTITY = ("label", "labels", "person", "persons", "person_id", "subject", "subject_id", "class", "name", "pid")
# The size of the image, which is compared with that of the file.
WIDTH, HEIGHT = ("width", "image_width", "img_width", "img_w"), ("height", "image_height", "img_height", "img_h")
# Known, but not used: ids, what detectors add, the index that pandas writes.
IGNORED = frozenset(
    "width height imagewidth imageheight imgwidth imgheight imgw imgh row index id imageid annotationid status "
    "confidence score iscrowd area category categoryid split unnamed:0 unnamed0".split()
    + [""]
)
_BOX_LIKE = re.compile(
    r"(x|y|cx|cy|w|h|xc|yc|left|top|right|bottom)\d?|[xy](min|max|center|centre|tl|br|start|end|topleft|bottomright)|"
    r"(min|max|center|centre|tl|br|start|end)[xy]|(top|bottom|upper|lower)(left|right)[xy]?"
)
# Whole words of a name, so that neither `direction` nor `boxer` matches.
_BOX_WORDS = frozenset(
    "bbox bboxes box boxes roi rois rect rectangle bounding region regions coordinates coords".split()
)


def compare(name: object) -> str:
    """Return the form in which names are compared: `Image Path`, `image_path` and ` imagepath` are equal."""
    return re.sub(r"[\s_\-.]", "", str(name).casefold())


def _without_prefix(name: str) -> str:
    return re.sub(r"^(b?box|roi|rect|ear)(?=.)", "", name)


def _looks_like_a_box(name: object) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", str(name))
    return bool(_BOX_LIKE.fullmatch(_without_prefix(compare(name)))) or not _BOX_WORDS.isdisjoint(map(str.lower, words))


@dataclass(frozen=True)
class Columns:
    """The names of a list by their meaning; None if it has no such name."""

    path: str
    order: str | None  # of the boxes, if the names give it; always with `four`
    four: tuple[str, ...] = ()  # the columns of a box's numbers, in that order
    box: str | None = None  # the column with all four numbers
    box_order: str | None = None  # the column in which each row names its order
    keypoints: str | None = None
    identity: str | None = None
    side: str | None = None
    size: tuple[str, str] | None = None  # width and height of the image
    unused: tuple[str, ...] = ()  # unknown names
    warnings: list[str] = field(default_factory=list)

    @property
    def named_by(self) -> str:
        """The columns whose names give the order of the boxes, for messages."""
        names = self.four
        if not names:
            name = self.box if self.order else self.keypoints
            names = (name,) if name else ()
        return f"column{'s' if len(names) > 1 else ''} {printable(', '.join(names))}" if names else ""


def find_columns(names: Iterable[str], where: str, identity_column: str | None = None) -> Columns:
    """Find the meaning of the names of a list.

    Raises ManifestError if no name means a path, if a name looks like part of a box but there is no such box, if there
    are two boxes, or if `identity_column` is not among the names.
    """
    names = [name for name in names if name is not None]
    known: dict[str, str] = {}
    for name in names:
        if compare(name) in known and compare(name):
            raise ManifestError(f"{where}: has the column {printable(name)!r} twice; rename or remove one")
        known[compare(name)] = name
    unused = dict(known)

    def take(candidates: Iterable[str]) -> str | None:
        found = next((compare(c) for c in candidates if compare(c) in unused), None)
        return unused.pop(found) if found is not None else None

    path = take(PATH)
    if path is None:
        raise ManifestError(
            f"{where}: has no column of image paths (found: {names_of(names)}); name it image_path or filename"
        )
    identity = _identity_column(identity_column, known, where) if identity_column else take(IDENTITY)
    unused.pop(compare(identity), None)
    side, box_order = take(SIDE), take(BOX_ORDER)
    order, four = _four_columns(unused, where)
    box = None
    if not four:
        box, order = _box_column(unused)
    keypoints = None if four or box else take(KEYPOINTS)
    for used in (*four, box):
        unused.pop(compare(used), None)
    warnings = _warnings(unused, where, bool(four or box or keypoints), identity is not None)
    width, height = (take(WIDTH), take(HEIGHT)) if four or box else (None, None)
    return Columns(
        path,
        order,
        four,
        box,
        box_order,
        keypoints,
        identity,
        side,
        size=(width, height) if width is not None and height is not None else None,
        unused=tuple(name for key, name in unused.items() if key not in IGNORED),
        warnings=warnings,
    )


def _identity_column(wanted: str, known: Mapping[str, str], where: str) -> str:
    if compare(wanted) not in known:
        raise ManifestError(
            f"{where}: has no column {printable(wanted)!r} (found: {names_of(known.values())}); "
            "give --identity-column one of these"
        )
    return known[compare(wanted)]


def _four_columns(unused: Mapping[str, str], where: str) -> tuple[str | None, tuple[str, ...]]:
    """Return (order, the four names) of the columns that form a box; (None, ()) if none do.

    Raises ManifestError if there are two boxes.
    """
    plain = {_without_prefix(key): name for key, name in unused.items()} | dict(unused)
    found = [
        (order, tuple(plain[key] for key in group))
        for order, groups in GROUPS.items()
        for group in groups
        if all(key in plain for key in group)
    ]
    # `width, height` beside `xmin, ymin, xmax, ymax` are those of the image, as in Roboflow's and TensorFlow's CSV
    corners = [entry for entry in found if entry[0] == "xyxy"]
    found = corners or found
    if len({frozenset(four) for _, four in found}) > 1:
        several = " and ".join(printable(", ".join(four)) for _, four in found[:2])
        raise ManifestError(f"{where}: has two boxes, {several}; remove or rename one")
    return found[0] if found else (None, ())


def _box_column(unused: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return (name of the column with all four numbers, order if the name gives it); None each if there is none."""
    for key, name in unused.items():
        for candidate in BOX:
            if key == candidate:
                return name, None
            if key.removeprefix(candidate) in GROUPS and key.startswith(candidate):
                return name, key.removeprefix(candidate)
    return None, None


def _warnings(unused: Mapping[str, str], where: str, has_box: bool, has_identity: bool) -> list[str]:
    """Return warnings about names that are not used. Raises ManifestError if one looks like part of a box."""
    keys = [key for key in unused if key not in IGNORED or (key in ("width", "height") and not has_box)]
    wrong = [unused[key] for key in keys if _looks_like_a_box(unused[key])]
    if wrong and not (has_box and all(compare(name) in ("w", "h", "width", "height") for name in wrong)):
        raise ManifestError(
            f"{where}: cannot read {names_of(wrong)}, named like {'another box' if has_box else 'part of a box'}; a "
            "box needs four columns (x1, y1, x2, y2; x, y, width, height; ...; see the page formats): rename or "
            "remove them"
        )
    warnings = []
    possible = [unused[key] for key in keys if key in map(compare, MAYBE_IDENTITY)]
    if possible and not has_identity:
        warnings.append(
            f"{where}: column {names_of(possible)} is not used; if it names the people on the images, add "
            f"--identity-column {printable(possible[0])}"
        )
    other = [unused[key] for key in keys if unused[key] not in (*possible, *wrong) and key not in ("width", "height")]
    if other:
        warnings.append(f"{where}: column{'s' if len(other) > 1 else ''} {names_of(other)}: not used")
    return warnings


def read_row(
    columns: Columns, row: Mapping[str, Any], where: str, number: int, order: str | None
) -> tuple[str, list[Box | None], str | None]:
    """Read one row: return (path, boxes with the numbers of the list, their order if it is named).

    `order`: of the rows before, which is returned for a row of a list without boxes. Raises ManifestError.
    """
    path = path_text(row.get(columns.path), where, number)
    if columns.four:
        cells = [row.get(name) for name in columns.four]
        empty = [_is_empty(value) for value in cells]
        if any(empty) and not all(empty):
            raise ManifestError(f"{where} row {number}: its box has empty cells; fill in all four, or none")
        if all(empty):
            return path, [None], columns.order
        named = _order_of_row(columns, row, where, number)
        if named not in (None, columns.order):
            raise ManifestError(
                f"{where} row {number}: {columns.box_order} is {named}, but the columns are {', '.join(columns.four)}; "
                "correct one"
            )
        return path, [four_numbers(cells, where, number)], columns.order
    if columns.keypoints:
        points = _value(row.get(columns.keypoints))
        return path, [None] if _is_empty(points) else [box_around(points_of(points, where, number))], "xyxy"
    if columns.box:
        value = _value(row.get(columns.box))
        boxes: list[Box | None] = [None] if _is_empty(value) else boxes_of(value, where, number)
        named = _order_of_row(columns, row, where, number)
        if named and columns.order and named != columns.order:
            raise ManifestError(f"{where} row {number}: {columns.box} and {columns.box_order} disagree; correct one")
        return path, boxes, columns.order or named
    _refuse_hidden_box(columns, row, where, number)
    return path, [None], order


def _order_of_row(columns: Columns, row: Mapping[str, Any], where: str, number: int) -> str | None:
    """Return the order that a row names in a column of its own. Raises ManifestError if it is unknown."""
    return order_named(row.get(columns.box_order), f"{where} row {number}") if columns.box_order else None


def _refuse_hidden_box(columns: Columns, row: Mapping[str, Any], where: str, number: int) -> None:
    """Raise ManifestError if a row without a box has values under unknown names that may be one."""
    numeric = []
    for name in columns.unused:
        value = _value(row.get(name))
        if _is_box(value):
            raise ManifestError(
                f"{where} row {number}: {printable(name)} holds what may be a box ({printable(value)[:60]}); name it "
                "bbox if it is one, or remove it"
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            numeric.append(name)
    along = [name for name in numeric if re.fullmatch(r"[a-z]{0,3}[xy]\d?", compare(name))]
    series = Counter(compare(name).rstrip("0123456789") for name in numeric)  # b1, b2, b3, b4
    if len(numeric) >= 4 and (len(along) >= 2 or 4 in series.values()):
        raise ManifestError(
            f"{where} row {number}: {names_of(numeric)} may be a box; use names of columns that the page formats "
            "lists, or remove them"
        )


def _is_box(value: Any) -> bool:
    """Whether a value is four numbers, an object with x and y, or contains such."""
    if isinstance(value, dict):
        return {"x", "y"} <= {str(key).casefold() for key in value} or any(map(_is_box, value.values()))
    if not isinstance(value, list | tuple) or not len(value):
        return False
    if len(value) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return True
    return any(map(_is_box, value))


def _value(value: Any) -> Any:
    """Return the numbers of a cell of text, `[1, 2, 3, 4]` or `1 2 3 4`, as a list; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        parts = re.split(r"[\s,;]+", value.strip("[]() \t"))
        try:
            return [float(part) for part in parts]
        except ValueError:
            return value


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None


def names_of(names: Iterable[object]) -> str:
    """Return names for messages, at most 120 characters."""
    return printable(", ".join(sorted(map(str, names)))[:120]) or "nothing"

"""`.npy`: the original package's lists, a pickled dict of one entry per image in each value.

`image_paths` (list or object array), `bboxes` (N x 4, N x 1 x 4, or a list of boxes per image) or `keypoints`
(N x P x 3), and what is ours: `identities`, `sides`, `box_format`. Read by a reader that runs no pickle (data/npy.py).
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ManifestError
from ...files import printable
from ..boxes import Box, box_around
from ..npy import read_npy
from .columns import Columns, find_columns, names_of
from .rows import Rows, boxes_of, order_named, path_text, per_box, points_of


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Raise ManifestError if it is no such dict, or its values disagree."""
    content = _content(path, where)
    columns = find_columns(content, where, identity_column)
    if columns.four:
        raise ManifestError(
            f"{where}: has its boxes in {names_of(columns.four)}; save one value 'bboxes' of N x 4 numbers"
        )
    paths = _as_list(content[columns.path], columns.path, where)
    lists = {columns.path: paths}
    for name in (columns.box, columns.keypoints, columns.identity, columns.side):
        if name is not None and content[name] is not None:
            lists[name] = _as_list(content[name], name, where)
    _require_same_length(where, lists)
    rows = Rows(warnings=columns.warnings, named_by=columns.named_by)
    said = order_named(content.get(columns.box_order), where) if columns.box_order else None
    if said and columns.order not in (None, said):
        raise ManifestError(f"{where}: {columns.box} and {columns.box_order} disagree ({said}); correct one")
    rows.order = columns.order or said
    if said and not columns.order:
        rows.named_by = f"its {columns.box_order}"
    marks = lists.get(columns.box) or lists.get(columns.keypoints) or [None] * len(paths)
    from_points = columns.box not in lists and columns.keypoints in lists
    if from_points:
        rows.order, rows.from_points = "xyxy", True
    nobody = [""] * len(paths)
    identities, sides = lists.get(columns.identity, nobody), lists.get(columns.side, nobody)
    for row, (name, entry) in enumerate(zip(paths, marks, strict=True)):
        name = path_text(name, where, row)
        several = _boxes_around(entry, where, row) if from_points else boxes_of(entry, where, row)
        people, sided = per_box(identities[row], several), per_box(sides[row], several)
        for box, identity, side in zip(several, people, sided, strict=True):
            rows.add(row, name, box, identity, side)
    return rows


def write(path: Path, rows: Iterable[tuple[str, Box | None, str, str]]) -> None:
    """Write (path, corners, identity, side) as a dict that names its box format.

    The original package's trainer takes the four numbers as x1, y1, x2, y2, as its README says.
    """
    paths, boxes, identities, sides = zip(*rows, strict=True)
    content: dict[str, Any] = {"image_paths": np.array(paths, dtype=object)}
    if any(box is not None for box in boxes):
        if all(box is not None for box in boxes):
            content["bboxes"] = np.array(boxes, dtype=np.float64)
        else:  # some rows without a box: one entry per image
            content["bboxes"] = [box if box is None else list(box) for box in boxes]
        content["box_format"] = "xyxy"
    for name, column in (("identities", identities), ("sides", sides)):
        if any(column):
            content[name] = np.array(column, dtype=object)
    _save(path, content)


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the list with only the boxes `kept`, (row, which of its boxes): the same keys, order, layout and types."""
    where = printable(source)
    content = _content(source, where)
    columns = find_columns(content, where, identity_column)
    count = len(_as_list(content[columns.path], columns.path, where))
    by_row: dict[int, list[int]] = defaultdict(list)
    for row, place in kept:
        by_row[row].append(place)
    rows = sorted(by_row)
    _save(out, {name: _kept(name, value, count, rows, by_row, columns) for name, value in content.items()})


def _kept(name: Any, value: Any, count: int, rows: list[int], by_row: dict[int, list[int]], columns: Columns) -> Any:
    if not isinstance(value, np.ndarray | list | tuple) or len(value) != count:
        return value
    chosen = [value[row] for row in rows]
    # of a row with several ears each has its entry: boxes [E, 4], keypoints [E, P, 3], labels [E]
    depth = {columns.box: 2, columns.keypoints: 3, columns.identity: 1, columns.side: 1}.get(name)
    if depth and name is not None:
        chosen = [_without(entry, by_row[row], depth) for entry, row in zip(chosen, rows, strict=True)]
    if isinstance(value, list | tuple):
        return chosen
    if value.dtype != object:
        return np.asarray(chosen, dtype=value.dtype).reshape(len(rows), *value.shape[1:])
    kept = np.empty((len(rows), *value.shape[1:]), dtype=object)
    for place, entry in enumerate(chosen):
        kept[place] = entry
    return kept


def _without(entry: Any, places: list[int], depth: int) -> Any:
    """A row's entries that stay; an entry of fewer than `depth` dimensions is of the whole row, and stays as it is."""
    if not isinstance(entry, np.ndarray | list | tuple) or _depth(entry) < depth or len(entry) <= len(places):
        return entry
    chosen = [entry[place] for place in places]
    return np.asarray(chosen, dtype=entry.dtype) if isinstance(entry, np.ndarray) else chosen


def _depth(entry: Any) -> int:
    """Dimensions of nested lists and arrays."""
    return 1 + _depth(entry[0]) if isinstance(entry, np.ndarray | list | tuple) and len(entry) else 0


def _content(path: Path, where: str) -> dict:
    content = read_npy(path)
    if not isinstance(content, dict):
        raise ManifestError(f"{where}: holds {type(content).__name__}, not a dict; save {{'image_paths', 'bboxes'}}")
    return content


def _save(path: Path, content: dict) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array(content, dtype=object))


def _boxes_around(entry: Any, where: str, row: int) -> list[Box | None]:
    """Boxes around one ear's keypoints, P x 2 or P x 3, or those of several ears, E x P x 3."""
    if entry is None:
        return [None]
    try:
        ears = list(entry) if np.ndim(entry) == 3 else [entry]
    except ValueError:  # ragged: ears with different numbers of points
        ears = list(entry)
    return [box_around(points_of(ear, where, row)) for ear in ears]


def _as_list(value: Any, name: str, where: str) -> list:
    if isinstance(value, np.ndarray) and value.ndim >= 1:
        return list(value) if value.dtype == object else value.tolist()
    if isinstance(value, list | tuple):
        return list(value)
    raise ManifestError(f"{where}: '{name}' is {type(value).__name__}; save an array or a list")


def _require_same_length(where: str, columns: dict[str, list]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ManifestError(f"{where}: lengths disagree ({found}); every image needs one entry in each")

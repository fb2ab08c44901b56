"""`.npy`: lists of the original package, a pickled dict whose values have one entry per image.

`image_paths` (list or object array), `bboxes` (N x 4, N x 1 x 4, or a list of boxes per image) or `keypoints`
(N x P x 3); this package adds `identities`, `sides` and `box_format`. data/npy.py reads it without running the pickle.
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
    """Read the ears. Raises ManifestError if the file is not such a dict, or its values do not fit together."""
    content = _content(path, where)
    columns = find_columns(content, where, identity_column)
    if columns.four:
        raise ManifestError(
            f"{where}: has its boxes in {names_of(columns.four)}; save one value 'bboxes' of N x 4 numbers instead"
        )
    paths = _as_list(content[columns.path], columns.path, where)
    lists = {columns.path: paths}
    for name in (columns.box, columns.keypoints, columns.identity, columns.side):
        if name is not None and content[name] is not None:
            lists[name] = _as_list(content[name], name, where)
    _require_same_length(where, lists)
    rows = Rows(warnings=columns.warnings, named_by=columns.named_by)
    _set_order(rows, content, columns, where)
    boxes = lists.get(columns.box or "")
    points = None if boxes else lists.get(columns.keypoints or "")
    if columns.box not in lists and columns.keypoints in lists:
        rows.order, rows.from_points = "xyxy", True
    empty: list = [None] * len(paths)
    identities, sides = lists.get(columns.identity or "", empty), lists.get(columns.side or "", empty)
    for row, (value, entry) in enumerate(zip(paths, boxes or points or empty, strict=True)):
        name = path_text(value, where, row)
        ears = _boxes_around(entry, where, row) if rows.from_points else boxes_of(entry, where, row)
        own = per_box(identities[row], ears), per_box(sides[row], ears)
        for box, identity, side in zip(ears, *own, strict=True):
            rows.add(row, name, box, identity, side)
    return rows


def _set_order(rows: Rows, content: dict, columns: Columns, where: str) -> None:
    """Set the order that names or `box_format` give. Raises ManifestError if they disagree."""
    named = order_named(content.get(columns.box_order), where) if columns.box_order else None
    if named and columns.order not in (None, named):
        raise ManifestError(f"{where}: {columns.box} and {columns.box_order} disagree ({named}); correct one")
    rows.order = columns.order or named
    if named and not columns.order:
        rows.named_by = f"its {columns.box_order}"


def write(path: Path, rows: Iterable[tuple[str, Box | None, str, str]]) -> None:
    """Write rows (path, box x1, y1, x2, y2 or None, identity, side) as a dict with its box format.

    The original package's trainer reads the four numbers as x1, y1, x2, y2, as its README documents.
    """
    paths, boxes, identities, sides = zip(*rows, strict=True)
    content: dict[str, Any] = {"image_paths": np.array(paths, dtype=object)}
    if any(box is not None for box in boxes):
        if all(box is not None for box in boxes):
            content["bboxes"] = np.array(boxes, dtype=np.float64)
        else:  # some rows have no box: a list with one entry per image
            content["bboxes"] = [box if box is None else list(box) for box in boxes]
        content["box_format"] = "xyxy"
    for name, column in (("identities", identities), ("sides", sides)):
        if any(column):
            content[name] = np.array(column, dtype=object)
    _save(path, content)


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the list with only the boxes `kept`, (row, position of the box within it): same keys, layout and types."""
    where = printable(source)
    content = _content(source, where)
    columns = find_columns(content, where, identity_column)
    count = len(_as_list(content[columns.path], columns.path, where))
    by_row: dict[int, list[int]] = defaultdict(list)
    for row, position in kept:
        by_row[row].append(position)
    # An entry of a row with several ears has these dimensions: boxes [E, 4], keypoints [E, P, 3], labels [E].
    depths = {columns.box: 2, columns.keypoints: 3, columns.identity: 1, columns.side: 1}
    result = {}
    for name, value in content.items():
        per_row = isinstance(value, np.ndarray | list | tuple) and len(value) == count
        result[name] = _select(value, by_row, depths.get(name) if name is not None else None) if per_row else value
    _save(out, result)


def _select(value: Any, by_row: dict[int, list[int]], depth: int | None) -> Any:
    """Return the entries of the rows `by_row`, and of these the positions that it names, if entries have `depth`."""
    rows = sorted(by_row)
    chosen = [value[row] for row in rows]
    if depth:
        chosen = [_select_positions(entry, by_row[row], depth) for entry, row in zip(chosen, rows, strict=True)]
    if isinstance(value, list | tuple):
        return chosen
    if value.dtype != object:
        return np.asarray(chosen, dtype=value.dtype).reshape(len(rows), *value.shape[1:])
    kept = np.empty((len(rows), *value.shape[1:]), dtype=object)
    for place, entry in enumerate(chosen):
        kept[place] = entry
    return kept


def _select_positions(entry: Any, positions: list[int], depth: int) -> Any:
    """Return the ears at `positions` of a row's entry; one of fewer than `depth` dimensions belongs to the whole row
    and is returned unchanged."""
    if not isinstance(entry, np.ndarray | list | tuple) or _depth(entry) < depth or len(entry) <= len(positions):
        return entry
    chosen = [entry[position] for position in positions]
    return np.asarray(chosen, dtype=entry.dtype) if isinstance(entry, np.ndarray) else chosen


def _depth(entry: Any) -> int:
    """Return the number of dimensions of nested lists and arrays."""
    return 1 + _depth(entry[0]) if isinstance(entry, np.ndarray | list | tuple) and len(entry) else 0


def _content(path: Path, where: str) -> dict:
    content = read_npy(path)
    if not isinstance(content, dict):
        raise ManifestError(
            f"{where}: holds {type(content).__name__}, not a dict; save a dict of 'image_paths' and 'bboxes'"
        )
    return content


def _save(path: Path, content: dict) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array(content, dtype=object))


def _boxes_around(entry: Any, where: str, row: int) -> list[Box | None]:
    """Return boxes around the keypoints of one ear, P x 2 or P x 3, or of several, E x P x 3."""
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

"""`.jsonl`: one object per line, with the names of CSV columns, or a `bbox` of four numbers or a list of such.

`read_objects` is the reader of all formats whose rows have names: CSV, JSON Lines, lists in `.json`, Parquet.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ManifestError
from ...files import short_message
from ..boxes import Box
from .columns import Columns, compare, find_columns, read_row
from .rows import Rows, per_box, stated_size


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Read the rows. Raises ManifestError if a line is not an object, or its names are not understood."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return read_objects(_objects(file, where), where, identity_column)
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{where}: is not readable as JSON Lines ({short_message(error)}); write one object per line, in UTF-8"
        ) from error


def read_objects(
    objects: Iterable[tuple[int, Mapping[str, Any]]],
    where: str,
    identity_column: str | None,
    label_of: Callable[[Any], Any] = lambda value: value,
) -> Rows:
    """Read (number, object) of each row; rows may have different names, but all boxes must be in the same order.

    `label_of(cell)`: the identity or side in a cell. Raises ManifestError.
    """
    rows, has_boxes = Rows(), False
    known: dict[tuple[str, ...], Columns] = {}
    for number, line in objects:
        names = tuple(line)
        if names not in known:
            known[names] = find_columns(names, f"{where} line {number + 1}" if known else where, identity_column)
            rows.warnings += known[names].warnings
        columns = known[names]
        name, boxes, order = read_row(columns, line, where, number, rows.order)
        if any(box is not None for box in boxes):
            if not has_boxes:
                has_boxes, rows.order, rows.from_points = True, order, bool(columns.keypoints)
                rows.named_by = columns.named_by or (f"its {columns.box_order}" if order else "")
                rows.ambiguous_shares = columns.order == "xywh" and [compare(n) for n in columns.four[:2]] == ["x", "y"]
            elif order != rows.order or bool(columns.keypoints) != rows.from_points:
                raise ManifestError(
                    f"{where} line {number + 1}: its box is in another order than those before; use one order for all"
                )
        if columns.size and (size := stated_size(*(line.get(n) for n in columns.size))):
            rows.sizes[name.replace("\\", "/")] = size
        identities, sides = (
            per_box(label_of(line.get(n) if n is not None else None), boxes) for n in (columns.identity, columns.side)
        )
        for box, identity, side in zip(boxes, identities, sides, strict=True):
            rows.add(number, name, box, identity, side)
    return rows


def write(path: Path, rows: Iterable[tuple[str, Box | None, str, str]]) -> None:
    """Write one object per row of (path, box x1, y1, x2, y2 or None, identity, side), with the order of the box."""
    with open(path, "w", encoding="utf-8") as file:
        for name, box, identity, side in rows:
            line: dict[str, Any] = {"image_path": name}
            if box is not None:
                line |= {"bbox": list(box), "box_format": "xyxy"}
            line |= {key: value for key, value in (("identity", identity), ("side", side)) if value}
            file.write(json.dumps(line) + "\n")


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the lines of the boxes `kept`, (row, position of the box within it)."""
    by_row: dict[int, list[int]] = {}
    for row, position in kept:
        by_row.setdefault(row, []).append(position)
    with open(source, encoding="utf-8-sig") as file, open(out, "w", encoding="utf-8") as written:
        for number, text in enumerate(file):
            if number not in by_row:
                continue
            line = json.loads(text)
            columns = find_columns(line, str(source), identity_column)
            boxes = line.get(columns.box)
            if isinstance(boxes, list) and boxes and isinstance(boxes[0], list) and len(by_row[number]) < len(boxes):
                line[columns.box] = [boxes[position] for position in by_row[number]]
                for name in (columns.identity, columns.side):
                    if isinstance(line.get(name), list) and len(line[name]) == len(boxes):
                        line[name] = [line[name][position] for position in by_row[number]]
                text = json.dumps(line) + "\n"
            written.write(text if text.endswith("\n") else text + "\n")


def _objects(lines: Iterable[str], where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number, object) of each line that is not empty. Raises ManifestError if it is not an object."""
    for number, text in enumerate(lines):
        if not text.strip():
            continue
        line = json.loads(text)
        if not isinstance(line, dict):
            raise ManifestError(f'{where} line {number + 1}: is not an object; write {{"image_path": ...}}')
        yield number, line

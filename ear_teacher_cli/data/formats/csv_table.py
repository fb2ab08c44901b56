"""`.csv`: a header and a row per ear; separated by commas, semicolons or tabs, UTF-8."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import ManifestError
from ...files import brief, cell, printable, uncell
from ..boxes import Box
from .columns import find_columns, read_row
from .rows import Rows


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Raise ManifestError if it is not readable, or its columns are not understood."""
    with _reading(path, where) as (names, lines):
        columns = find_columns(names, where, identity_column)
        rows = Rows(order=columns.order, named_by=columns.named_by, warnings=columns.warnings)
        if columns.keypoints:
            rows.order, rows.from_points = "xyxy", True
        for number, line in enumerate(lines):
            name, boxes, order = read_row(columns, line, where, number, rows.order)
            if columns.box_order and number and any(boxes) and order != rows.order:
                raise ManifestError(
                    f"{where} row {number}: its box is in another order than those before; write all alike"
                )
            rows.order = order
            for box in boxes:
                rows.add(number, name, box, *(uncell(line.get(n) or "") for n in (columns.identity, columns.side)))
    return rows


def write(path: Path, rows: Iterable[tuple[str, Box | None, str, str]]) -> None:
    """Write (path, corners, identity, side). Raises ManifestError for control characters, which CSV cannot hold."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "x1", "y1", "x2", "y2", "identity", "side"])
        for number, (name, box, identity, side) in enumerate(rows):
            text = f"{name}{identity}{side}"
            if printable(text) != text:
                raise ManifestError(
                    f"row {number} ({printable(name)}): its control characters cannot go into CSV; write .npy or .jsonl"
                )
            same = name if cell(name) == name else f"./{name}"  # the same path, and no formula
            writer.writerow([same, *(box or ("",) * 4), cell(identity), cell(side)])


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]]) -> None:
    """Copy the header and the rows `kept`, (row, 0), with all their columns."""
    numbers = {row for row, _ in kept}
    with _reading(source, printable(source)) as (names, lines), open(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=_delimiter(source), lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for number, line in enumerate(lines) if number in numbers)


@contextmanager
def _reading(path: Path, where: str) -> Iterator[tuple[list[str], Iterator[dict[str, str]]]]:
    """(names of the columns, lines as dicts). Raises ManifestError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = _most_of(header)
            spaced = f"{delimiter} " in header  # spaces after commas belong to nobody
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=spaced)
            yield list(reader.fieldnames or []), _checked(reader, where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{where}: not readable as CSV ({brief(error)}); save it as UTF-8") from error


def _checked(reader: csv.DictReader, where: str) -> Iterator[dict[str, str]]:
    for line in reader:
        if None in line or None in line.values():
            raise ManifestError(f"{where} line {reader.line_num}: not as many cells as the header; mend the line")
        yield line


def _delimiter(path: Path) -> str:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return _most_of(file.readline())


def _most_of(header: str) -> str:
    """The separator of a header: the one of comma, semicolon and tab that it has most of."""
    return max(",;\t", key=header.count)

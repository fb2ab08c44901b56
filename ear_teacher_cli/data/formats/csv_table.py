"""`.csv`: a header and one row per ear, separated by commas, semicolons or tabs, in UTF-8."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...errors import ManifestError
from ...files import escape_csv, printable, short_message, unescape_csv
from ..boxes import Box
from .columns import find_columns
from .json_lines import read_objects
from .rows import Rows


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Read the rows. Raises ManifestError if the file is not readable, or its columns are not understood."""
    with _reading(path, where) as (names, reader, _):
        find_columns(names, where, identity_column)  # checks the columns of a list without rows
        rows = ((number, dict(zip(names, cells, strict=True))) for number, cells in _rows(names, reader, where))
        return read_objects(rows, where, identity_column, lambda text: unescape_csv(text or ""))


def write(path: Path, rows: Iterable[tuple[str, Box | None, str, str]]) -> None:
    """Write (path, corners, identity, side). Raises ManifestError for control characters, which CSV cannot hold."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "x1", "y1", "x2", "y2", "identity", "side"])
        for number, (name, box, identity, side) in enumerate(rows):
            text = f"{name}{identity}{side}"
            if printable(text) != text:
                raise ManifestError(
                    f"row {number} ({printable(name)}): has control characters, which CSV cannot hold; write .npy or "
                    ".jsonl"
                )
            no_formula = name if escape_csv(name) == name else f"./{name}"  # the same path for the reader
            writer.writerow([no_formula, *(box or ("",) * 4), escape_csv(identity), escape_csv(side)])


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the header and the rows `kept`, (row, 0), with their quotes, line ends and byte order mark."""
    numbers = {row for row, _ in kept}
    with open(source, "rb") as start:
        has_mark = start.read(3) == b"\xef\xbb\xbf"
    with (
        _reading(source, printable(source), record=True) as (names, reader, lines),
        open(out, "w", encoding="utf-8-sig" if has_mark else "utf-8", newline="") as file,
    ):
        file.write(lines.take())
        for number, _ in _rows(names, reader, printable(source)):
            text = lines.take()
            if number in numbers:
                file.write(text)


class _Lines:
    """Iterate over the lines of a file; with `record`, remember those that were read, until `take`."""

    def __init__(self, file: IO[str], record: bool):
        self._file, self._record = file, record
        self._recorded: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        if self._record:
            self._recorded.append(line)
        return line

    def take(self) -> str:
        """Return the lines that were read since the last call."""
        text = "".join(self._recorded)
        self._recorded.clear()
        return text


@contextmanager
def _reading(path: Path, where: str, record: bool = False) -> Iterator[tuple[list[str], Any, _Lines]]:
    """Open a list; yield the names of its columns, a csv.reader of its rows, and its lines. Raises ManifestError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = _Lines(file, record)
            header = file.readline()
            stated = header.strip()[4:] if header.casefold().startswith("sep=") else ""  # a line that Excel writes
            if stated:
                header = file.readline()
            file.seek(0)
            if stated:
                next(lines)
            delimiter = stated or max(",;\t", key=header.count)
            spaced = f"{delimiter} " in header  # spaces after delimiters are not part of the cells
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced)
            yield next(reader, []), reader, lines
    except (OSError, UnicodeDecodeError, csv.Error, TypeError) as error:
        raise ManifestError(f"{where}: is not readable as CSV ({short_message(error)}); save it as UTF-8") from error


def _rows(names: list[str], reader: Any, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number, cells) of rows that are not empty. Raises ManifestError if a row has too few or too many cells."""
    for number, cells in enumerate(filter(None, reader)):  # lines without any cell are not counted
        if len(cells) != len(names):
            raise ManifestError(
                f"{where} line {reader.line_num}: has not as many cells as the header; correct the line"
            )
        if any(map(str.strip, cells)):  # spreadsheets leave rows of empty cells
            yield number, cells

"""`.csv`: a header and a row per ear; separated by commas, semicolons or tabs, UTF-8."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ...errors import ManifestError
from ...files import escape_csv, printable, short_message, unescape_csv
from ..boxes import Box
from .columns import find_columns
from .json_lines import read_objects
from .rows import Rows


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Raise ManifestError if it is not readable, or its columns are not understood."""
    with _reading(path, where) as (reader, _):
        find_columns(reader.fieldnames or [], where, identity_column)  # of a list without rows, too
        return read_objects(_rows(reader, where), where, identity_column, lambda text: unescape_csv(text or ""))


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
            same = name if escape_csv(name) == name else f"./{name}"  # the same path, and no formula
            writer.writerow([same, *(box or ("",) * 4), escape_csv(identity), escape_csv(side)])


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the header and the rows `kept`, (row, 0), as they stand there: quotes, line ends, byte order mark."""
    numbers = {row for row, _ in kept}
    with open(source, "rb") as start:
        mark = start.read(3) == b"\xef\xbb\xbf"
    with (
        _reading(source, printable(source), kept=True) as (reader, lines),
        open(out, "w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file,
    ):
        file.write(lines.taken())
        for number, _ in _rows(reader, printable(source)):
            text = lines.taken()
            if number in numbers:
                file.write(text)


class _Lines:
    """The lines of a file; with `kept`, those that were taken since they were last asked for, too."""

    def __init__(self, file: IO[str], kept: bool):
        self._file, self._kept = file, kept
        self._taken: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        if self._kept:
            self._taken.append(line)
        return line

    def taken(self) -> str:
        text = "".join(self._taken)
        self._taken.clear()
        return text


@contextmanager
def _reading(path: Path, where: str, kept: bool = False) -> Iterator[tuple[csv.DictReader, _Lines]]:
    """A reader that has read the header, and the lines it takes (kept, if they are to be copied). Raises ManifestError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = _Lines(file, kept)
            header = file.readline()
            stated = header.strip()[4:] if header.casefold().startswith("sep=") else ""  # Excel's own line
            if stated:
                header = file.readline()
            file.seek(0)
            if stated:
                next(lines)
            delimiter = stated or max(",;\t", key=header.count)
            spaced = f"{delimiter} " in header  # spaces after commas belong to nobody
            reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=spaced)
            reader.fieldnames  # noqa: B018  (reads the header)
            yield reader, lines
    except (OSError, UnicodeDecodeError, csv.Error, TypeError) as error:
        raise ManifestError(f"{where}: not readable as CSV ({short_message(error)}); save it as UTF-8") from error


def _rows(reader: csv.DictReader, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(reader):
        if None in line or None in line.values():
            raise ManifestError(f"{where} line {reader.line_num}: not as many cells as the header; correct the line")
        if any(value.strip() for value in line.values()):  # spreadsheets leave rows of empty cells
            yield number, line

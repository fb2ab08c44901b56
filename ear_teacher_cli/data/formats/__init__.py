"""Formats of lists of ears: one module each, and the table of them. To add one: write its module and a line here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..boxes import Box
from . import coco, csv_table, json_lines, npy_dict, parquet
from .rows import Rows


@dataclass(frozen=True)
class Format:
    """How files of one suffix are read and written.

    read(path, name for messages, identity column): the rows. Raises ManifestError.
    write(path, rows of path, corners, identity, side), None where the format is only read.
    keep(source, out, (row, which of its boxes) to keep, identity column): the same file with fewer boxes, all else as it
    was.
    """

    read: Callable[[Path, str, str | None], Rows]
    keep: Callable[[Path, Path, Iterable[tuple[int, int]], str | None], None]
    write: Callable[[Path, Iterable[tuple[str, Box | None, str, str]]], None] | None = None


FORMATS = {
    ".npy": Format(npy_dict.read, npy_dict.keep, npy_dict.write),
    ".csv": Format(csv_table.read, csv_table.keep, csv_table.write),
    ".jsonl": Format(json_lines.read, json_lines.keep, json_lines.write),
    ".json": Format(coco.read, coco.keep),
    ".parquet": Format(parquet.read, parquet.keep, parquet.write),
}

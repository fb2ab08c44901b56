"""The formats of manifests: one module for each, and the table of them.

To add a format, write a module with a function `read` (and `write`, `keep` where they make sense; json_lines.py is a
short example) and add one line to FORMATS below. Every command then reads files of that suffix, names it in its
messages, and reports such files when they lie in a folder that it reads.

Shared by the readers: `rows.py` (what a reader returns, and checks of single values) and `columns.py` (the names that
columns may have; `json_lines.read_objects` turns rows with such names into `Rows`). `folder.py` reads a folder of
images with annotations (`coco.py`, `csv_table.py`, `pts.py`, `yolo.py`) by means of `tree.py` and `lists.py`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..boxes import Box
from . import coco, csv_table, json_lines, npy_dict, parquet
from .rows import Rows


@dataclass(frozen=True)
class Format:
    """How files of one suffix are read and written.

    `read(path, name, identity_column)`: return the rows of a file; `name` stands for the file in messages. Raises
    ManifestError.
    `keep(source, out, kept, identity_column)`: copy a file with only some of its boxes and everything else unchanged.
    `kept`: (row, position of the box within the row).
    `write(path, rows)`: write rows of (path, box as x1, y1, x2, y2 or None, identity, side), and the order of the
    boxes with them. None if the format is only read.
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

"""`.parquet`: a table with the column names of CSV. Needs the extra `parquet` (pyarrow)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import EarTeachError, ManifestError
from ...files import printable, short_message
from ..boxes import Box
from .json_lines import read_objects
from .rows import Rows

_BLOCK = 1 << 12  # rows that are Python objects at a time


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Read the rows. Raises ManifestError if the file is not readable, or its columns are not understood."""
    batches = _table(path, where).to_batches(max_chunksize=_BLOCK)
    objects = ({k: v for k, v in line.items() if v is not None} for batch in batches for line in batch.to_pylist())
    return read_objects(enumerate(objects), where, identity_column)


def write(path: Path, rows: Iterable[tuple[str, Box | None, str, str]]) -> None:
    """Write a table of rows (path, box x1, y1, x2, y2 or None, identity, side)."""
    arrow, parquet = _pyarrow()
    names, boxes, identities, sides = zip(*rows, strict=True)
    corners = {
        name: [None if box is None else box[i] for box in boxes] for i, name in enumerate(("x1", "y1", "x2", "y2"))
    }
    labels = {"identity": [text or None for text in identities], "side": [text or None for text in sides]}
    table = {"image_path": names, **corners, **{key: column for key, column in labels.items() if any(column)}}
    parquet.write_table(arrow.table(table), path)


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the rows `kept`, (row, 0), with all their columns."""
    _, parquet = _pyarrow()
    parquet.write_table(_table(source, printable(source)).take(sorted({row for row, _ in kept})), out)


def _table(path: Path, where: str) -> Any:
    arrow, parquet = _pyarrow()
    try:
        return parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        raise ManifestError(f"{where}: is not readable as Parquet ({short_message(error)}); write it again") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EarTeachError("Parquet: needs pyarrow; pip install 'ear-teacher-cli[parquet]', or use CSV") from error
    return pyarrow, pyarrow.parquet

"""Read what `embed` writes: `x.npy` (with `x.csv` beside it), `x.npz`, or `x.csv`.

The rows of a `.npy` stay on the disk until they are used.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.boxes import Box
from ..data.npy import map_npy, read_npz
from ..errors import ManifestError
from ..files import printable, short_message, unescape_csv

EMBEDDING_SUFFIXES = (".npy", ".npz", ".csv")


@dataclass(frozen=True)
class Embeddings:
    """Embeddings [N, D] of any length, and N paths, boxes and, if known, identities and sides ('' for unknown ones)."""

    source: str
    rows: np.ndarray
    paths: Sequence[str]
    boxes: Sequence[Box | None]
    identities: Sequence[str] | None = None
    sides: Sequence[str] | None = None
    weights: str = ""  # file name of the weights, from `x.json`
    whitened: bool = False  # from `x.json`
    fingerprint: str = ""  # of the weights and their preprocessing, from `x.json`
    root: Path | None = None  # folder of the images, if they were embedded by this process

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """Return `x.npy row 17 (s03/left.jpg)`, for messages."""
        return f"{printable(Path(self.source).name)} row {row} ({printable(self.paths[row])})"


def read_rows(source: str | Path) -> np.ndarray:
    """Return the embeddings [N, D] without their names, to fit a mean or a whitening on. Raises ManifestError."""
    path = Path(source)
    where = printable(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, where).rows
    return _array(path, where)[0]


def read_embeddings(source: str | Path) -> Embeddings:
    """Return embeddings with their names. Raises ManifestError if the file cannot be read, or if names, rows and `x.json`
    do not agree."""
    path = Path(source)
    where = printable(path)
    if path.suffix.lower() == ".csv":
        found = _read_csv(path, where)
        return _checked(found, path, where, _about(path.with_suffix(".json")))
    rows, archive = _array(path, where)
    names = path.with_suffix(".csv")
    if names.is_file():
        found = _named(rows, path, names, where)
    elif "paths" in archive:
        boxes = archive.get("boxes", np.full((len(rows), 4), np.nan)).tolist()
        boxes = [tuple(box) if box[0] == box[0] else None for box in boxes]
        found = Embeddings(str(path), rows, archive["paths"].tolist(), boxes)
    else:
        raise ManifestError(f"{printable(names)}: no such file; embed writes it beside {where}, with the rows' names")
    return _checked(found, path, where, _about(path.with_suffix(".json")))


def _array(path: Path, where: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if path.suffix.lower() not in EMBEDDING_SUFFIXES:
        raise ManifestError(f"{where}: not the name of embeddings; give a .npy, .npz or .csv that embed wrote")
    _require_regular(path)
    archive = read_npz(path) if path.suffix.lower() == ".npz" else {"embeddings": map_npy(path)}
    rows = archive.get("embeddings")
    if rows is None or rows.ndim != 2 or rows.dtype.kind not in "fiu" or not rows.size:
        found = f"{rows.dtype} {list(rows.shape)}" if rows is not None else "no 'embeddings'"
        raise ManifestError(f"{where}: holds {found}, not rows of numbers [N, D]; give what embed wrote")
    return rows, archive


def _named(rows: np.ndarray, path: Path, names: Path, where: str) -> Embeddings:
    table = [line for line in _table(names) if line.get("row")]
    if [line["row"] for line in table] != [str(i) for i in range(len(rows))]:
        raise ManifestError(
            f"{where}: has {len(rows)} rows, but {printable(names.name)} lists {len(table)}, or in another order; "
            "they are not from the same embed: embed again"
        )
    return Embeddings(str(path), rows, *_columns(table, printable(names)))


def _read_csv(path: Path, where: str) -> Embeddings:
    rows, table = [], []
    for line in _table(path):
        numbers = [value for name, value in line.items() if name[:1] == "e" and name[1:].isdigit()]
        table.append({name: line[name] for name in line if name in _NAMES})
        try:
            rows.append(np.array(numbers, dtype=np.float32))
        except ValueError as error:
            raise ManifestError(f"{where} row {len(rows)}: {printable(error)}; embed again") from error
    if not rows or not len(rows[0]):
        raise ManifestError(f"{where}: holds no columns e0, e1, ... of an embedding; images need --weights")
    return Embeddings(str(path), np.stack(rows), *_columns(table, where))


_NAMES = ("path", "x1", "y1", "x2", "y2", "identity", "side")


def _columns(table: list[dict[str, str]], where: str) -> tuple[list, list, list | None, list | None]:
    """Return paths, boxes, identities and sides."""
    if "path" not in table[0]:
        raise ManifestError(f"{where}: has no column 'path'; give what embed wrote")
    boxes: list[Box | None] = []
    for row, line in enumerate(table):
        corners = [line.get(name) or "" for name in ("x1", "y1", "x2", "y2")]
        try:
            boxes.append(_box_of(corners) if all(corners) else None)
        except ValueError:
            raise ManifestError(f"{where} row {row}: its box is not four numbers; embed again") from None
    known = [[unescape_csv(line.get(name) or "") for line in table] for name in ("identity", "side")]
    identities, sides = (column if any(column) else None for column in known)
    return [unescape_csv(line["path"]) for line in table], boxes, identities, sides


def _box_of(corners: Sequence[str]) -> Box:
    x1, y1, x2, y2 = map(float, corners)
    return x1, y1, x2, y2


def _require_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a FIFO would block
        raise ManifestError(f"{printable(path)}: is not a regular file; give what embed wrote")


def _table(path: Path) -> list[dict[str, str]]:
    _require_regular(path)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(
            f"{printable(path)}: not readable as CSV ({short_message(error)}); check the path"
        ) from error
    for row, line in enumerate(table):
        if None in line or None in line.values():
            raise ManifestError(
                f"{printable(path)} row {row}: has another number of cells than the header; embed again"
            )
    return table


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ManifestError(f"{printable(path)}: not readable as JSON ({short_message(error)}); embed again") from error
    return about if isinstance(about, dict) else {}


def _checked(found: Embeddings, path: Path, where: str, about: dict[str, Any]) -> Embeddings:
    if about.get("rows", len(found)) != len(found):
        raise ManifestError(
            f"{where}: has {len(found)} rows, but {printable(path.with_suffix('.json').name)} says "
            f"{printable(about['rows'])}; they are not from the same embed: embed again"
        )
    mark, whitened = _space(about)
    return replace(found, weights=str(about.get("weights", "")), whitened=whitened, fingerprint=mark)


def space_of(source: str | Path) -> tuple[str, bool]:
    """Return (fingerprint or '', whether whitened) of an output of embed, from the `x.json` beside it. Only embeddings
    that agree in both can be compared."""
    return _space(_about(Path(source).with_suffix(".json")))


def _space(about: dict[str, Any]) -> tuple[str, bool]:
    mark, precision = about.get("fingerprint"), about.get("precision", "32-true")
    if not isinstance(mark, str):
        mark = ""
    elif precision != "32-true":
        mark = f"{precision} {mark}"
    return mark, about.get("whitened") is True

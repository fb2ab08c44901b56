"""Embeddings under way: rows and names on the disk as they come, so that a killed `embed` can go on.

Beside `x.npy` a folder `.x.npy.unfinished` holds `state.json` (what the rows were made from and with), `rows.npy`
(float32 [N, D]) and `names.csv`. It is there from the first image until the outputs have their names.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..console import Console
from ..data.dataset import UnreadableImage
from ..data.manifest import Manifest
from ..errors import EarTeachError, ImageError, UsageError
from ..files import escape_csv, has_writer, only_writer, printable, whole_file
from ..platform import OPEN_FILES_CAN_BE_REMOVED

STATE, _ROWS, _NAMES = "state.json", "rows.npy", "names.csv"
_HEADER_BYTES = 128  # of a .npy file of two dimensions


class Journal:
    """Rows and names of the first `done` images of a manifest, `count` of which have a row.

    Images come in batches of `batch_size`, the size with which numbers can be repeated to the last bit: a journal
    that is opened again goes back to the end of a whole batch.
    """

    def __init__(self, rows: BinaryIO, names: BinaryIO, manifest: Manifest, dim: int, batch_size: int):
        self.rows, self.manifest, self.dim, self.batch_size = rows, manifest, dim, batch_size
        self.names = io.TextIOWrapper(names, encoding="utf-8", newline="", write_through=True)
        self.writer = csv.writer(self.names)
        known = {"identity": manifest.identities, "side": manifest.sides}
        self.labels = {name: column for name, column in known.items() if column is not None}
        self.kept: list[int] = []  # indices of the images that have a row
        self.done = 0
        self._go_back()

    @property
    def count(self) -> int:
        return len(self.kept)

    def add(self, good: list[int], vectors: np.ndarray | None, bad: list[UnreadableImage]) -> None:
        """One batch: indices of its readable images with their float32 rows, and the others."""
        if vectors is not None:
            self.rows.write(vectors.astype("<f4", copy=False).tobytes())
            self.rows.flush()
        entries: list[tuple[int, int | str, str]] = [(index, self.count + i, "ok") for i, index in enumerate(good)]
        entries += [(entry.index, "", f"{entry.reason}: {entry.detail}") for entry in bad]
        for index, row, status in sorted(entries, key=lambda entry: entry[0]):
            self.writer.writerow([row, *self.name_of(index), escape_csv(status), *self.labels_of(index)])
        self.names.flush()
        self.kept += good
        self.done += len(entries)

    def name_of(self, index: int) -> list[Any]:
        """Path and box, as cells."""
        return [escape_csv(self.manifest.paths[index]), *(self.manifest.boxes[index] or ("",) * 4)]

    def labels_of(self, index: int) -> list[str]:
        return [escape_csv(column[index]) for column in self.labels.values()]

    def finish(self) -> None:
        """Write the header, which says how many rows there are."""
        self._write_header()
        for file in (self.rows, self.names.buffer):
            file.flush()
            os.fsync(file.fileno())  # another machine may be about to read it

    def array(self) -> np.ndarray:
        """The finished rows [N, D], on the disk."""
        return np.memmap(self.rows, "<f4", "r", _HEADER_BYTES, (self.count, self.dim))

    def _write_header(self) -> None:
        end = self.rows.seek(0, os.SEEK_END)
        self.rows.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.dim)}
        np.lib.format.write_array_header_1_0(self.rows, header)  # numpy pads it: the count has room to grow
        assert self.rows.tell() == _HEADER_BYTES
        self.rows.seek(max(end, _HEADER_BYTES))

    def _go_back(self) -> None:
        """Take over what is there, up to the end of the last batch that is whole in both files."""
        self._write_header()
        room = (self.rows.tell() - _HEADER_BYTES) // (4 * self.dim)
        kept: list[int] = []
        offset = end = rows = 0
        self.names.buffer.seek(0)
        for number, line in enumerate(self.names.buffer):  # 0 is the header; cells hold no line breaks (files.cell)
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            if number and not line.startswith(b","):
                kept.append(number - 1)
            whole = number % self.batch_size == 0 or number == len(self.manifest)
            if whole and len(kept) <= room:
                end, rows, self.done = offset, len(kept), number
        self.kept = kept[:rows]
        self.names.buffer.truncate(end)
        self.names.seek(0, os.SEEK_END)
        self.rows.truncate(_HEADER_BYTES + 4 * self.dim * rows)
        self.rows.seek(0, os.SEEK_END)
        if end == 0:
            self.writer.writerow(["row", "path", "x1", "y1", "x2", "y2", "status", *self.labels])


def folder_of(out: Path) -> Path:
    """Where the journal of `out` is."""
    return out.with_name(f".{out.name}.unfinished")


def parts_of(out: Path) -> list[Path]:
    """The journals of `out` that can be gone on with, of however many processes, and that nobody is writing."""
    name = re.escape(out.name)
    ours = re.compile(rf"\.{name}(\.\d+-of-\d+)?\.unfinished")
    found = (folder for folder in out.parent.glob(".*.unfinished") if ours.fullmatch(folder.name))
    return sorted(f for f in found if (f / STATE).is_file() and _holds_rows(f / _ROWS) and not has_writer(f))


def rows_in(folder: Path) -> int:
    """How many rows a journal holds; 0 if it does not say how long they are."""
    try:
        dim = json.loads((folder / STATE).read_text(encoding="utf-8"))["dim"]
        return ((folder / _ROWS).stat().st_size - _HEADER_BYTES) // (4 * dim)
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return 0


def join_journals(folders: list[Path], rows: BinaryIO, names: BinaryIO) -> None:
    """Write the finished journals of consecutive parts of a manifest, one after the other, as one."""
    rows.write(bytes(_HEADER_BYTES))
    count = 0
    for number, folder in enumerate(folders):
        with open(folder / _ROWS, "rb") as part:
            part.seek(_HEADER_BYTES)
            shutil.copyfileobj(part, rows, 2**20)
        with open(folder / _NAMES, "rb") as part:
            header = part.readline()
            names.write(b"" if number else header)
            before = count
            for line in part:
                row, comma, rest = line.partition(b",")
                count += bool(row)
                names.write((b"%d" % (before + int(row)) if row else b"") + comma + rest)
    rows.flush()
    names.flush()


@contextmanager
def unfinished(out: Path, state: dict[str, Any], resume: bool, console: Console) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The files of a Journal for `out`: rows and names. They go when the body ends well, and stay if it does not.

    `state`: plain values, on which every byte depends. Without `resume` what is there is dropped: ask `parts_of` first.
    Raises UsageError if there is nothing to `resume`, EarTeachError if that was made with another state, or is being
    made by another process.
    """
    folder = folder_of(out)
    if resume and not (folder / STATE).is_file():
        raise UsageError(f"{printable(out)}: there is nothing unfinished of it; leave --resume out")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise EarTeachError(f"{printable(out)}: cannot be written ({error.strerror})") from error
    with only_writer(folder) as writer:
        if resume:
            _refuse_other(_state_of(folder, out), state, out)
        else:
            if (folder / _ROWS).exists():
                console.info(f"{printable(out)}: an unfinished one is dropped (--overwrite)")
            for name in (STATE, _ROWS, _NAMES):
                (folder / name).unlink(missing_ok=True)
        try:
            for name in (_ROWS, _NAMES):
                if (folder / name).is_symlink():  # of a stranger's folder: it may point anywhere
                    (folder / name).unlink()
                (folder / name).touch()
            if (
                folder / _ROWS
            ).stat().st_nlink > 1:  # killed at the very end: these bytes have their final name already
                with whole_file(folder / _ROWS) as temporary:
                    shutil.copyfile(folder / _ROWS, temporary)
            with whole_file(folder / STATE) as temporary:
                temporary.write_text(json.dumps(state, indent=2), encoding="utf-8")
            with open(folder / _ROWS, "r+b") as rows, open(folder / _NAMES, "r+b") as names:
                yield rows, names
            (folder / _ROWS).unlink()
        finally:
            if not _holds_rows(folder / _ROWS):  # the end, or nothing to go on with
                writer.remove_folder()


def put_rows(rows: BinaryIO, path: Path) -> None:
    """Make finished rows the content of the file `path`, without copying where the file system can; the journal keeps
    its own."""
    link = Path(rows.name).with_name("link")
    try:
        if not OPEN_FILES_CAN_BE_REMOVED:
            raise OSError("the rows are open, and so is the file")
        link.unlink(missing_ok=True)
        os.link(rows.name, link)
    except OSError:  # or a file system without hard links
        shutil.copyfile(rows.name, path)
    else:
        os.replace(link, path)


def input_mark(manifest: Manifest) -> str:
    """SHA-256 of what an input is: paths, boxes, labels, and size and time of every image."""
    mark = hashlib.sha256()
    for i, path in enumerate(manifest.paths):
        labels = [column[i] for column in (manifest.identities, manifest.sides) if column is not None]
        try:
            status = os.stat(manifest.file(i))
            seen = [status.st_size, status.st_mtime_ns]
        except (OSError, ImageError):
            seen = []
        mark.update(json.dumps([path, manifest.boxes[i], labels, seen]).encode())
    return mark.hexdigest()


def _state_of(folder: Path, out: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EarTeachError(
            f"{printable(out)}: what is unfinished of it is damaged; start anew with --overwrite instead of --resume"
        ) from error
    return state if isinstance(state, dict) else {}


def _refuse_other(found: dict[str, Any], state: dict[str, Any], out: Path) -> None:
    for name, value in state.items():
        if found.get(name) != value:
            raise EarTeachError(
                f"{printable(out)}: the unfinished one was made with other {name.replace('_', ' ')} "
                f"({_brief(found.get(name))}, now {_brief(value)}); go on with those, or start anew with --overwrite instead of --resume"
            )


def _holds_rows(path: Path) -> bool:
    return path.exists() and path.stat().st_size > _HEADER_BYTES


def _brief(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return text[:12] if len(text) == 64 else text[:60]

"""Finished batches on the disk, from which a killed `embed` resumes: a shard is one batch in one file.

Beside `x.npy` lies the folder `.x.npy.unfinished` with `state.json` (all that the rows depend on) and the shards, each
under its name only when it is complete. Several processes write into one folder, and any number of processes can
resume: they embed the batches that have no shard. A shard is a line of JSON (which images have a row, and why the
others have none), then the rows, little-endian float32.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..console import Console
from ..data.dataset import UnreadableImage
from ..data.manifest import Manifest
from ..errors import EarTeachError, ImageError, UsageError
from ..files import has_writer, only_writer, printable, whole_file

STATE, _SUFFIX = "state.json", ".shard"


class Shards:
    """The shards of `images` images, each a batch of `size` but for the last, with rows of `dim` numbers.

    They lie in the folder `place` under names that begin with `mark`, or all in the open file `place`.
    """

    def __init__(self, images: int, size: int, dim: int, place: Path | BinaryIO, mark: str = ""):
        self.images, self.size, self.dim, self.place, self.mark = images, size, dim, place, mark
        self._offsets: dict[int, int] = {}  # of shards in an open file, by first image

    def split(self, block: range) -> list[range]:
        """Return the images of each shard of a block, which begins with a shard."""
        return [block[i : i + self.size] for i in range(0, len(block), self.size)]

    def missing(self, block: range) -> list[range]:
        """Return the images of each shard of a block that is not there, or is damaged."""
        return [images for images in self.split(block) if self._index(images) is None]

    def write(
        self, images: range, index: list[int], rows: np.ndarray | None, unreadable: list[UnreadableImage]
    ) -> None:
        """Write a shard: `index` of the images that have `rows` float32 [n, D], and the others.

        Raises OSError; the shard is not there then.
        """
        reasons = [(entry.index, f"{entry.reason}: {entry.detail}") for entry in unreadable]
        data = json.dumps({"index": index, "unreadable": reasons}).encode() + b"\n"
        data += b"" if rows is None else rows.astype("<f4", copy=False).tobytes()
        if not isinstance(self.place, Path):
            self._offsets[images.start] = self.place.seek(0, os.SEEK_END)
            self.place.write(data)
            self.place.flush()
            return
        handle, temporary = tempfile.mkstemp(dir=self.place)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, self._path(self.place, images))
        finally:
            Path(temporary).unlink(missing_ok=True)

    def unreadable(self) -> dict[int, str]:
        """Return why each of the images without a row has none, by index. Raises EarTeachError if a shard is missing."""
        unreadable: dict[int, str] = {}
        for images in self.split(range(self.images)):
            found = self._index(images)
            if found is None:
                raise EarTeachError(
                    f"{printable(self.place)}: the embeddings of images {images.start} to {images[-1]} are not there "
                    "after all processes have finished; give all of them the same folder. Nothing was written"
                )
            unreadable |= found[1]
        return unreadable

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the rows of a shard at a time, float32 [n, D]. Call `unreadable` first."""
        for images in self.split(range(self.images)):
            with self._open(images) as file:
                count = len(json.loads(file.readline())["index"])
                yield np.frombuffer(file.read(4 * count * self.dim), "<f4").reshape(count, self.dim)

    def _index(self, images: range) -> tuple[list[int], dict[int, str]] | None:
        """Return which of a shard's images have a row, and why the others have none; None if it is not whole."""
        try:
            with self._open(images) as file:
                head = json.loads(file.readline())
                index, unreadable = list(head["index"]), dict(head["unreadable"])
                end = file.tell() + 4 * len(index) * self.dim
                ordered = index == sorted(index) and sorted([*index, *unreadable]) == list(images)
                whole = ordered and end <= os.fstat(file.fileno()).st_size
                return (index, unreadable) if whole else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    @contextmanager
    def _open(self, images: range) -> Iterator[BinaryIO]:
        if isinstance(self.place, Path):
            with open(self._path(self.place, images), "rb") as file:
                yield file
        else:
            self.place.seek(self._offsets[images.start])
            yield self.place

    def _path(self, folder: Path, images: range) -> Path:
        return folder / f"{self.mark}-{images.start:010d}{_SUFFIX}"


def folder_of(out: Path) -> Path:
    """Return the folder of the shards of `out`."""
    return out.with_name(f".{out.name}.unfinished")


def finished_rows(out: Path) -> int | None:
    """Return how many rows a killed `embed` has left of `out`; None if it has left nothing, 0 while one is running."""
    folder = folder_of(out)
    if not (folder / STATE).is_file():
        return None
    return 0 if has_writer(folder) else sum(map(_rows_in, folder.glob(f"*{_SUFFIX}")))


def _rows_in(shard: Path) -> int:
    try:
        with open(shard, "rb") as file:
            return len(json.loads(file.readline())["index"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


@contextmanager
def unfinished_folder(out: Path, state: dict[str, Any], resume: bool, console: Console) -> Iterator[tuple[Path, str]]:
    """Yield the folder for the shards of `out` and the mark of their names. Remove it at the end, or if
    there are no rows in it.

    `state`: plain values, on which every byte depends. Without `resume` the shards that are there are removed. Raises
    EarTeachError if those to resume from were made with another state, or if another process is writing there.
    """
    folder, text = folder_of(out), json.dumps(state, indent=2)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise EarTeachError(f"{printable(out)}: cannot be written ({error.strerror})") from error
    with only_writer(folder) as writer:
        left = list(folder.glob(f"*{_SUFFIX}"))
        if resume:
            _require_same(_read_state(folder, out), state, out)
        elif any(map(_rows_in, left)):
            console.info(f"{printable(out)}: the unfinished rows are removed (--overwrite)")
        for path in () if resume else (*left, folder / STATE):
            path.unlink(missing_ok=True)
        try:
            with whole_file(folder / STATE) as temporary:
                temporary.write_text(text, encoding="utf-8")
            yield folder, hashlib.sha256(text.encode()).hexdigest()[:16]
            writer.remove_folder()
        finally:
            if not any(map(_rows_in, folder.glob(f"*{_SUFFIX}"))):
                writer.remove_folder()


def input_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of what an input is: paths, boxes, labels, and size and time of every image."""
    digest = hashlib.sha256()
    for i, path in enumerate(manifest.paths):
        labels = [column[i] for column in (manifest.identities, manifest.sides) if column is not None]
        try:
            status = os.stat(manifest.file(i))
            seen = [status.st_size, status.st_mtime_ns]
        except (OSError, ImageError):
            seen = []
        digest.update(json.dumps([path, manifest.boxes[i], labels, seen]).encode())
    return digest.hexdigest()


def _read_state(folder: Path, out: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{printable(out)}: nothing unfinished of it is there; leave --resume out") from error
    except (OSError, ValueError) as error:
        raise EarTeachError(
            f"{printable(folder / STATE)}: damaged; start again with --overwrite instead of --resume"
        ) from error
    return state if isinstance(state, dict) else {}


def _require_same(found: dict[str, Any], state: dict[str, Any], out: Path) -> None:
    for name, value in state.items():
        if found.get(name) != value:
            raise EarTeachError(
                f"{printable(out)}: was begun with other {name.replace('_', ' ')} ({_short(found.get(name))}, now "
                f"{_short(value)}); resume with those, or start again with --overwrite instead of --resume"
            )


def _short(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return text[:12] if len(text) == 64 else text[:60]

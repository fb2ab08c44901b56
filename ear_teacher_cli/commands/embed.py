"""`embed`: pictures in, one row of numbers per readable picture out, with names and provenance beside it.

Rows stream to disk: memory does not grow with their number. A picture that cannot be read has no row; the
list beside the embeddings says why.
"""

import csv
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from .. import __version__
from ..core.embedder import Embedder, embed_pictures, load_embedder
from ..data.dataset import BadPicture
from ..data.manifest import Box, Manifest, read_input
from ..errors import EarTeachError, WordsError
from ..files import printable, refuse_existing, whole_file
from ..talk import Talk

FORMATS = ("npy", "npz", "csv")


@dataclass(frozen=True)
class Embedded:
    rows: int
    skipped: int
    dim: int
    out: str


def embed(
    source: str,
    out: str,
    *,
    weights: str | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    format: str | None = None,
    normalize: bool = True,
    whiten: bool = True,
    root_dir: str | None = None,
    batch_size: int = 32,
    num_workers: int = 8,
    overwrite: bool = False,
    talk: Talk,
) -> Embedded:
    """Embed `source` (a folder, a manifest, a picture, or `-` for paths on stdin) into `out` (a file, or `-` for stdout).

    `normalize`: rows at unit length (L2). `whiten`: as the run fitted it to its training embeddings, where it did;
    rows that are not normalised are not whitened either. Raises EarTeachError if not one picture could be embedded.
    """
    kind = _format_of(out, format)
    sidecars = _sidecars(out, kind)
    for path in [out, *sidecars.values()] if out != "-" else []:
        refuse_existing(path, overwrite, inputs=(source, weights))
    manifest = read_input(source, root_dir)
    embedder = load_embedder(weights, backbone, image_size, whiten and normalize)
    talk.say(
        f"weights: {embedder.receipt}; {embedder.architecture}, {embedder.embedding_dim} numbers a picture, "
        f"{embedder.preprocessing.image_size} px"
    )
    whitening = embedder.whitening
    if whitening:
        talk.say("whitened as the run fitted it (--no-whiten: raw)")
    with ExitStack() as stack:  # left in reverse: the sidecars take their names first, the embeddings last
        file = stack.enter_context(_output(out))
        dim = whitening.matrix.shape[1] if whitening else embedder.embedding_dim
        rows = _WRITERS[kind](file, dim, manifest)
        names = _Names(stack.enter_context(_output(str(sidecars["names"]))), manifest) if "names" in sidecars else None
        skipped = _run(embedder, manifest, normalize, whiten, batch_size, num_workers, rows, names, talk)
        if rows.count == 0:
            raise EarTeachError(
                f"{printable(source)}: not one of {len(manifest)} pictures could be read; nothing was written"
            )
        rows.finish()
        if names:
            names.finish()
        if "about" in sidecars:
            about = _provenance(embedder, manifest, dim, normalize, whitening is not None, rows.count, skipped)
            stack.enter_context(_output(str(sidecars["about"]))).write(json.dumps(about, indent=2).encode() + b"\n")
    return Embedded(rows.count, skipped, dim, out)


def _run(
    embedder: Embedder,
    manifest: Manifest,
    normalize: bool,
    whiten: bool,
    batch_size: int,
    num_workers: int,
    rows: "_Rows",
    names: "_Names | None",
    talk: Talk,
) -> int:
    """Embed all, in order; number of pictures skipped."""
    skipped = 0
    for good, vectors, bad in embed_pictures(embedder, manifest, batch_size, num_workers, talk):
        if names:
            names.add(manifest, rows.count, good, bad)
        if good:
            found = embedder.unit_rows(vectors, whiten) if normalize else vectors.numpy()
            rows.add(found, good)
        skipped += len(bad)
    return skipped


def _provenance(
    embedder: Embedder, manifest: Manifest, dim: int, normalize: bool, whitened: bool, rows: int, skipped: int
) -> dict[str, Any]:
    """What `out.json` says: how to read the numbers, and whether two files may be compared."""
    return {
        "rows": rows,
        "skipped": skipped,
        "dim": dim,
        "dtype": "float32",
        "normalized": normalize,
        "whitened": whitened,
        "input": Path(manifest.source).name,
        "weights": Path(embedder.source).name,
        "weights_sha256": embedder.sha256,
        "architecture": embedder.architecture,
        "preprocessing": embedder.preprocessing.as_dict(),
        "versions": {"earteach": __version__, **{name: version(name) for name in ("torch", "timm", "numpy", "pillow")}},
    }


def _format_of(out: str, format: str | None) -> str:
    suffix = Path(out).suffix.removeprefix(".").lower()
    if format is not None and format not in FORMATS:
        raise WordsError(f"--format {printable(format)}: not written; choose one of {', '.join(FORMATS)}")
    if out == "-":
        return format or "npy"
    if suffix not in FORMATS:
        raise WordsError(f"{printable(out)}: name a {', '.join('.' + f for f in FORMATS)} file, or - for stdout")
    if format not in (None, suffix):
        raise WordsError(f"{printable(out)}: is named .{suffix} but --format says {format}; make them agree")
    return suffix


def _sidecars(out: str, kind: str) -> dict[str, Path]:
    """Beside `x.npy`: `x.csv` with names, `x.json` with provenance. A `.csv` holds the names itself."""
    if out == "-":
        return {}
    path = Path(out)
    sidecars = {"about": path.with_suffix(".json")}
    return sidecars if kind == "csv" else {**sidecars, "names": path.with_suffix(".csv")}


@contextmanager
def _output(out: str) -> Iterator[BinaryIO]:
    """A seekable binary file that becomes the file `out`, or is sent to stdout, when whole."""
    if out == "-":
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            try:
                shutil.copyfileobj(file, sys.stdout.buffer, 2**20)
                sys.stdout.buffer.flush()
            except BrokenPipeError:  # the reader has all it wants; what is left to flush at exit goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        with whole_file(out) as temporary, open(temporary, "w+b") as file:
            yield file


def _labels(manifest: Manifest) -> dict[str, Any]:
    """What the manifest knows of who is on its pictures, by column."""
    known = {"identity": manifest.identities, "side": manifest.sides}
    return {name: column for name, column in known.items() if column is not None}


class _Rows(Protocol):
    """A way to write embeddings. `count`: rows so far."""

    count: int

    def add(self, vectors: np.ndarray, indices: list[int]) -> None: ...

    def finish(self) -> None: ...


class _Npy:
    """float32 [N, D]. numpy pads the header so that N can be written last, in place."""

    def __init__(self, file: BinaryIO, dim: int, manifest: Manifest):
        self.file, self.dim, self.count = file, dim, 0
        self._write_header()

    def add(self, vectors: np.ndarray, indices: list[int]) -> None:
        self.file.write(vectors.astype("<f4", copy=False).tobytes())
        self.count += len(vectors)

    def finish(self) -> None:
        start = self.file.tell()
        self.file.seek(0)
        self._write_header()
        self.file.seek(start)

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.dim)}
        np.lib.format.write_array_header_1_0(self.file, header)


class _Npz:
    """`embeddings` float32 [N, D], `paths` [N], `boxes` float32 [N, 4] (NaN: the whole picture)."""

    def __init__(self, file: BinaryIO, dim: int, manifest: Manifest):
        self.file, self.spool = file, tempfile.TemporaryFile()
        self.rows = _Npy(self.spool, dim, manifest)
        self.manifest = manifest
        self.paths: list[str] = []
        self.boxes: list[Box] = []

    @property
    def count(self) -> int:
        return self.rows.count

    def add(self, vectors: np.ndarray, indices: list[int]) -> None:
        self.rows.add(vectors, indices)
        self.paths += [self.manifest.paths[i] for i in indices]
        self.boxes += [self.manifest.boxes[i] or (float("nan"),) * 4 for i in indices]

    def finish(self) -> None:
        self.rows.finish()
        self.spool.seek(0)
        with zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                shutil.copyfileobj(self.spool, member, 2**20)
            for name, column in (("paths", np.array(self.paths)), ("boxes", np.array(self.boxes, np.float32))):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, column, allow_pickle=False)
        self.spool.close()


class _Csv:
    """row, path, x1, y1, x2, y2, identity and side where known, then e0 ... e(D-1), each float32 in the fewest digits that give it back."""

    def __init__(self, file: BinaryIO, dim: int, manifest: Manifest):
        self.text, self.count = (
            io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True),
            0,
        )
        self.writer = csv.writer(self.text)
        self.manifest, self.labels = manifest, _labels(manifest)
        self.writer.writerow(["row", "path", "x1", "y1", "x2", "y2", *self.labels, *(f"e{i}" for i in range(dim))])

    def add(self, vectors: np.ndarray, indices: list[int]) -> None:
        for vector, i in zip(vectors, indices, strict=True):
            box, labels = self.manifest.boxes[i] or ("",) * 4, [column[i] for column in self.labels.values()]
            self.writer.writerow([self.count, self.manifest.paths[i], *box, *labels, *vector.astype(str)])
            self.count += 1

    def finish(self) -> None:
        self.text.detach()  # the file stays open: it is not ours to close


_WRITERS = {"npy": _Npy, "npz": _Npz, "csv": _Csv}


class _Names:
    """`out.csv` beside the embeddings: every input in order; `row` is empty where there is no embedding.

    What the manifest knows of identity and side is kept, so that `evaluate` needs no other list.
    """

    def __init__(self, file: BinaryIO, manifest: Manifest):
        self.text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        self.writer = csv.writer(self.text)
        self.labels = _labels(manifest)
        self.writer.writerow(["row", "path", "x1", "y1", "x2", "y2", "status", *self.labels])

    def add(self, manifest: Manifest, next_row: int, good: list[int], bad: list[BadPicture]) -> None:
        entries = [(index, next_row + i, "ok") for i, index in enumerate(good)]
        entries += [(entry.index, "", f"{entry.reason}: {entry.detail}") for entry in bad]
        for index, row, status in sorted(entries, key=lambda entry: entry[0]):
            labels = [column[index] for column in self.labels.values()]
            self.writer.writerow([row, manifest.paths[index], *(manifest.boxes[index] or ("",) * 4), status, *labels])

    def finish(self) -> None:
        self.text.detach()

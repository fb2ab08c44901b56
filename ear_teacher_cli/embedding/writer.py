"""`embed`: write one embedding per readable image, with names and provenance beside it.

Rows go to the disk batch by batch (embedding/shards.py): memory does not grow with their number, and `--resume`
continues a killed `embed`. An image that cannot be read has no row; the list beside the embeddings says why.
"""

import csv
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy_format

from .. import __version__
from ..command_config import EMBEDDING_FORMATS, EmbedConfig
from ..console import Console
from ..data.manifest import Manifest, print_summary, read_input
from ..distributed import Ranks, distributed_context
from ..errors import EarTeachError, UsageError
from ..files import escape_csv, printable, refuse_existing, whole_file
from ..platform import usable_cores
from .embedder import Batch, Embedder, embed_images, load_embedder, warn_of_unknown_sides
from .shards import Shards, finished_rows, folder_of, input_digest, unfinished_folder


@dataclass(frozen=True)
class Embedded:
    """What `embed` wrote: `rows` of `dim` numbers each to `out`; `skipped` images could not be read."""

    rows: int
    skipped: int
    dim: int
    out: str


@dataclass(frozen=True)
class Whole:
    """The content of the outputs. `unreadable`: by index of the image, why it has no row; all others have one."""

    manifest: Manifest
    shards: Shards
    unreadable: dict[int, str]

    def __len__(self) -> int:
        return len(self.manifest) - len(self.unreadable)

    @property
    def kept(self) -> Iterator[int]:
        """The indices of the images that have a row, in order."""
        return (index for index in range(len(self.manifest)) if index not in self.unreadable)

    @property
    def labels(self) -> dict[str, Sequence[str]]:
        """The columns of labels that the manifest has, by name."""
        columns = {"identity": self.manifest.identities, "side": self.manifest.sides}
        return {name: column for name, column in columns.items() if column is not None}

    def name_of(self, index: int) -> list[Any]:
        """Return path and box of an image, as cells of a CSV."""
        return [escape_csv(self.manifest.paths[index]), *(self.manifest.boxes[index] or ("",) * 4)]

    def labels_of(self, index: int) -> list[str]:
        """Return the labels of an image, as cells of a CSV."""
        return [escape_csv(column[index]) for column in self.labels.values()]


def embed(
    source: str,
    out: str,
    config: EmbedConfig,
    console: Console,
) -> Embedded:
    """Embed `source` (a folder, a manifest, an image, or `-` for paths on stdin) into `out` (a file, or `-` for stdout).

    Rows that are not normalised are not whitened either. Raises UsageError if a killed embed left finished rows and
    neither `resume` nor `overwrite` is given, EarTeachError if no image could be embedded.
    """
    kind = _format_of(out, config.format)
    sidecars = _sidecars(out, kind)
    if config.resume and out == "-":
        raise UsageError("--resume: stdout keeps nothing to resume from; name a file")
    with distributed_context() as ranks:
        if ranks.world > 1 and (out == "-" or source == "-"):
            raise UsageError("-: cannot be shared by several processes; name files")
        if out != "-":
            _refuse_outputs([out, *sidecars.values()], (source, config.weights), config.resume, config.overwrite, ranks)
        manifest = read_input(source, config.root_dir, config.reading)
        console = Console(quiet=True) if ranks.rank else console
        whiten = config.whiten and config.normalize
        embedder = load_embedder(config.weights, config.backbone, config.image_size, whiten)
        _set_arithmetic(embedder, config, console)
        _describe(embedder, manifest, console)
        if ranks.rank == 0:
            warn_of_unknown_sides(embedder, manifest, console)
        about = _provenance(embedder, manifest, config.normalize)
        workers = min(config.num_workers, max(1, usable_cores() // ranks.local))
        with _open_shards(
            out, about | {"compiled": config.compile}, manifest, config.batch_size, config.resume, console, ranks
        ) as shards:
            mine = ranks.block(len(manifest), config.batch_size)
            batches = partial(
                embed_images, embedder, manifest, config.batch_size, workers, config.load_timeout, console
            )
            to_rows = embedder.unit_rows if config.normalize else torch.Tensor.numpy
            _embed_missing(shards, mine, batches, to_rows, out, console)
            ranks.wait()  # now all shards exist
            rows = _write_outputs(shards, manifest, out, kind, sidecars, about) if ranks.rank == 0 else 0
            rows = ranks.of_first(rows)
    return Embedded(rows, len(manifest) - rows, about["dim"], out)


def _set_arithmetic(embedder: Embedder, config: EmbedConfig, console: Console) -> None:
    """Set precision and compilation of the backbone."""
    embedder.precision = config.precision
    if config.precision == "16-mixed" and embedder.device.type != "cuda":
        console.info("precision: 16-mixed needs a GPU; embedding in full precision (32-true)")
        embedder.precision = "32-true"
    if config.compile:
        embedder.backbone.compile()


def _describe(embedder: Embedder, manifest: Manifest, console: Console) -> None:
    console.info(
        f"weights: {embedder.receipt}; {embedder.architecture}, {embedder.embedding_dim} dimensions, "
        f"{embedder.preprocessing.image_size} px"
    )
    if embedder.whitening:
        console.info("whitened with the whitening of the run (--no-whiten: raw)")
    print_summary(manifest, console)


def _refuse_outputs(
    outputs: list[str | Path], inputs: tuple[str | None, ...], resume: bool, overwrite: bool, ranks: Ranks
) -> None:
    """Raise UsageError if an output or the finished rows of a killed embed would be lost, or if there is nothing to
    resume from."""
    out = Path(outputs[0])
    left = ranks.of_first(finished_rows(out) if ranks.rank == 0 else None)
    if left and not resume and not overwrite:
        raise UsageError.on_all_ranks(
            f"{printable(out)}: an embed that was killed left {left} finished rows of it; continue with --resume, or "
            "start again with --overwrite"
        )
    if left is None and resume:
        remedy = "it is finished; --overwrite writes it again" if out.exists() else "leave --resume out"
        raise UsageError.on_all_ranks(f"{printable(out)}: nothing unfinished of it is there; {remedy}")
    for path in outputs:
        refuse_existing(path, overwrite or resume, inputs)


@contextmanager
def _open_shards(
    out: str,
    about: dict[str, Any],
    manifest: Manifest,
    batch_size: int,
    resume: bool,
    console: Console,
    ranks: Ranks,
) -> Iterator[Shards]:
    """Open the shards of `out`. All ranks write into one folder, which rank 0 makes, locks and removes."""
    shards = partial(Shards, len(manifest), batch_size, about["dim"])
    if out == "-":
        with tempfile.TemporaryFile() as file:
            yield shards(file)
    elif ranks.rank:
        yield shards(folder_of(Path(out)), ranks.of_first(""))
    else:
        threads = torch.get_num_threads()  # on which the last bits of sums of floats depend
        digest = input_digest(manifest)
        state = {**about, "batch_size": batch_size, "threads": threads, "images_or_labels": digest}
        with unfinished_folder(Path(out), state, resume, console) as (folder, mark):
            yield shards(folder, ranks.of_first(mark))


def _embed_missing(
    shards: Shards,
    block: range,
    embed: Callable[[Sequence[int]], Iterator[Batch]],
    rows_of: Callable[[torch.Tensor], np.ndarray],
    out: str,
    console: Console,
) -> None:
    """Write the shards of a block of images that are not there yet. `embed` yields the batches of a list of images."""
    missing = shards.missing(block)
    images = array("q", chain.from_iterable(missing))
    done = len(block) - len(images)
    if done:
        console.info(f"resuming: {done} of {len(block)} images are done")
    try:
        for shard, (index, vectors, unreadable) in zip(missing, embed(images), strict=True):
            try:
                shards.write(shard, index, None if vectors is None else rows_of(vectors), unreadable)
            except OSError as error:
                raise EarTeachError(
                    f"{printable(out)}: cannot be written ({error.strerror or error}); {done} of {len(block)} images are "
                    "done: make room, and continue with --resume"
                ) from error
            done += len(shard)
    except KeyboardInterrupt:
        if done and out != "-":
            console.info(f"interrupted: {done} of {len(block)} images are done; --resume continues after them")
        raise


def _write_outputs(
    shards: Shards, manifest: Manifest, out: str, kind: str, sidecars: dict[str, Path], about: dict[str, Any]
) -> int:
    """Write the outputs when all shards are there. Returns the number of rows."""
    whole = Whole(manifest, shards, shards.unreadable())
    if not len(whole):
        raise EarTeachError(
            f"{printable(manifest.source)}: not one of {len(manifest)} images could be read; nothing was written"
        )
    if out == "-":
        _to_stdout(whole, kind)
        return len(whole)
    with ExitStack() as stack:  # left in reverse: the sidecars take their names first, the embeddings last
        with open(stack.enter_context(whole_file(out)), "w+b") as file:
            _WRITERS[kind](whole, file)
        if "names" in sidecars:
            with open(stack.enter_context(whole_file(sidecars["names"])), "wb") as file:
                _write_names(whole, file)
        counts = {"rows": len(whole), "skipped": len(whole.unreadable)}
        beside = stack.enter_context(whole_file(sidecars["about"]))
        beside.write_text(json.dumps(counts | about, indent=2) + "\n", encoding="utf-8")
    return len(whole)


def _provenance(embedder: Embedder, manifest: Manifest, normalize: bool) -> dict[str, Any]:
    """Return what `out.json` says: how to read the numbers, and whether two files may be compared."""
    return {
        "dim": embedder.row_dim,
        "dtype": "float32",
        "normalized": normalize,
        "whitened": embedder.whitening is not None,
        "input": Path(manifest.source).name,
        "box_format": manifest.box_format or None,
        "weights": Path(embedder.source).name,
        "weights_sha256": embedder.sha256,
        "fingerprint": embedder.fingerprint,
        "precision": embedder.precision,
        "architecture": embedder.architecture,
        "preprocessing": embedder.preprocessing.as_dict(),
        "versions": {"earteach": __version__, **{name: version(name) for name in ("torch", "timm", "numpy", "pillow")}},
    }


def _format_of(out: str, format: str | None) -> str:
    suffix = Path(out).suffix.removeprefix(".").lower()
    if format is not None and format not in EMBEDDING_FORMATS:
        raise UsageError(f"--format {printable(format)}: not written; choose one of {', '.join(EMBEDDING_FORMATS)}")
    if out == "-":
        return format or "npy"
    if suffix not in EMBEDDING_FORMATS:
        raise UsageError(
            f"{printable(out)}: name a {', '.join('.' + f for f in EMBEDDING_FORMATS)} file, or - for stdout"
        )
    if format not in (None, suffix):
        raise UsageError(f"{printable(out)}: is named .{suffix} but --format says {format}; make them agree")
    return suffix


def _sidecars(out: str, kind: str) -> dict[str, Path]:
    """Return the files beside `x.npy`: `x.csv` with names, `x.json` with provenance. A `.csv` output includes the names."""
    if out == "-":
        return {}
    path = Path(out)
    sidecars = {"about": path.with_suffix(".json")}
    return sidecars if kind == "csv" else {**sidecars, "names": path.with_suffix(".csv")}


def _to_stdout(whole: Whole, kind: str) -> None:
    with tempfile.TemporaryFile() as file:
        _WRITERS[kind](whole, file)
        file.seek(0)
        try:
            shutil.copyfileobj(file, sys.stdout.buffer, 2**20)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader has ended; discard what is flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_npy(whole: Whole, file: IO[bytes]) -> None:
    """Write float32 [N, D]."""
    shape = (len(whole), whole.shards.dim)
    npy_format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    for rows in whole.shards.rows():
        file.write(rows.tobytes())


def _write_npz(whole: Whole, file: BinaryIO) -> None:
    """Write `embeddings` float32 [N, D], `paths` [N], `boxes` float32 [N, 4] (NaN: the whole image)."""
    manifest = whole.manifest
    paths = np.array([manifest.paths[i] for i in whole.kept])
    boxes = np.array([manifest.boxes[i] or (float("nan"),) * 4 for i in whole.kept], np.float32)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            _write_npy(whole, member)
        for name, column in (("paths", paths), ("boxes", boxes)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy_format.write_array(member, column, allow_pickle=False)


def _write_csv(whole: Whole, file: BinaryIO) -> None:
    """Write row, path, x1, y1, x2, y2, identity and side where known, then e0 ... e(D-1), each float32 in the fewest
    digits that give it back."""
    with _csv_writer(file) as writer:
        numbers = (f"e{i}" for i in range(whole.shards.dim))
        writer.writerow(["row", *_NAME_COLUMNS, *whole.labels, *numbers])
        vectors = (vector for rows in whole.shards.rows() for vector in rows)
        for row, (index, vector) in enumerate(zip(whole.kept, vectors, strict=True)):
            writer.writerow([row, *whole.name_of(index), *whole.labels_of(index), *vector.astype(str)])


def _write_names(whole: Whole, file: BinaryIO) -> None:
    """Write row, path, x1, y1, x2, y2, status, identity and side where known, of all images; row is empty, and status
    says why, where there is none."""
    with _csv_writer(file) as writer:
        writer.writerow(["row", *_NAME_COLUMNS, "status", *whole.labels])
        row = count()
        for index in range(len(whole.manifest)):
            status = whole.unreadable.get(index)
            cells = [next(row), "ok"] if status is None else ["", escape_csv(status)]
            writer.writerow([cells[0], *whole.name_of(index), cells[1], *whole.labels_of(index)])


@contextmanager
def _csv_writer(file: BinaryIO) -> Iterator[Any]:
    """Yield a csv.writer into a binary file, which stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    yield csv.writer(text)
    text.detach()  # flushes


_NAME_COLUMNS = ("path", "x1", "y1", "x2", "y2")
_WRITERS = {"npy": _write_npy, "npz": _write_npz, "csv": _write_csv}

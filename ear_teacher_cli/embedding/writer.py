"""`embed`: images in, one row of numbers per readable image out, with names and provenance beside it.

Rows stream to disk: memory does not grow with their number, and a killed `embed` goes on with `--resume`. An image
that cannot be read has no row; the list beside the embeddings says why.
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
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch

from .. import __version__
from ..config import EmbedConfig
from ..console import Console
from ..data.dataset import UnreadableImage
from ..data.manifest import Manifest, read_input, tell
from ..distributed import Ranks, joined
from ..errors import EarTeachError, UsageError
from ..files import only_writer, printable, refuse_existing, whole_file
from ..platform import usable_cores
from .embedder import Embedder, embed_images, load_embedder
from .journal import STATE, Journal, folder_of, input_mark, join_journals, parts_of, put_rows, rows_in, unfinished

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
    config: EmbedConfig,
    console: Console,
) -> Embedded:
    """Embed `source` (a folder, a manifest, an image, or `-` for paths on stdin) into `out` (a file, or `-` for stdout).

    Rows that are not normalised are not whitened either. Raises UsageError if a killed embed left finished rows and
    neither `resume` nor `overwrite` is given, EarTeachError if no image could be embedded.
    """
    weights, backbone, image_size = config.weights, config.backbone, config.image_size
    format, normalize, whiten = config.format, config.normalize, config.whiten
    root_dir, reading = config.root_dir, config.reading
    batch_size, num_workers, load_timeout = config.batch_size, config.num_workers, config.load_timeout
    resume, overwrite = config.resume, config.overwrite
    kind = _format_of(out, format)
    sidecars = _sidecars(out, kind)
    if resume and out == "-":
        raise UsageError("--resume: what went to stdout is not kept; name a file")
    with joined() as ranks:
        if ranks.world > 1 and (out == "-" or source == "-"):
            raise UsageError("-: cannot be shared by several processes; name files")
        if out != "-":
            _refuse_outputs([out, *sidecars.values()], (source, weights), resume, overwrite, ranks)
        manifest = read_input(source, root_dir, reading)
        console = Console(quiet=True) if ranks.rank else console
        embedder = load_embedder(weights, backbone, image_size, whiten and normalize)
        console.info(
            f"weights: {embedder.receipt}; {embedder.architecture}, {embedder.embedding_dim} numbers an image, "
            f"{embedder.preprocessing.image_size} px"
        )
        if embedder.whitening:
            console.info("whitened as the run fitted it (--no-whiten: raw)")
        tell(manifest, console)
        dim = embedder.whitening.matrix.shape[1] if embedder.whitening else embedder.embedding_dim
        about = _provenance(embedder, manifest, dim, normalize)
        mine = ranks.block(len(manifest), batch_size)
        part = manifest if ranks.world == 1 else manifest.subset(mine)
        going_on = resume and _has_part(out, ranks)
        if overwrite and not resume and out != "-" and ranks.rank == 0:
            _drop_other_parts(out, ranks)
        with _files(out, about, batch_size, part, going_on, console, ranks) as files:
            journal = Journal(*files, part, dim, batch_size)
            if journal.done:
                console.info(f"going on after {journal.done} of {len(part)} images")
            workers = min(num_workers, max(1, usable_cores() // ranks.local))
            try:
                for good, vectors, bad in embed_images(
                    embedder, part, batch_size, workers, load_timeout, console, journal.done
                ):
                    rows = None
                    if good:
                        rows = embedder.unit_rows(vectors, whiten) if normalize else vectors.numpy()
                    _add(journal, good, rows, bad, out)
            except KeyboardInterrupt:
                if journal.count and out != "-":
                    console.info(
                        f"interrupted: {journal.done} of {len(part)} images are kept; --resume goes on with them"
                    )
                raise
            journal.finish()
            ranks.wait()  # now all parts are whole
            count = journal.count
            if ranks.rank == 0:
                with _joined_parts(journal, out, manifest, ranks) as whole:
                    count = whole.count
                    if count == 0:
                        raise EarTeachError(
                            f"{printable(source)}: not one of {len(manifest)} images could be read; nothing was written"
                        )
                    _put(whole, out, kind, sidecars, about)
            ranks.wait()  # and so is the output: the parts may go
    return Embedded(count, len(manifest) - count, dim, out)


def _refuse_outputs(
    outputs: list[str | Path], inputs: tuple[str | None, ...], resume: bool, overwrite: bool, ranks: Ranks
) -> None:
    """Raise UsageError if something would be lost: an output, or what a killed embed has done of it."""
    out = Path(outputs[0])
    parts = parts_of(out)
    if ranks.any(bool(parts)) and not resume and not overwrite:  # asked of all before one of them writes
        held = sum(map(rows_in, parts)) or "some"
        raise UsageError.on_all_ranks(
            f"{printable(out)}: an embed that was killed left {held} finished rows of it; go on with --resume, or start "
            "anew with --overwrite"
        )
    for path in outputs:
        refuse_existing(path, overwrite or resume, inputs)


def _drop_other_parts(out: str, ranks: Ranks) -> None:
    """Remove what another number of processes left unfinished of `out`; this number's is dropped where it is opened."""
    mine = {folder_of(_part(out, replace(ranks, rank=rank))) for rank in range(ranks.world)}
    for folder in set(parts_of(Path(out))) - mine:
        with only_writer(folder) as writer:
            writer.remove_folder()


def _put(journal: Journal, out: str, kind: str, sidecars: dict[str, Path], about: dict[str, Any]) -> None:
    """Write the outputs of a finished journal of all images."""
    if out == "-":
        _to_stdout(journal, kind)
        return
    with ExitStack() as stack:  # left in reverse: the sidecars take their names first, the embeddings last
        temporary = stack.enter_context(whole_file(out))
        if kind == "npy":
            put_rows(journal.rows, temporary)
        else:
            with open(temporary, "w+b") as file:
                _WRITERS[kind](journal, file)
        if "names" in sidecars:
            shutil.copyfile(journal.names.buffer.name, stack.enter_context(whole_file(sidecars["names"])))
        figures = {"rows": journal.count, "skipped": len(journal.manifest) - journal.count}
        beside = stack.enter_context(whole_file(sidecars["about"]))
        beside.write_text(json.dumps(figures | about, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _joined_parts(journal: Journal, out: str, manifest: Manifest, ranks: Ranks) -> Iterator[Journal]:
    """All ranks' finished journals as one."""
    if ranks.world == 1:
        yield journal
        return
    parts = [folder_of(_part(out, replace(ranks, rank=rank))) for rank in range(ranks.world)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parts[0])))
        rows, names = (stack.enter_context(open(folder / name, "w+b")) for name in ("rows", "names"))
        join_journals(parts, rows, names)
        whole = Journal(rows, names, manifest, journal.dim, journal.batch_size)
        if whole.done < len(manifest):
            raise EarTeachError(
                f"{printable(out)}: {whole.done} of {len(manifest)} images are there after all are done; "
                "is its folder the same for all processes? Nothing was written"
            )
        whole.finish()
        yield whole


def _has_part(out: str, ranks: Ranks) -> bool:
    """Whether this rank has something to go on with; one that was killed at its first image has not, but others may.
    Raises UsageError if none has."""
    mine = (folder_of(_part(out, ranks)) / STATE).is_file()
    if ranks.any(mine):
        return mine
    path = Path(out)
    others = [p.name for p in path.parent.glob(f".{path.name}*.unfinished") if (p / STATE).is_file()]
    worlds = {int(name.split("-of-")[1].split(".")[0]) if "-of-" in name else 1 for name in others}
    if not worlds:
        mend = "it is finished; --overwrite writes it anew" if path.exists() else "leave --resume out"
        raise UsageError(f"{printable(out)}: there is nothing unfinished of it; {mend}")
    raise UsageError(
        f"{printable(out)}: there is nothing unfinished of it by {ranks.world} process(es); start {min(worlds)} processes, as "
        "it was"
    )


def _part(out: str, ranks: Ranks) -> Path:
    """What a rank's part of the output would be called."""
    path = Path(out)
    return path if ranks.world == 1 else path.with_name(f"{path.name}.{ranks.rank + 1}-of-{ranks.world}")


def _add(journal: Journal, good: list[int], rows: np.ndarray | None, bad: list[UnreadableImage], out: str) -> None:
    try:
        journal.add(good, rows, bad)
    except OSError as error:
        kept = f"{journal.done} of {len(journal.manifest)} images are kept: make room, and go on with --resume"
        raise EarTeachError(f"{printable(out)}: cannot be written ({error.strerror or error}); {kept}") from error


@contextmanager
def _files(
    out: str, about: dict[str, Any], batch_size: int, manifest: Manifest, resume: bool, console: Console, ranks: Ranks
) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    if out == "-":
        with tempfile.TemporaryFile() as rows, tempfile.TemporaryFile() as names:
            yield rows, names
        return
    threads = torch.get_num_threads()  # sums of floats depend on it
    state = {**about, "batch_size": batch_size, "threads": threads, "pictures_or_labels": input_mark(manifest)}
    part = _part(out, ranks)
    with unfinished(part, state, resume, console) as files:
        yield files


def _provenance(embedder: Embedder, manifest: Manifest, dim: int, normalize: bool) -> dict[str, Any]:
    """What `out.json` says: how to read the numbers, and whether two files may be compared."""
    return {
        "dim": dim,
        "dtype": "float32",
        "normalized": normalize,
        "whitened": embedder.whitening is not None,
        "input": Path(manifest.source).name,
        "box_format": manifest.box_format or None,
        "weights": Path(embedder.source).name,
        "weights_sha256": embedder.sha256,
        "fingerprint": embedder.fingerprint,
        "architecture": embedder.architecture,
        "preprocessing": embedder.preprocessing.as_dict(),
        "versions": {"earteach": __version__, **{name: version(name) for name in ("torch", "timm", "numpy", "pillow")}},
    }


def _format_of(out: str, format: str | None) -> str:
    suffix = Path(out).suffix.removeprefix(".").lower()
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format {printable(format)}: not written; choose one of {', '.join(FORMATS)}")
    if out == "-":
        return format or "npy"
    if suffix not in FORMATS:
        raise UsageError(f"{printable(out)}: name a {', '.join('.' + f for f in FORMATS)} file, or - for stdout")
    if format not in (None, suffix):
        raise UsageError(f"{printable(out)}: is named .{suffix} but --format says {format}; make them agree")
    return suffix


def _sidecars(out: str, kind: str) -> dict[str, Path]:
    """Beside `x.npy`: `x.csv` with names, `x.json` with provenance. A `.csv` holds the names itself."""
    if out == "-":
        return {}
    path = Path(out)
    sidecars = {"about": path.with_suffix(".json")}
    return sidecars if kind == "csv" else {**sidecars, "names": path.with_suffix(".csv")}


def _to_stdout(journal: Journal, kind: str) -> None:
    with tempfile.TemporaryFile() as file:
        _WRITERS[kind](journal, file)
        file.seek(0)
        try:
            shutil.copyfileobj(file, sys.stdout.buffer, 2**20)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader has all it wants; what is left to flush at exit goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_npy(journal: Journal, file: IO[bytes]) -> None:
    """float32 [N, D]."""
    journal.rows.seek(0)
    shutil.copyfileobj(journal.rows, file, 2**20)


def _write_npz(journal: Journal, file: BinaryIO) -> None:
    """`embeddings` float32 [N, D], `paths` [N], `boxes` float32 [N, 4] (NaN: the whole image)."""
    manifest = journal.manifest
    paths = np.array([manifest.paths[i] for i in journal.kept])
    boxes = np.array([manifest.boxes[i] or (float("nan"),) * 4 for i in journal.kept], np.float32)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            _write_npy(journal, member)
        for name, column in (("paths", paths), ("boxes", boxes)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, allow_pickle=False)


def _write_csv(journal: Journal, file: BinaryIO) -> None:
    """row, path, x1, y1, x2, y2, identity and side where known, then e0 ... e(D-1), each float32 in the fewest digits
    that give it back."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    numbers = (f"e{i}" for i in range(journal.dim))
    writer.writerow(["row", "path", "x1", "y1", "x2", "y2", *journal.labels, *numbers])
    for row, (index, vector) in enumerate(zip(journal.kept, journal.array(), strict=True)):
        writer.writerow([row, *journal.name_of(index), *journal.labels_of(index), *vector.astype(str)])
    text.detach()  # the file stays open: it is not ours to close


_WRITERS = {"npy": _write_npy, "npz": _write_npz, "csv": _write_csv}

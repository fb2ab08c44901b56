"""The one reader (and writer) of lists of ears, for every command.

A manifest is one row per ear: an image's path relative to a root folder, a box or none (then the image is the crop),
and, where known, identity and side. `formats/` has a module per format of list, and `formats/columns.py` the names that
columns may have. Boxes are x1, y1, x2, y2 in pixels of the upright image (EXIF orientation applied, as OpenCV does);
`corners.py` makes them so. Backslashes in paths are read as slashes. What is wrong with a single row (a box inside out,
a path that leaves the root) is kept for validate-data to report; what makes the list unreadable raises ManifestError.
"""

import os
import posixpath
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Reading
from ..console import Console
from ..errors import ImageError, ManifestError
from ..files import printable, whole_file
from .boxes import Box, Boxes
from .folder_ears import read_ears
from .formats import FORMATS
from .formats.rows import Rows
from .image_suffixes import HEIC, IMAGES
from .resolve_boxes import Corners, Files, to_pixels


@dataclass(frozen=True)
class Manifest:
    """N ears. All sequences have length N; `identities` and `sides` are None where the file has none."""

    source: str  # the file or folder it was read from, as typed
    root: Path | None  # folder the paths start from; None: paths are the user's own words (a list on stdin)
    paths: Sequence[str]
    boxes: Sequence[Box | None]
    rows: Sequence[int]  # number of the row (npy, csv, jsonl: counted from 0 without the header) or annotation
    identities: Sequence[str] | None = None
    sides: Sequence[str] | None = None
    box_format: str = ""  # the order the boxes were in in the list, and " relative" for shares; "" where there are none
    how: str = ""  # what said so, for a message
    warnings: tuple[str, ...] = ()  # of the reading, for the user
    _real_root: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.root is not None:
            object.__setattr__(self, "_real_root", os.path.realpath(self.root))

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        """`train.npy row 17 (s03/left.jpg)`, for messages."""
        return f"{printable(Path(self.source).name)} row {self.rows[index]} ({printable(self.paths[index])})"

    def side(self, index: int) -> str | None:
        """'left', 'right', or None where the row does not say (l, r, L, Right... are read as such)."""
        return side_of(self.sides[index]) if self.sides else None

    def ear(self, index: int) -> tuple[str, str | None] | None:
        """Whose ear it is, (identity, side or None), or None where the row does not say: a person's ears are two."""
        identity = self.identities[index] if self.identities else ""
        return (str(identity), self.side(index)) if identity else None

    def file(self, index: int) -> str:
        """Absolute path of the image. Raises ImageError('outside-root') if it leaves the root, also by symlink."""
        path = self.paths[index]
        if "\0" in path:
            raise ImageError("outside-root", "the path holds a NUL byte")
        if self.root is None:
            return os.path.abspath(path)
        full = os.path.realpath(os.path.join(self._real_root, path))
        if not _is_within(full, self._real_root):
            if not _is_within(os.path.normpath(os.path.join(self._real_root, path)), self._real_root):
                raise ImageError("outside-root", f"the path leaves {printable(self.root)}; see --root-dir")
            there = full.removesuffix(os.sep + os.path.normpath(path))
            mend = f"give --root-dir {printable(there)}" if there != full else "see --root-dir"
            raise ImageError("outside-root", f"a symbolic link leads out of {printable(self.root)}; {mend}")
        return full

    def summary(self) -> str:
        """`train.npy: 336 with boxes (x,y,width,height by ...), 0 whole images, 12 identities`."""
        boxes = sum(box is not None for box in self.boxes)
        people = len({identity for identity in self.identities or () if identity})
        how = f" ({self.how})" if boxes and self.how else ""
        return (
            f"{printable(self.source)}: {boxes} with boxes{how}, {len(self) - boxes} whole images, {people} identities"
        )

    def subset(self, indices: Iterable[int]) -> "Manifest":
        indices = list(indices)

        def take(column):
            return None if column is None else [column[i] for i in indices]

        return replace(
            self,
            paths=take(self.paths),
            boxes=take(self.boxes),
            rows=take(self.rows),
            identities=take(self.identities),
            sides=take(self.sides),
        )


def _is_within(path: str, folder: str) -> bool:
    """Whether a path is the folder or below it, both absolute (on Windows without regard to case)."""
    path, folder = os.path.normcase(path), os.path.normcase(folder)
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def has_drive(path: str) -> bool:
    """Whether a path of a list was absolute on Windows (`C:/...`)."""
    return re.match(r"[A-Za-z]:/", path) is not None


def side_of(word: str) -> str | None:
    """'left' or 'right' of left, l, right, r in any case; None of anything else."""
    word = word.strip().casefold()
    return {"l": "left", "r": "right"}[word[0]] if word in ("l", "r", "left", "right") else None


def read_manifest(source: str | Path, root_dir: str | Path | None = None, reading: Reading | None = None) -> Manifest:
    """Read a list, or a folder of images with or without annotations.

    `reading`: what the user says of lists that do not say it themselves. Raises ManifestError if `source` is no list,
    holds no images, or has boxes whose order is open.
    """
    source, reading = Path(source), reading or Reading()
    where = printable(source)
    if root_dir is not None and not Path(root_dir).is_dir():
        raise ManifestError(f"{printable(root_dir)}: no such folder; --root-dir must be one")
    if source.is_dir():
        return _read_folder(source, reading)
    if not source.exists():
        raise ManifestError(f"{where}: no such file or folder; give a manifest ({_suffixes()}) or a folder of images")
    suffix = source.suffix.lower()
    if suffix not in FORMATS:
        raise ManifestError(f"{where}: {source.suffix or 'no suffix'} is no manifest; give {_suffixes()} or a folder")
    if not source.is_file():  # a FIFO would wait for ever, a device never end
        raise ManifestError(f"{where}: is no regular file; save the manifest as one")
    rows = FORMATS[suffix].read(source, where, reading.identity_column)
    if not rows.paths:
        raise ManifestError(f"{where}: holds no images; nothing to do")
    root = Path(root_dir) if root_dir is not None else _find_root(source, rows.paths)
    manifest = _manifest(source, root, rows)
    corners = to_pixels(rows, Files(manifest.paths, manifest.file), reading, where)
    boxed = int(rows.boxes.given.sum())
    if 0 < boxed < len(manifest):
        rows.warnings.append(
            f"{where}: {len(manifest) - boxed} of {len(manifest)} rows have no box, and are read as whole images; remove "
            "them if they are photos"
        )
    return _with_boxes(manifest, [corners], corners.boxes, rows.warnings)


def tell(manifest: Manifest, console: Console) -> None:
    """Say what was read, and warn of what was not."""
    console.info(manifest.summary())
    for warning in manifest.warnings:
        console.warn(warning)


def _manifest(source: Path, root: Path, rows: Rows) -> Manifest:
    return Manifest(
        source=str(source),
        root=root,
        paths=rows.paths,
        boxes=rows.boxes,
        rows=rows.numbers,
        identities=rows.identities if any(rows.identities) else None,
        sides=rows.sides if any(rows.sides) else None,
    )


def _with_boxes(manifest: Manifest, corners: list[Corners], boxes: Boxes, warnings: Iterable[str]) -> Manifest:
    kinds = sorted({c.order + " relative" * (c.units == "relative") for c in corners if c.order})
    return replace(
        manifest,
        boxes=boxes,
        box_format=", ".join(kinds),
        how="; ".join(dict.fromkeys(c.how for c in corners if c.how)),
        warnings=(*warnings, *(warning for c in corners for warning in c.warnings)),
    )


def _read_folder(source: Path, reading: Reading) -> Manifest:
    """All images below a folder, sorted by path, with the boxes of its annotations."""
    there = read_ears(source, reading, lambda rows: Files(rows.paths, _manifest(source, source, rows).file))
    together = Rows()
    for number, ear in enumerate(there.ears):
        together.add(number, ear.path, ear.box, ear.identity, ear.side)
    corners = list(there.corners.values())
    return _with_boxes(_manifest(source, source, together), corners, together.boxes, there.warnings)


def named_by_folders(manifest: Manifest) -> Manifest:
    """A folder's images with the names of their folders as identities (root/identity/image.jpg; '' in the root). A
    list that names nobody stays so: its folders may be years."""
    if manifest.identities is not None or not Path(manifest.source).is_dir():
        return manifest
    names = [folder_name(path) for path in manifest.paths]
    return replace(manifest, identities=names if any(names) else None)


def folder_name(path: str) -> str:
    """`p017` of `photos/p017/left.jpg`, '' of `left.jpg`."""
    return posixpath.basename(posixpath.dirname(path.replace("\\", "/")))


def read_input(source: str, root_dir: str | None = None, reading: Reading | None = None) -> Manifest:
    """Whatever the user named, as a manifest: an image, what `read_manifest` reads, or `-` for paths on stdin.

    Raises ManifestError.
    """
    if source == "-":
        # bytes, as file names are: a name need not be text in the terminal's encoding
        paths = [os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer]
        paths = [path for path in paths if path.strip()]
        if not paths:
            raise ManifestError("stdin: holds no paths; give one image a line, as find prints them")
        return images_manifest(paths, "stdin")
    suffix = Path(source).suffix.lower()
    if suffix in IMAGES | HEIC and not Path(source).is_dir():
        if not Path(source).exists():
            raise ManifestError(f"{printable(source)}: no such file; check the path")
        return images_manifest([source], source)
    if suffix not in FORMATS and Path(source).is_file():
        raise ManifestError(
            f"{printable(source)}: neither an image nor a manifest by its name; give a folder, an image, "
            "a manifest, or - for paths on stdin"
        )
    return read_manifest(source, root_dir, reading)


def images_manifest(paths: Iterable[str], source: str) -> Manifest:
    """A manifest of whole images that the user named one by one (no root to stay in)."""
    paths = list(paths)
    return Manifest(source=source, root=None, paths=paths, boxes=[None] * len(paths), rows=range(len(paths)))


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write rows as a format that names its box format (`.npy`, `.csv`, `.jsonl`, `.parquet`), whole or not at all."""
    suffix = Path(path).suffix.lower()
    write = FORMATS[suffix].write if suffix in FORMATS else None
    if write is None:
        written = ", ".join(name for name, known in FORMATS.items() if known.write)
        raise ManifestError(f"{printable(path)}: cannot write {suffix or 'no suffix'}; name one of {written}")
    nobody = [""] * len(manifest)
    rows = zip(manifest.paths, manifest.boxes, manifest.identities or nobody, manifest.sides or nobody, strict=True)
    with whole_file(path) as temporary:
        write(temporary, rows)


def keep_rows(manifest: Manifest, indices: Iterable[int], path: str | Path, identity_column: str | None = None) -> None:
    """Write the list that `manifest` was read from with only these ears, everything else in it as it was.

    The suffix of `path` is that of the list.
    """
    places: dict[int, int] = {}
    place_of = []
    for row in manifest.rows:
        place_of.append(places.get(row, 0))
        places[row] = place_of[-1] + 1
    kept = [(manifest.rows[i], place_of[i]) for i in indices]
    with whole_file(path) as temporary:
        FORMATS[Path(path).suffix.lower()].keep(Path(manifest.source), temporary, kept, identity_column)


def _find_root(source: Path, paths: Sequence[str]) -> Path:
    """The working directory; or the manifest's folder, when of a sample of the images some are only there."""
    sample = [paths[i] for i in range(0, len(paths), max(1, len(paths) // 20)) if "\0" not in paths[i]]
    if any(os.path.exists(p) for p in sample) or not any((source.parent / p).exists() for p in sample):
        return Path(".")
    return source.parent


def _suffixes() -> str:
    return ", ".join(sorted(FORMATS))

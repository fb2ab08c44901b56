"""Read and write manifests (lists of ears), for every command.

A manifest has one row per ear: an image's path relative to a root folder, a box or none (then the whole image is the
crop), and, if known, identity and side. Boxes are x1, y1, x2, y2 in pixels of the upright image (EXIF orientation
applied, as OpenCV does). Backslashes in paths are read as slashes.

`formats/` has a module per format and the table of them (add a format there), `resolve_boxes.py` converts boxes to
corners in pixels, `folder_ears.py` reads folders. Errors of a single row (an inverted box, a path that leaves the root)
are kept for validate-data to report; an unreadable list raises ManifestError.
"""

import os
import posixpath
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..config import Reading
from ..console import Console
from ..errors import ImageError, ManifestError
from ..files import printable, whole_file
from .boxes import Box, Boxes
from .folder_ears import read_ears
from .formats import FORMATS
from .formats.rows import Rows
from .image_suffixes import HEIC, IMAGES
from .resolve_boxes import Corners, ImageSizes, to_pixels
from .texts import Texts


@dataclass(frozen=True)
class Manifest:
    """N ears. All sequences have length N; `identities` and `sides` are None if the file has none.

    They are given as any sequences, and kept in arrays (Texts, Boxes, a range or an array), about 110 bytes per row.
    """

    source: str  # the file or folder it was read from, as typed
    root: Path | None  # folder from which the paths start; None: paths were typed by the user, without a root
    paths: Sequence[str]
    boxes: Sequence[Box | None]
    rows: Sequence[int]  # number of the row (counted from 0, without a header) or of the annotation
    identities: Sequence[str] | None = None
    sides: Sequence[str] | None = None
    box_format: str = ""  # order of the boxes in the list, and " relative" for shares of the image; "" without boxes
    how: str = ""  # how that order was found, for messages
    warnings: tuple[str, ...] = ()  # from reading, for the user
    _real_root: str = field(default="", compare=False, repr=False)

    def __post_init__(self):
        columns = {name: getattr(self, name) for name in ("paths", "identities", "sides")}
        compact = {name: None if column is None else Texts.of(column) for name, column in columns.items()}
        for name, column in (compact | {"boxes": Boxes.of(self.boxes), "rows": _compact(self.rows)}).items():
            object.__setattr__(self, name, column)
        if self.root is not None:
            object.__setattr__(self, "_real_root", os.path.realpath(self.root))

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        """Return the name of a row for messages: `train.npy row 17 (s03/left.jpg)`."""
        return f"{printable(Path(self.source).name)} row {self.rows[index]} ({printable(self.paths[index])})"

    def side(self, index: int) -> str | None:
        """Return 'left', 'right', or None if the row has no side (l, r, L, Right, ... are understood)."""
        return side_of(self.sides[index]) if self.sides else None

    def ear(self, index: int) -> tuple[str, str | None] | None:
        """Return (identity, side or None), or None if the row has no identity. A person's two ears differ in the
        side."""
        identity = self.identities[index] if self.identities else ""
        return (str(identity), self.side(index)) if identity else None

    def file(self, index: int) -> str:
        """Return the absolute path of the image. Raises ImageError('outside-root') if it leaves the root, also by a
        symbolic link."""
        path = self.paths[index]
        if "\0" in path:
            raise ImageError("outside-root", "the path contains a NUL byte")
        if self.root is None:
            return os.path.abspath(path)
        full = os.path.realpath(os.path.join(self._real_root, path))
        if not _is_within(full, self._real_root):
            if not _is_within(os.path.normpath(os.path.join(self._real_root, path)), self._real_root):
                raise ImageError("outside-root", f"the path leaves {printable(self.root)}; see --root-dir")
            target_root = full.removesuffix(os.sep + os.path.normpath(path))
            advice = f"give --root-dir {printable(target_root)}" if target_root != full else "see --root-dir"
            raise ImageError("outside-root", f"a symbolic link leads out of {printable(self.root)}; {advice}")
        return full

    def summary(self) -> str:
        """Return one line: `train.npy: 336 with boxes (x,y,width,height by ...), 0 whole images, 12 identities`."""
        boxes = int(Boxes.of(self.boxes).given.sum())
        people = len({identity for identity in self.identities or () if identity})
        how = f" ({self.how})" if boxes and self.how else ""
        return (
            f"{printable(self.source)}: {boxes} with boxes{how}, {len(self) - boxes} whole images, {people} identities"
        )

    def of_whole_images(self) -> "Manifest":
        """Return a manifest of the images without boxes and sides: one row for each image, with the identity if all its
        ears have the same."""
        firsts = Texts.of(self.paths).firsts()
        rows = np.flatnonzero(firsts == np.arange(len(self)))
        images, names = self.subset(rows), self.identities
        if names is not None:
            names = Texts.of(names)
            people = names.firsts()
            several = np.zeros(len(self), dtype=bool)  # first rows of images with ears of several people
            several[firsts[people != people[firsts]]] = True
            names = Texts("" if several[row] else names[row] for row in rows)
        return replace(images, boxes=[None] * len(images), identities=names, sides=None, box_format="", how="")

    def subset(self, indices: Iterable[int]) -> "Manifest":
        """Return a manifest of these ears, in this order."""
        indices = indices if isinstance(indices, np.ndarray) else np.fromiter(indices, np.int64)

        def take(column):
            return None if column is None else Texts(column[i] for i in indices)

        return replace(
            self,
            paths=take(self.paths),
            boxes=Boxes.of(self.boxes).subset(indices),
            rows=array("q", np.asarray(self.rows, dtype=np.int64)[indices]),
            identities=take(self.identities),
            sides=take(self.sides),
        )


def _compact(numbers: Sequence[int]) -> Sequence[int]:
    """Return consecutive numbers as a range, others as an array of Python's, whose items are int."""
    if isinstance(numbers, range):
        return numbers
    numbers = array("q", numbers)
    steps = np.diff(np.frombuffer(numbers, np.int64)) if numbers else np.zeros(1)
    return range(numbers[0], numbers[-1] + 1) if (steps == 1).all() else numbers


def _is_within(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies below it. Both are absolute; on Windows case is ignored."""
    path, folder = os.path.normcase(path), os.path.normcase(folder)
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def has_drive(path: str) -> bool:
    """Whether a path is an absolute one of Windows (`C:/...`)."""
    return re.match(r"[A-Za-z]:/", path) is not None


def side_of(text: str) -> str | None:
    """Return 'left' or 'right' for left, l, right, r in any case; None for anything else."""
    return {"l": "left", "left": "left", "r": "right", "right": "right"}.get(text.strip().casefold())


def read_manifest(source: str | Path, root_dir: str | Path | None = None, reading: Reading | None = None) -> Manifest:
    """Read a list, or a folder of images with or without annotations.

    `root_dir`: folder from which the paths of a list start; by default it is found (see `_find_root`). `reading`: the
    user's options for lists that do not name order and units of their boxes, or their identities. Raises ManifestError
    if `source` is not a list, has no images, or has boxes whose order cannot be determined.
    """
    source, reading = Path(source), reading or Reading()
    where = printable(source)
    if root_dir is not None and not Path(root_dir).is_dir():
        raise ManifestError(f"{printable(root_dir)}: no such folder; give --root-dir a folder that exists")
    if source.is_dir():
        return _read_folder(source, reading)
    if not source.exists():
        raise ManifestError(f"{where}: no such file or folder; give a manifest ({_suffixes()}) or a folder of images")
    suffix = source.suffix.lower()
    if suffix not in FORMATS:
        found = printable(source.suffix) or "a file without a suffix"
        raise ManifestError(f"{where}: {found} is not a manifest; give {_suffixes()} or a folder")
    if not source.is_file():  # reading a FIFO would block, and a device may never end
        raise ManifestError(f"{where}: is not a regular file; save the manifest as one")
    rows = FORMATS[suffix].read(source, where, reading.identity_column)
    if not rows.paths:
        raise ManifestError(f"{where}: has no images; name a list with at least one")
    root = Path(root_dir) if root_dir is not None else _find_root(source, rows.paths)
    manifest = _manifest(source, root, rows)
    corners = to_pixels(rows, ImageSizes(manifest.paths, manifest.file), reading, where)
    boxed = int(rows.boxes.given.sum())
    if 0 < boxed < len(manifest):
        rows.warnings.append(
            f"{where}: {len(manifest) - boxed} of {len(manifest)} rows have no box and are read as whole images; "
            "remove them if they are photos"
        )
    return _with_boxes(manifest, [corners], corners.boxes, rows.warnings)


def print_summary(manifest: Manifest, console: Console) -> None:
    """Print what was read, and the warnings."""
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
    """Read all images below a folder, sorted by path, with the boxes of its annotations."""
    read = read_ears(source, reading, lambda rows: ImageSizes(rows.paths, _manifest(source, source, rows).file))
    rows = Rows()
    for number, ear in enumerate(read.ears):
        rows.add(number, ear.path, ear.box, ear.identity, ear.side)
    corners = list(read.corners.values())
    return _with_boxes(_manifest(source, source, rows), corners, rows.boxes, read.warnings)


def named_by_folders(manifest: Manifest) -> Manifest:
    """Use the names of a folder's subfolders as identities (root/identity/image.jpg; '' directly in the root).

    A list, and a folder whose annotations have identities, is returned unchanged: folders of a list may be anything.
    """
    if manifest.identities is not None or not Path(manifest.source).is_dir():
        return manifest
    names = Texts(map(folder_name, manifest.paths))
    return replace(manifest, identities=names if any(names) else None)


def folder_name(path: str) -> str:
    """Return the name of the folder of a path: `p017` for `photos/p017/left.jpg`, '' for `left.jpg`."""
    return posixpath.basename(posixpath.dirname(path.replace("\\", "/")))


def read_input(source: str, root_dir: str | None = None, reading: Reading | None = None) -> Manifest:
    """Read an image, a manifest or a folder (as `read_manifest`), or `-` for paths on stdin, as a manifest.

    Raises ManifestError.
    """
    if source == "-":
        # bytes: a file name need not be text in the terminal's encoding
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
        paths = Texts(path for path in lines if path.strip())
        if not paths:
            raise ManifestError("stdin: has no paths; give one path per line, as find prints them")
        return images_manifest(paths, "stdin")
    suffix = Path(source).suffix.lower()
    if suffix in IMAGES | HEIC and not Path(source).is_dir():
        if not Path(source).exists():
            raise ManifestError(f"{printable(source)}: no such file; check the path")
        return images_manifest([source], source)
    if suffix not in FORMATS and Path(source).is_file():
        raise ManifestError(
            f"{printable(source)}: is neither an image nor a manifest by its suffix; give a folder, an image, a "
            "manifest, or - for paths on stdin"
        )
    return read_manifest(source, root_dir, reading)


def images_manifest(paths: Iterable[str], source: str) -> Manifest:
    """Return a manifest of whole images that the user named one by one, without a root folder."""
    paths = Texts.of(paths)
    return Manifest(source=source, root=None, paths=paths, boxes=[None] * len(paths), rows=range(len(paths)))


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write a manifest in the format of the suffix, with the order of its boxes. A failure leaves no file behind."""
    suffix = Path(path).suffix.lower()
    write = FORMATS[suffix].write if suffix in FORMATS else None
    if write is None:
        choices = ", ".join(name for name, known in FORMATS.items() if known.write)
        found = printable(suffix) or "a file without a suffix"
        raise ManifestError(f"{printable(path)}: {found} cannot be written; choose one of {choices}")
    empty = [""] * len(manifest)
    rows = zip(manifest.paths, manifest.boxes, manifest.identities or empty, manifest.sides or empty, strict=True)
    with whole_file(path) as temporary:
        write(temporary, rows)


def keep_rows(manifest: Manifest, indices: Iterable[int], path: str | Path, identity_column: str | None = None) -> None:
    """Copy the list that `manifest` was read from with only these ears, everything else unchanged.

    `path` has the suffix of that list.
    """
    boxes_seen: dict[int, int] = {}  # row -> its boxes so far
    position = []  # of each ear's box within its row
    for row in manifest.rows:
        position.append(boxes_seen.get(row, 0))
        boxes_seen[row] = position[-1] + 1
    kept = [(manifest.rows[i], position[i]) for i in indices]
    with whole_file(path) as temporary:
        FORMATS[Path(path).suffix.lower()].keep(Path(manifest.source), temporary, kept, identity_column)


def _find_root(source: Path, paths: Sequence[str]) -> Path:
    """Return the manifest's folder if some of a sample of the images lie only there, else the working directory."""
    sample = [paths[i] for i in range(0, len(paths), max(1, len(paths) // 20)) if "\0" not in paths[i]]
    if any(os.path.exists(p) for p in sample) or not any((source.parent / p).exists() for p in sample):
        return Path(".")
    return source.parent


def _suffixes() -> str:
    return ", ".join(sorted(FORMATS))

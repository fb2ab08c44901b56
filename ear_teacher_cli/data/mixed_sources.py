"""Read a folder of mixed sources for `prepare`: every ear with the list it is from, and the files that are not read.

The readers are those of the other commands (folder_ears.py, manifest.py); here each ear also keeps its origin.
"""

import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Reading
from ..errors import ManifestError
from ..files import printable
from .boxes import Boxes
from .folder_ears import FolderEar, read_ears
from .formats.rows import Rows
from .manifest import Manifest, read_manifest
from .resolve_boxes import ImageSizes
from .texts import Texts

# Names of folders that exports make: they are not names of people.
_EXPORT_FOLDERS = frozenset(
    {"images", "imgs", "train", "training", "valid", "val", "validation", "test", "testing", "default"}
)


@dataclass
class Mixed:
    """Ears of mixed sources, sorted by path.

    `parts` and `ears.rows`: per ear, the list that it is from and its row there.
    """

    ears: Manifest
    parts: list[str]
    how: dict[str, str]  # part -> how its boxes were read; "" if it has none
    orders: dict[str, str]  # part -> order of the boxes in it; "" if it has none
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # files that may be lists, but are not read
    unmarked: list[str] = field(default_factory=list)  # images without an annotation in folders that have some
    undecodable: list[str] = field(default_factory=list)  # images that this installation cannot read

    def source(self, index: int) -> str:
        """Return the source of an ear: the top entry of its path below RAW, `.` if the image lies directly in RAW."""
        first, slash, _ = self.ears.paths[index].partition("/")
        return first if slash and first not in ("", "..") else "."

    def kind(self, index: int) -> str:
        """Return the format that an ear's box was read from: `coco`, `csv`, `pts`, `yolo`, `images`, ..."""
        part = self.parts[index].lower()
        return "coco" if part.endswith(".json") else posixpath.splitext(part)[1].lstrip(".") or part.lstrip(".")


def read_mixed(raw: str, root_dir: str | None, reading: Reading) -> Mixed:
    """Read a folder, or a list whose paths start from `root_dir` (None: as `read_manifest` finds it).

    Raises ManifestError as `read_manifest` does, and if the folder holds a list of identities that is not read.
    """
    source = Path(raw)
    if not source.is_dir():
        return _of_list(read_manifest(raw, root_dir, reading), source.name)

    def sizes_of(rows: Rows) -> ImageSizes:
        return ImageSizes(rows.paths, Manifest(raw, source, rows.paths, rows.boxes, rows.numbers).file)

    read = read_ears(source, reading, sizes_of)
    if read.found.naming:
        raise ManifestError(
            f"{printable(source / read.found.naming[0])}: is a list that names people on images here, and is not read; "
            "name the list itself instead of the folder, rename it (a .csv to *_annotations.csv), or move it elsewhere"
        )
    how = {part: corners.how for part, corners in read.corners.items()}
    orders = {part: corners.order for part, corners in read.corners.items()}
    mixed = _assembled(raw, source, read.ears, how, orders)
    mixed.warnings += read.warnings
    mixed.warnings += [warning for corners in read.corners.values() for warning in corners.warnings]
    if root_dir is not None:
        mixed.warnings.append(f"{printable(raw)}: --root-dir applies to lists only and was not used; leave it out")
    known = set(mixed.ears.paths)
    mixed.unmarked = [path for path in read.found.tree.images if path not in known]
    mixed.undecodable, mixed.unread = read.found.tree.heic, read.found.unread
    return mixed


def _of_list(manifest: Manifest, name: str) -> Mixed:
    empty = [""] * len(manifest)
    names = manifest.identities or empty, manifest.sides or empty
    columns = manifest.paths, manifest.boxes, *names, [name] * len(manifest), manifest.rows
    rows = map(FolderEar._make, zip(*columns, strict=True))
    root = manifest.root or Path()
    mixed = _assembled(manifest.source, root, rows, {name: manifest.how}, {name: manifest.box_format})
    mixed.warnings += manifest.warnings
    return mixed


def _assembled(raw: str, root: Path, rows: Iterable[FolderEar], how: dict[str, str], orders: dict[str, str]) -> Mixed:
    """Sort ears by path; those of one image keep their order."""
    real_root = os.path.realpath(root)
    ears = sorted((ear._replace(path=_plain(ear.path, real_root)) for ear in rows), key=lambda ear: ear.path)
    identities, sides = (Texts(str(getattr(ear, name)) for ear in ears) for name in ("identity", "side"))
    manifest = Manifest(
        source=raw,
        root=root,
        paths=Texts(ear.path for ear in ears),
        boxes=Boxes(ear.box for ear in ears),
        rows=[int(ear.row) for ear in ears],
        identities=identities if any(identities) else None,
        sides=sides if any(sides) else None,
        box_format="xyxy",
    )
    return Mixed(manifest, [ear.part for ear in ears], how, orders)


def _plain(path: str, real_root: str) -> str:
    """Normalise a path for comparison: from the root if it lies below it, with slashes, without `.` and `..`."""
    if "\0" not in path and os.path.isabs(path):
        full = os.path.realpath(path)
        if full.startswith(real_root.rstrip(os.sep) + os.sep):
            return os.path.relpath(full, real_root).replace(os.sep, "/")
    return posixpath.normpath(path)


def name_by_folders(found: Mixed) -> None:
    """Use names of folders as identities for ears of lists that name nobody: `p017` of `source/p017/left.jpg`, or of
    `p017/left.jpg` if no image lies deeper.

    Folders that exports make (`train`, `images`, ...) and folders that hold the list itself are not identities.
    """
    ears = found.ears
    identities = list(ears.identities or [""] * len(ears))
    naming = {part for part, identity in zip(found.parts, identities, strict=True) if identity}
    people = [_person_folders(path) for path in ears.paths]
    depth = max((len(folders) for folders in people), default=0)
    for index, folders in enumerate(people):
        inside = "/".join(folders)
        if found.parts[index] in naming or not folders or (len(folders) == 1 and depth > 1):
            continue
        if not found.parts[index].startswith(f"{inside}/"):
            identities[index] = folders[-1]
    found.ears = replace(ears, identities=identities if any(identities) else None)


def _person_folders(path: str) -> list[str]:
    """Return the folders down to the one that may be a person: `[photos, p017]` of `photos/p017/images/left.jpg`."""
    folders = posixpath.dirname(path).split("/") if "/" in path else []
    while folders and folders[-1].casefold() in _EXPORT_FOLDERS:
        folders.pop()
    return folders

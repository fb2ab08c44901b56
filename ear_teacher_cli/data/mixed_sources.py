"""What lies below a folder of mixed sources: every ear with what it was read from, and what nobody reads.

The readers are those of the other commands; here each ear also keeps the list it came from.
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
from .resolve_boxes import Files

# Folders that exports make, which are no people.
_NO_PEOPLE = frozenset(
    {"images", "imgs", "train", "training", "valid", "val", "validation", "test", "testing", "default"}
)


@dataclass
class Mixed:
    """Ears, sorted by path. `parts` and the manifest's `rows`: per ear, the list it is from and its row there."""

    ears: Manifest
    parts: list[str]
    how: dict[str, str]  # part -> how its boxes were read; "" where it has none
    orders: dict[str, str]  # part -> order of the boxes in it, "" where it has none
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # paths of files that may be lists, and are not read
    unmarked: list[str] = field(default_factory=list)  # images without a mark where others have some
    undecodable: list[str] = field(default_factory=list)  # images that this installation cannot read

    def source(self, index: int) -> str:
        """The entry directly below the folder that an ear is from; `.` for an image that lies in it itself."""
        first, slash, _ = self.ears.paths[index].partition("/")
        return first if slash and first not in ("", "..") else "."

    def kind(self, index: int) -> str:
        """`coco`, `csv`, `pts`, `yolo`, `images`, ...: the format that an ear's box was read from."""
        part = self.parts[index].lower()
        return "coco" if part.endswith(".json") else posixpath.splitext(part)[1].lstrip(".") or part.lstrip(".")


def read_mixed(raw: str, root_dir: str | None, reading: Reading) -> Mixed:
    """Read a folder, or a list whose paths start from `root_dir` (None: as `read_manifest` finds it).

    Raises ManifestError as `read_manifest` does, and for a list of people's names in the folder that is not read.
    """
    source = Path(raw)
    if not source.is_dir():
        return _of_list(read_manifest(raw, root_dir, reading), source.name)

    def files_of(rows: Rows) -> Files:
        return Files(rows.paths, Manifest(raw, source, rows.paths, rows.boxes, rows.numbers).file)

    there = read_ears(source, reading, files_of)
    if there.found.naming:
        raise ManifestError(
            f"{printable(source / there.found.naming[0])}: is a list that names people on images here, and is not read; name "
            "the list itself instead of the folder, rename it (a .csv to *_annotations.csv), or move it elsewhere"
        )
    how = {part: read.how for part, read in there.corners.items()}
    found = _assembled(raw, source, there.ears, how, {part: read.order for part, read in there.corners.items()})
    found.warnings += there.warnings
    found.warnings += [warning for read in there.corners.values() for warning in read.warnings]
    if root_dir is not None:
        found.warnings.append(f"{printable(raw)}: --root-dir is for lists, and was not used")
    known = set(found.ears.paths)
    found.unmarked = [path for path in there.found.tree.images if path not in known]
    found.undecodable, found.unread = there.found.tree.heic, there.found.unread
    return found


def _of_list(listed: Manifest, name: str) -> Mixed:
    nobody = [""] * len(listed)
    names = listed.identities or nobody, listed.sides or nobody
    columns = listed.paths, listed.boxes, *names, [name] * len(listed), listed.rows
    rows = map(FolderEar._make, zip(*columns, strict=True))
    found = _assembled(listed.source, listed.root or Path(), rows, {name: listed.how}, {name: listed.box_format})
    found.warnings += listed.warnings
    return found


def _assembled(raw: str, root: Path, rows: Iterable[FolderEar], how: dict[str, str], orders: dict[str, str]) -> Mixed:
    """Sort ears by path; those of one image stay in their order."""
    texts: dict[str, str] = {}  # equal texts are one object: a pickle's bytes depend on it

    def column(name: str) -> list[str]:
        return [texts.setdefault(text, text) for text in (str(getattr(ear, name)) for ear in ears)]

    real_root = os.path.realpath(root)
    ears = sorted((ear._replace(path=_plain(ear.path, real_root)) for ear in rows), key=lambda ear: ear.path)
    identities, sides = column("identity"), column("side")
    manifest = Manifest(
        source=raw,
        root=root,
        paths=column("path"),
        boxes=Boxes(ear.box for ear in ears),
        rows=[int(ear.row) for ear in ears],
        identities=identities if any(identities) else None,
        sides=sides if any(sides) else None,
        box_format="xyxy",
    )
    return Mixed(manifest, column("part"), how, orders)


def _plain(path: str, real_root: str) -> str:
    """A path as it is compared: from the root, with slashes, without `.` and `..` where it can be."""
    if "\0" not in path and os.path.isabs(path):
        full = os.path.realpath(path)
        if full.startswith(real_root.rstrip(os.sep) + os.sep):
            return os.path.relpath(full, real_root).replace(os.sep, "/")
    return posixpath.normpath(path)


def name_by_folders(found: Mixed) -> None:
    """Give the ears of lists that name nobody their folder's name as identity: `source/p017/left.jpg`, and
    `p017/left.jpg` where no image lies deeper.

    Folders that exports make (`train`, `images`, ...) and folders that hold the list itself are nobody.
    """
    ears = found.ears
    identities = list(ears.identities or [""] * len(ears))
    naming = {part for part, identity in zip(found.parts, identities, strict=True) if identity}
    people = [_person(path) for path in ears.paths]
    depth = max((len(folders) for folders in people), default=0)
    for index, folders in enumerate(people):
        inside = "/".join(folders)
        if found.parts[index] in naming or not folders or (len(folders) == 1 and depth > 1):
            continue
        if not found.parts[index].startswith(f"{inside}/"):
            identities[index] = folders[-1]
    found.ears = replace(ears, identities=identities if any(identities) else None)


def _person(path: str) -> list[str]:
    """`[photos, p017]` of `photos/p017/images/left.jpg`: the folders down to the one that may be a person."""
    folders = posixpath.dirname(path).split("/") if "/" in path else []
    while folders and folders[-1].casefold() in _NO_PEOPLE:
        folders.pop()
    return folders

"""What lies below a folder of mixed sources: every ear with what it was read from, and what nobody reads.

The readers are those of the other commands (`formats/`); here each ear also keeps the list it came from, and files that
look like lists but are not read are found, so that nothing is left out without a word.
"""

import os
import posixpath
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Reading
from ..errors import ManifestError
from ..files import printable
from .boxes import Boxes
from .corners import Files, to_pixels
from .formats import FORMATS, folder, pts
from .image_suffixes import HEIC, readable
from .manifest import Manifest, read_manifest

# Files of these may be lists of ears; in a folder only some names are read (formats/folder.py).
_LIST_LIKE = frozenset({*FORMATS, pts.SUFFIX, ".xml", ".tsv", ".xlsx", ".xls", ".mat"})
# Folders that exports make, which are no people.
_NO_PEOPLE = frozenset({"images", "imgs", "train", "training", "valid", "val", "validation", "test", "testing"})


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
        return "coco" if part.endswith(".coco.json") else posixpath.splitext(part)[1].lstrip(".") or part.lstrip(".")


def read_mixed(raw: str, reading: Reading, leave_out: Collection[Path] = ()) -> Mixed:
    """Read a folder, or a list. `leave_out`: files that are not to be named as unread.

    Raises ManifestError as `read_manifest` does.
    """
    if not Path(raw).is_dir():
        listed = read_manifest(raw, reading=reading)
        name = Path(raw).name
        nobody = [""] * len(listed)
        names = listed.identities or nobody, listed.sides or nobody
        listing = zip(listed.paths, listed.boxes, *names, [name] * len(listed), listed.rows, strict=True)
        found = _assembled(raw, listed.root, listing, {name: listed.how}, {name: listed.box_format})
        found.warnings += listed.warnings
        return found
    os.listdir(raw)  # os.walk says nothing of a folder that it may not read
    there = folder.read(Path(raw), reading.identity_column)
    entries: list[tuple] = []
    how, orders, warnings = {}, {}, list(there.warnings)
    for name, rows in there.parts.items():
        part = Manifest(raw, Path(raw), rows.paths, rows.boxes, rows.numbers)
        corners = to_pixels(rows, Files(part.paths, part.file), reading, f"{printable(raw)}: {name}")
        how[name], orders[name] = corners.how, corners.order
        warnings += corners.warnings
        entries += zip(
            rows.paths, corners.boxes, rows.identities, rows.sides, [name] * len(rows.paths), rows.numbers, strict=True
        )
    if not entries:
        raise ManifestError(f"{printable(raw)}: its annotations mark no ear; nothing to do")
    found = _assembled(raw, Path(raw), entries, how, orders)
    found.warnings += warnings
    _look_around(found, Path(raw), leave_out)
    return found


def _assembled(raw: str, root: Path, rows: Iterable[tuple], how: dict[str, str], orders: dict[str, str]) -> Mixed:
    """Sort rows (path, box, identity, side, part, row) by path; ears of one image stay in their order."""
    texts: dict[str, str] = {}  # equal texts are one object: a pickle's bytes depend on it

    def one(text: str) -> str:
        return texts.setdefault(text, text)

    real_root = os.path.realpath(root)
    entries = sorted(((_plain(row[0], real_root), *row[1:]) for row in rows), key=lambda entry: entry[0])
    boxes = Boxes(entry[1] for entry in entries)
    paths, identities, sides, parts = ([one(str(entry[column])) for entry in entries] for column in (0, 2, 3, 4))
    ears = Manifest(
        source=raw,
        root=root,
        paths=paths,
        boxes=boxes,
        rows=[int(entry[5]) for entry in entries],
        identities=identities if any(identities) else None,
        sides=sides if any(sides) else None,
        box_format="xyxy",
    )
    return Mixed(ears, parts, how, orders)


def _plain(path: str, real_root: str) -> str:
    """A path as it is compared: from the root, with slashes, without `.` and `..` where it can be."""
    if "\0" not in path and os.path.isabs(path):
        full = os.path.realpath(path)
        if full.startswith(real_root.rstrip(os.sep) + os.sep):
            return os.path.relpath(full, real_root).replace(os.sep, "/")
    return posixpath.normpath(path)


def _look_around(found: Mixed, raw: Path, leave_out: Collection[Path]) -> None:
    """Note what no reader took: lists of other names, images without a mark, folders that cannot be read."""
    known = set(found.ears.paths)
    left = {os.path.realpath(path) for path in leave_out}
    stems = {posixpath.splitext(path)[0] for path in known}
    for path, is_link in sorted(_walk(raw, found.warnings)):
        stem, suffix = posixpath.splitext(path)
        suffix = suffix.lower()
        if is_link:
            found.warnings.append(f"{printable(raw / path)}: a symbolic link to a folder, which is not followed")
        elif suffix in readable():
            if path not in known:
                found.unmarked.append(path)
        elif suffix in HEIC:
            found.undecodable.append(path)
        elif suffix in _LIST_LIKE and path not in found.how and not (suffix == pts.SUFFIX and stem in stems):
            if os.path.realpath(raw / path) not in left:
                found.unread.append(path)


def _walk(raw: Path, warnings: list[str]) -> Iterator[tuple[str, bool]]:
    """(path from `raw`, whether it is a link to a folder) of all files that are not hidden."""

    def unreadable(error: OSError) -> None:
        warnings.append(f"{printable(error.filename)}: cannot be read ({error.strerror}), and is left out")

    for directory, names, files in os.walk(raw, onerror=unreadable):
        names[:] = sorted(name for name in names if not name.startswith("."))  # errors come in order
        below = os.path.relpath(directory, raw).replace(os.sep, "/")
        for name in (*(n for n in names if os.path.islink(os.path.join(directory, n))), *files):
            if not name.startswith("."):
                yield (name if below == "." else f"{below}/{name}"), name in names


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

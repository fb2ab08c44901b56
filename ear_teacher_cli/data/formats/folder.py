"""A folder: every image below it, with the boxes of the annotations that lie there.

Read are COCO (any `.json` with `images` and `annotations`), `_annotations.csv` and `*_annotations.csv`, `.pts` landmarks
and YOLO's `.txt` labels. In a folder of which an image is annotated, one without annotation is a photo without a marked
ear and is left out; in a folder without any, images are crops of ears, as they are. Any other list with boxes of images
below the folder is refused: it would make whole photos of them.
"""

import posixpath
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ManifestError
from ...files import printable
from .. import image_suffixes
from . import coco, csv_table, lists, pts, yolo
from .rows import Rows
from .tree import Tree, locate, walk

_COCO, _CSV = ".coco.json", "_annotations.csv"
_LISTS = (".csv", ".npy", ".jsonl", ".json")
_READ = "in a folder, COCO .json, *_annotations.csv, .pts and YOLO labels are read"


@dataclass
class Found:
    """What a folder holds."""

    tree: Tree
    parts: dict[str, Rows] = field(default_factory=dict)  # what it was read from -> rows
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # files that may be lists or annotations
    naming: list[str] = field(default_factory=list)  # of these, lists without boxes that name people on images here
    annotated: set[str] = field(default_factory=set)  # folders of which an image has an annotation
    marked: set[str] = field(default_factory=set)  # images with an annotation


def read(folder: Path, identity_column: str | None) -> Found:
    """Read a folder. An image may be in several parts.

    Raises ManifestError if no image is below it, an annotation is not understood, or a list with boxes is not read.
    """
    found = Found(walk(folder))
    tree = found.tree
    if not tree.images:
        raise ManifestError(
            f"{printable(folder)}: holds no images ({', '.join(sorted(image_suffixes.readable()))}){_heic(tree)}; "
            "name the folder they are in"
        )
    for path in tree.files:
        _read_list(found, path, identity_column)
    _read_beside(found)
    _note_unread(found, identity_column)
    unmarked = [image for image in tree.images if image not in found.marked]
    whole = Rows()
    for image in unmarked:
        if posixpath.dirname(image) not in found.annotated:
            whole.add(0, image, None)
    if whole.paths:
        found.parts["images"] = whole
    found.warnings += [*_left_out(found, len(unmarked), whole), *tree.warnings]
    return found


def _read_list(found: Found, path: str, identity_column: str | None) -> None:
    """Read a COCO file or a table of annotations, if it is one."""
    tree, name = found.tree, path.lower()
    by_name = name.endswith((_COCO, _CSV))
    if not by_name and not name.endswith(".json"):
        return
    full = tree.root / path
    where, images = printable(full), None
    if name.endswith(".json"):
        images = lists.coco_images(full)
        if images is None and not by_name:
            return
    rows = (csv_table if name.endswith(_CSV) else coco).read(full, where, identity_column)
    names = dict.fromkeys([*rows.paths, *(images or ())])
    places = locate(tree, path, names)
    if not places:
        _refuse_lost(tree, where, names)
        if not by_name:
            found.warnings.append(f"{where}: is COCO of images that are not below {printable(tree.root)}; not read")
            return
    below = posixpath.dirname(path)

    def image_of(name: str) -> str:
        return places.get(name) or posixpath.normpath(posixpath.join(below, name))

    rows.paths = [image_of(name) for name in rows.paths]
    rows.sizes = {image_of(name): size for name, size in rows.sizes.items()}
    found.parts[path] = rows
    found.marked.update(rows.paths)
    found.annotated.update(posixpath.dirname(image) for image in places.values())
    if not places:
        found.annotated.add(below)
    found.warnings += rows.warnings


def _refuse_lost(tree: Tree, where: str, names: dict[str, None]) -> None:
    """Raise ManifestError if none of a list's paths leads to an image, and yet images of these names are there."""
    lost = next((name for name in names if tree.images_named(name)), None)
    if lost is not None:
        raise ManifestError(
            f"{where}: none of its paths leads to an image ({printable(lost)}; there is "
            f"{printable(tree.images_named(lost)[0])}); correct the paths, from its folder"
        )


def _read_beside(found: Found) -> None:
    """Read `.pts` and YOLO's labels, a file per image."""
    tree, find = found.tree, found.tree.by_stem(pts.SUFFIX)
    points = Rows(order="xyxy", units="pixels", named_by=".pts landmarks", from_points=True)
    used = set()
    for image in tree.images:
        path = find(posixpath.splitext(image)[0]) or find(image)
        if path:
            used.add(path)
            for box in pts.read_boxes(tree.root / path, printable(tree.root / path)):
                points.add(0, image, box)
    found.unread += [path for path in tree.files if path.lower().endswith(pts.SUFFIX) and path not in used]
    labels = Rows(order="cxcywh", units="relative", named_by="YOLO labels")
    of_images, warnings = yolo.read_all(tree)
    marked = found.marked.union(points.paths)
    for image, of_image in of_images.items():
        if not of_image.boxes and image in marked:
            raise ManifestError(
                f"{printable(tree.root / image)}: its YOLO labels mark no ear, but another annotation does; remove one"
            )
        for box in of_image.boxes:
            labels.add(0, image, box)
    found.marked = marked.union(of_images)
    found.annotated.update(map(posixpath.dirname, (*points.paths, *of_images)))
    found.parts |= {name: rows for name, rows in ((".pts", points), ("YOLO", labels)) if rows.paths}
    found.warnings += warnings


def _note_unread(found: Found, identity_column: str | None) -> None:
    """Note files that may be lists. Raises ManifestError for one with boxes of images that are here."""
    tree = found.tree
    images = {lists.stem_of(image) for image in tree.images}
    for path in tree.files:
        full, suffix = tree.root / path, posixpath.splitext(path)[1].lower()
        if path in found.parts or suffix not in lists.FOREIGN and suffix not in _LISTS or lists.is_own_output(full):
            continue
        one = lists.listed(full, identity_column) if suffix in _LISTS else None
        here = one is not None and (one.has_boxes or one.has_people) and bool(_located(tree, path, one.paths))
        if one and here and one.has_boxes:
            raise ManifestError(
                f"{printable(full)}: is a list with boxes of images that are here, and is not read ({_READ}); rename it (a "
                ".csv to NAME_annotations.csv), move it elsewhere, or name the list itself instead of the folder"
            )
        if one and here:
            found.naming.append(path)
        foreign = suffix in lists.FOREIGN or (suffix != ".json" and not lists.is_numbers(full))
        if here or foreign or (suffix == ".json" and lists.stem_of(path) in images):
            found.unread.append(path)
    found.unread.sort()


def _located(tree: Tree, path: str, names: list[str]) -> bool:
    try:
        return bool(locate(tree, path, dict.fromkeys(names)))
    except ManifestError:  # a name can be of several images
        return True


def _left_out(found: Found, unmarked: int, whole: Rows) -> list[str]:
    """Warnings of what is not used, and of what is used whole."""
    where, warnings = printable(found.tree.root), []
    if unmarked > len(whole.paths):
        warnings.append(
            f"{where}: {unmarked - len(whole.paths)} images have no annotation in folders that have some, and are left out"
        )
    if whole.paths and found.annotated:
        folders = Counter(posixpath.dirname(path) or "." for path in whole.paths)
        warnings.append(
            f"{where}: {len(whole.paths)} images in folders without annotations ({_some(list(folders))}) are read whole, as "
            "crops of ears; if they are photos, leave them out or annotate them"
        )
    if found.tree.heic:
        warnings.append(f"{where}: left out{_heic(found.tree)}")
    if found.unread:
        count = len(found.unread)
        warnings.append(
            f"{where}: {count} file{'s' * (count > 1)} that may be a list of ears {'were' if count > 1 else 'was'} not read "
            f"({_some(found.unread)}); {_READ}: if it marks ears, export it so, or name the list itself"
        )
    return warnings


def _some(paths: list[str], most: int = 3) -> str:
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(printable, paths[:most])) + more


def _heic(tree: Tree) -> str:
    if not tree.heic:
        return ""
    return f"; {tree.suffix_counts()} cannot be read without the extra heic (pip install 'ear-teacher-cli[heic]')"

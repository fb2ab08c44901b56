"""Read a folder: every image below it, with the boxes of the annotations that lie there.

These are COCO (any `.json` with `images` and `annotations`), `_annotations.csv` and `*_annotations.csv`, `.pts`
landmarks and `.txt` labels of YOLO. In a folder with an annotated image, images without annotation are photos without a
marked ear and are left out; in a folder without any, images are crops of ears. Any other list with boxes of images
below the folder is an error: without its boxes, whole photos would be taken as crops.
"""

import posixpath
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ManifestError
from ...files import printable
from .. import image_suffixes
from ..texts import Texts
from . import FORMATS, coco, csv_table, lists, pts, yolo
from .rows import Rows
from .tree import Tree, locate, walk

_COCO, _CSV = ".coco.json", "_annotations.csv"
_READ = "in a folder, COCO .json, *_annotations.csv, .pts and YOLO labels are read"  # for messages


@dataclass
class Found:
    """Content of a folder."""

    tree: Tree
    parts: dict[str, Rows] = field(default_factory=dict)  # path of the list, ".pts", "YOLO" or "images" -> rows
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # files that may be lists or annotations, but are not read
    naming: list[str] = field(default_factory=list)  # of these, lists without boxes that name people on images here
    annotated: set[str] = field(default_factory=set)  # folders with an annotated image
    marked: set[str] = field(default_factory=set)  # images with an annotation


def read(folder: Path, identity_column: str | None) -> Found:
    """Read a folder. An image may be in several parts.

    Raises ManifestError if it has no images, if an annotation is not understood, or if a list with boxes is not read.
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
    _read_labels(found)
    _find_unread(found, identity_column)
    unmarked = [image for image in tree.images if image not in found.marked]
    whole = Rows()
    for image in unmarked:
        if posixpath.dirname(image) not in found.annotated:
            whole.add(0, image, None)
    if whole.paths:
        found.parts["images"] = whole
    found.warnings += [*_warnings(found, len(unmarked), whole), *tree.warnings]
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
        _refuse_wrong_paths(tree, where, names)
        if not by_name:
            found.warnings.append(f"{where}: is COCO of images that are not below {printable(tree.root)}; not read")
            return
    below = posixpath.dirname(path)

    def image_of(name: str) -> str:
        return places.get(name) or posixpath.normpath(posixpath.join(below, name))

    rows.paths = Texts(map(image_of, rows.paths))
    rows.sizes = {image_of(name): size for name, size in rows.sizes.items()}
    found.parts[path] = rows
    found.marked.update(rows.paths)
    found.annotated.update(posixpath.dirname(image) for image in places.values())
    if not places:
        found.annotated.add(below)
    found.warnings += rows.warnings


def _refuse_wrong_paths(tree: Tree, where: str, names: dict[str, None]) -> None:
    """Raise ManifestError if none of a list's paths leads to an image, although images of these names exist."""
    wrong = next((name for name in names if tree.images_named(name)), None)
    if wrong is not None:
        raise ManifestError(
            f"{where}: none of its paths leads to an image ({printable(wrong)}, but there is "
            f"{printable(tree.images_named(wrong)[0])}); write paths relative to the folder of the list"
        )


def _read_labels(found: Found) -> None:
    """Read `.pts` landmarks and YOLO labels, one file per image."""
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
                f"{printable(tree.root / image)}: its YOLO labels mark no ear, but another annotation does; remove one "
                "of them"
            )
        for box in of_image.boxes:
            labels.add(0, image, box)
    found.marked = marked.union(of_images)
    found.annotated.update(map(posixpath.dirname, (*points.paths, *of_images)))
    found.parts |= {name: rows for name, rows in ((".pts", points), ("YOLO", labels)) if rows.paths}
    found.warnings += warnings


def _find_unread(found: Found, identity_column: str | None) -> None:
    """Collect files that may be lists. Raises ManifestError for one with boxes of images below the folder."""
    tree = found.tree
    images = {lists.stem_of(image) for image in tree.images}
    for path in tree.files:
        full, suffix = tree.root / path, posixpath.splitext(path)[1].lower()
        if path in found.parts or suffix not in {*lists.FOREIGN, *FORMATS} or lists.is_own_output(full):
            continue
        if suffix not in lists.INSPECTED:
            found.unread.append(path)
            continue
        listing = lists.inspect_list(full, identity_column)
        of_images_here = (
            listing is not None
            and (listing.has_boxes or listing.has_people)
            and _lists_images_of(tree, path, listing.paths)
        )
        if listing and of_images_here:
            if listing.has_boxes:
                raise ManifestError(
                    f"{printable(full)}: is a list with boxes of images that are here, and is not read ({_READ}); "
                    "rename it (a .csv to NAME_annotations.csv), move it elsewhere, or name the list itself instead "
                    "of the folder"
                )
            found.naming.append(path)
        may_be_list = lists.stem_of(path) in images if suffix == ".json" else not lists.is_numbers(full)
        if of_images_here or may_be_list:
            found.unread.append(path)
    found.unread.sort()


def _lists_images_of(tree: Tree, listing: str, names: list[str]) -> bool:
    """Whether some names in the list at `listing` mean images of the tree."""
    try:
        return bool(locate(tree, listing, dict.fromkeys(names)))
    except ManifestError:  # a name can mean several images
        return True


def _warnings(found: Found, unmarked: int, whole: Rows) -> list[str]:
    """Return warnings about images and files that are not used, and images that are read whole."""
    where, warnings = printable(found.tree.root), []
    if unmarked > len(whole.paths):
        warnings.append(
            f"{where}: {unmarked - len(whole.paths)} images have no annotation, in folders with annotations, and are "
            "left out"
        )
    if whole.paths and found.annotated:
        folders = Counter(posixpath.dirname(path) or "." for path in whole.paths)
        warnings.append(
            f"{where}: {len(whole.paths)} images in folders without annotations ({_first_few(list(folders))}) are read "
            "whole, as crops of ears; if they are photos, leave them out or annotate them"
        )
    if found.tree.heic:
        warnings.append(f"{where}: some images are left out{_heic(found.tree)}")
    if found.unread:
        count = len(found.unread)
        warnings.append(
            f"{where}: {count} file{'s' * (count > 1)} that may be a list of ears {'were' if count > 1 else 'was'} not "
            "read "
            f"({_first_few(found.unread)}); {_READ}: if it marks ears, export it in one of these formats, or name the "
            "list itself"
        )
    return warnings


def _first_few(paths: list[str], most: int = 3) -> str:
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(printable, paths[:most])) + more


def _heic(tree: Tree) -> str:
    if not tree.heic:
        return ""
    return f"; {tree.suffix_counts()} cannot be read without the extra heic (pip install 'ear-teacher-cli[heic]')"

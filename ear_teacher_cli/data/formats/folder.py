"""A folder: every image below it, with the boxes of the annotations that lie there.

Annotations are found by name: `_annotations.coco.json` (Roboflow; any `*.coco.json`), `_annotations.csv` and
`*_annotations.csv` in the folder of their images, `.pts` landmarks and YOLO's `.txt` labels one per image. In a folder
with annotations an image without one is a photo without a marked ear and is left out; in a folder without any, images
are crops of ears, as they are.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ManifestError
from ...files import printable
from .. import image_suffixes
from ..boxes import Box
from . import coco, csv_table, pts, yolo
from .rows import Rows

Reader = Callable[[Path, str, str | None], Rows]
_LISTS: dict[str, Reader] = {".coco.json": coco.read, "_annotations.csv": csv_table.read}


@dataclass
class Found:
    """What a folder holds. Paths start from it and have slashes."""

    parts: dict[str, Rows] = field(default_factory=dict)  # what it was read from -> rows
    warnings: list[str] = field(default_factory=list)


def read(folder: Path, identity_column: str | None) -> Found:
    """Read a folder. Raises ManifestError if no image is below it, or an annotation is not understood."""
    images, lists, others = _walk(folder)
    found = Found()
    if not images:
        raise ManifestError(
            f"{printable(folder)}: holds no images ({', '.join(sorted(image_suffixes.readable()))}){_unreadable(others)}; "
            "name the folder they are in"
        )
    marked: set[str] = set()  # images with an annotation
    annotated: set[str] = set()  # folders with annotations
    for path, reader in lists:
        rows = reader(folder / path, printable(folder / path), identity_column)
        below = posixpath.dirname(path)
        rows.paths = [posixpath.normpath(posixpath.join(below, name)) for name in rows.paths]
        found.parts[path] = rows
        marked.update(rows.paths)
        annotated.add(below)
        found.warnings += rows.warnings
    points = Rows(order="xyxy", units="pixels", named_by=".pts landmarks", from_points=True)
    labels = Rows(order="cxcywh", units="relative", named_by="YOLO labels")
    for image in images:
        box, boxes = _beside(folder, image)
        if image in marked and (box or boxes is not None):
            raise ManifestError(f"{printable(folder / image)}: has two annotations; remove one of them")
        if box is None and boxes is None:
            continue
        annotated.add(posixpath.dirname(image))
        marked.add(image)
        for entry in [box] if box else boxes or []:
            (points if box else labels).add(0, image, entry)
    found.parts |= {name: rows for name, rows in ((".pts", points), ("YOLO", labels)) if rows.paths}
    whole = Rows()
    unmarked = [image for image in images if image not in marked]
    for image in unmarked:
        if posixpath.dirname(image) not in annotated:
            whole.add(0, image, None)
    if whole.paths:
        found.parts["images"] = whole
    left = len(unmarked) - len(whole.paths)
    if left:
        found.warnings.append(
            f"{printable(folder)}: {left} images have no annotation in folders that have some, and are left out"
        )
    if others:
        found.warnings.append(f"{printable(folder)}: left out{_unreadable(others)}")
    return found


def _walk(folder: Path) -> tuple[list[str], list[tuple[str, Reader]], Counter]:
    """(images, lists with their readers, suffixes of images that cannot be read here); hidden files are left out."""
    images: list[str] = []
    lists: list[tuple[str, Reader]] = []
    others: Counter[str] = Counter()
    for directory, names, files in os.walk(folder):
        names[:] = sorted(n for n in names if not n.startswith("."))
        below = os.path.relpath(directory, folder).replace(os.sep, "/")
        for name in files:
            path = name if below == "." else f"{below}/{name}"
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in image_suffixes.readable():
                images.append(path)
            elif suffix in image_suffixes.HEIC:
                others[suffix] += 1
            else:
                lists += [(path, reader) for end, reader in _LISTS.items() if name.lower().endswith(end)]
    return sorted(images), sorted(lists, key=lambda entry: entry[0]), others


def _beside(folder: Path, image: str) -> tuple[Box | None, list[Box] | None]:
    """(box of its .pts file, boxes of its YOLO labels), each None where there is no such file."""
    landmarks = folder / (posixpath.splitext(image)[0] + pts.SUFFIX)
    box = pts.read_box(landmarks, printable(landmarks)) if landmarks.is_file() else None
    for path in yolo.label_paths(image):
        if (folder / path).is_file():
            boxes = yolo.read_boxes(folder / path, printable(folder / path))
            if boxes is not None:
                if box is not None:
                    raise ManifestError(f"{printable(folder / image)}: has two annotations; remove one of them")
                return None, boxes
    return box, None


def _unreadable(others: Counter) -> str:
    if not others:
        return ""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    return f"; {counts} cannot be read without the extra heic (pip install 'ear-teacher-cli[heic]')"

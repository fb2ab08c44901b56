"""Recognise files in a folder that are, or may be, lists of ears, by their content.

A folder is read by its annotations (folder.py). A list with boxes that lies there and is not read would be a mistake of
the user; `inspect_list` finds such lists.
"""

import csv
import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ManifestError
from ...files import printable
from ..npy import read_npy
from .columns import IDENTITY, PATH, compare, find_columns

# Suffixes of files of other tools that may be lists, too, but are not read.
FOREIGN = frozenset({".xml", ".tsv", ".xlsx", ".xls", ".mat"})
_HEAD_BYTES = 1 << 16
_COCO_KEYS = re.compile(rb'"(images|annotations|categories|info|licenses)"\s*:')
# Files that this package writes.
_REPORT = "prepare.json"
_BY_PREPARE = frozenset(f"{split}_teacher.{suffix}" for split in ("train", "val") for suffix in ("npy", "csv"))
_BY_EMBED = ["row", "path", "x1", "y1", "x2", "y2"]  # first columns
_BY_TRAIN = ["split", "row", "image_path", "reason", "detail"]  # columns of bad_images.csv


@dataclass(frozen=True)
class Listing:
    """A file that looks like a list."""

    paths: list[str]
    has_boxes: bool
    has_people: bool


def coco_images(path: Path) -> list[str] | None:
    """Return the paths of all images in a COCO file, also of those without annotations; None if it is not COCO."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
        if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") or not _COCO_KEYS.search(head):
            return None
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not all(isinstance(content.get(n), list) for n in ("images", "annotations")):
        return None
    images = [image.get("file_name") for image in content["images"] if isinstance(image, dict)]
    return [_with_slashes(name) for name in images if isinstance(name, str)]


def is_own_output(path: Path) -> bool:
    """Whether a file is the report of `prepare`, or a list that it wrote beside its report."""
    return path.name == _REPORT or (path.name in _BY_PREPARE and (path.parent / _REPORT).is_file())


def inspect_list(path: Path, identity_column: str | None) -> Listing | None:
    """Return what a file with a suffix of INSPECTED lists; None if it names no images.

    `identity_column`: a further name of a column with people.
    """
    try:
        return INSPECTED[path.suffix.lower()](path, identity_column)
    except (OSError, ValueError, RecursionError, csv.Error, ManifestError):
        return None


def is_numbers(path: Path) -> bool:
    """Whether a file holds output of `embed` or `train`, or an array of numbers, rather than a list."""
    if path.suffix.lower() == ".csv":
        try:
            names = _header(path)
        except (OSError, ValueError, csv.Error):
            return False
        return names[: len(_BY_EMBED)] == _BY_EMBED or names == _BY_TRAIN
    return path.suffix.lower() == ".npy" and not _holds_objects(path)


def _header(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _holds_objects(path: Path) -> bool:
    """Whether a `.npy` file holds Python objects, such as a dict, by its header."""
    try:
        with open(path, "rb") as file:
            return b"'|O'" in file.read(256)
    except OSError:
        return False


def _from_csv(path: Path, identity_column: str | None) -> Listing | None:
    if is_numbers(path):
        return None
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        if not header.casefold().startswith("sep="):  # a line that Excel writes
            file.seek(0)
        else:
            header = file.readline()
            file.seek(0)
            file.readline()
        delimiter = max(",;\t", key=header.count)
        reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=f"{delimiter} " in header)
        return _listing(reader.fieldnames or (), reader, path, identity_column)


def _from_lines(path: Path, identity_column: str | None) -> Listing | None:
    with open(path, encoding="utf-8-sig") as file:
        return _from_objects([json.loads(line) for line in file if line.strip()], path, identity_column)


def _from_json(path: Path, identity_column: str | None) -> Listing | None:
    with open(path, encoding="utf-8-sig") as file:
        if not file.read(_HEAD_BYTES).lstrip().startswith("["):
            return None
    return _from_objects(json.loads(path.read_text(encoding="utf-8-sig")), path, identity_column)


def _from_objects(objects: list, path: Path, identity_column: str | None) -> Listing | None:
    objects = [line for line in objects if isinstance(line, dict)]
    return _listing(objects[0], objects, path, identity_column) if objects else None


def _from_npy(path: Path, identity_column: str | None) -> Listing | None:
    content = read_npy(path) if _holds_objects(path) else None
    if not isinstance(content, dict):
        return None
    key = _path_key(content)
    if key is None or not isinstance(content[key], list | tuple | np.ndarray):
        return None
    return _listing(list(content), ({key: value} for value in content[key]), path, identity_column)


# Suffix -> reader of the lists that are recognised.
INSPECTED = {".csv": _from_csv, ".jsonl": _from_lines, ".json": _from_json, ".npy": _from_npy}


def _listing(names: Iterable[Any], rows: Iterable[dict], path: Path, identity_column: str | None) -> Listing | None:
    """Return what rows with these names of columns list; None if no name means a path."""
    names = [name for name in names if isinstance(name, str)]
    key = _path_key(names)
    if key is None:
        return None
    try:
        columns = find_columns(names, printable(path))
        has_boxes = bool(columns.four or columns.box or columns.keypoints)
    except ManifestError:  # two boxes, or part of one
        has_boxes = True
    people = {compare(name) for name in (*IDENTITY, identity_column) if name}
    has_people = any(compare(name) in people for name in names)
    return Listing([_with_slashes(v) for row in rows if isinstance(v := row.get(key), str)], has_boxes, has_people)


def _path_key(names: Iterable[Any]) -> str | None:
    known = {compare(name): name for name in names}
    return next((known[compare(name)] for name in PATH if compare(name) in known), None)


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")


def stem_of(path: str) -> str:
    """Return a path without its suffix, in a form that ignores case."""
    return posixpath.splitext(path)[0].casefold()

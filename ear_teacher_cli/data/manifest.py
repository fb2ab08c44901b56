"""The one reader (and writer) of lists of ears, for every command.

A manifest is one row per ear: a picture's path relative to a root folder, a box or none (then the picture
is the crop), and, where known, identity and side. It is read from

    x.npy      the seed's: a pickled dict of `image_paths`, `bboxes` (N x 4, or a list of boxes per picture),
               optional `identities`, `sides`
    x.csv      image_path[,x1,y1,x2,y2][,identity][,side]
    x.jsonl    {"image_path": ..., "bbox": [x1, y1, x2, y2], "identity": ..., "side": ...} per line
    x.json     COCO: `images`, `annotations` with bbox [x, y, width, height]
    folder     every picture below it, sorted by name

Boxes are x1, y1, x2, y2 in pixels of the upright picture (EXIF orientation applied, as OpenCV does).
Backslashes in paths are read as slashes. What is wrong with a single row (a box inside out, a path that
leaves the root) is kept for validate-data to report; what makes the list unreadable raises ManifestError.
"""

import csv
import json
import math
import os
import posixpath
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ManifestError, PictureError
from ..files import brief, cell, printable, uncell, whole_file
from .npy import read_npy

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".ppm", ".pgm"}
)
MANIFEST_SUFFIXES = frozenset({".npy", ".csv", ".jsonl", ".json"})
Box = tuple[float, float, float, float]


class Boxes(Sequence):
    """A million boxes or Nones in 33 bytes each, where a list of tuples takes 192."""

    def __init__(self):
        self._corners, self._given = array("d"), bytearray()  # NaN is no sign of None: a file may hold NaN

    def append(self, box: Box | None) -> None:
        self._corners.extend(box or (0.0,) * 4)
        self._given.append(box is not None)

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return tuple(self._corners[4 * index : 4 * index + 4]) if self._given[index] else None


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
        """Absolute path of the picture. Raises PictureError('outside-root') if it leaves the root, also by symlink."""
        path = self.paths[index]
        if "\0" in path:
            raise PictureError("outside-root", "the path holds a NUL byte")
        if self.root is None:
            return os.path.abspath(path)
        full = os.path.realpath(os.path.join(self._real_root, path))
        if not _is_within(full, self._real_root):
            if not _is_within(os.path.normpath(os.path.join(self._real_root, path)), self._real_root):
                raise PictureError("outside-root", f"the path leaves {printable(self.root)}; see --root-dir")
            there = full.removesuffix(os.sep + os.path.normpath(path))
            mend = f"give --root-dir {printable(there)}" if there != full else "see --root-dir"
            raise PictureError("outside-root", f"a symbolic link leads out of {printable(self.root)}; {mend}")
        return full

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


def read_manifest(source: str | Path, root_dir: str | Path | None = None) -> Manifest:
    """Read a manifest file or a folder of crops. Raises ManifestError if it is not one, or is empty."""
    source = Path(source)
    where = printable(source)
    if root_dir is not None and not Path(root_dir).is_dir():
        raise ManifestError(f"{printable(root_dir)}: no such folder; --root-dir must be one")
    if source.is_dir():
        return _read_folder(source)
    if not source.exists():
        raise ManifestError(f"{where}: no such file or folder; give a manifest ({_suffixes()}) or a folder of crops")
    readers = {".npy": _read_seed, ".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_coco}
    if source.suffix.lower() not in readers:
        raise ManifestError(f"{where}: {source.suffix or 'no suffix'} is no manifest; give {_suffixes()} or a folder")
    if not source.is_file():  # a FIFO would wait for ever, a device never end
        raise ManifestError(f"{where}: is no regular file; save the manifest as one")
    columns = readers[source.suffix.lower()](source, where)
    if not columns.paths:
        raise ManifestError(f"{where}: holds no pictures; nothing to do")
    root = Path(root_dir) if root_dir is not None else _find_root(source, columns.paths)
    return Manifest(
        source=str(source),
        root=root,
        paths=columns.paths,
        boxes=columns.boxes,
        rows=columns.rows,
        identities=columns.identities if any(columns.identities) else None,
        sides=columns.sides if any(columns.sides) else None,
    )


def named_by_folders(manifest: Manifest) -> Manifest:
    """A folder's pictures with the names of their folders as identities (root/identity/picture.jpg; '' in the root). A
    list that names nobody stays so: its folders may be years."""
    if manifest.identities is not None or not Path(manifest.source).is_dir():
        return manifest
    names = [folder_name(path) for path in manifest.paths]
    return replace(manifest, identities=names if any(names) else None)


def folder_name(path: str) -> str:
    """`p017` of `photos/p017/left.jpg`, '' of `left.jpg`."""
    return posixpath.basename(posixpath.dirname(path.replace("\\", "/")))


def read_input(source: str, root_dir: str | None = None) -> Manifest:
    """Whatever the user named, as a manifest: a picture, what `read_manifest` reads, or `-` for paths on stdin.

    Raises ManifestError.
    """
    if source == "-":
        # bytes, as file names are: a name need not be text in the terminal's encoding
        paths = [os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer]
        paths = [path for path in paths if path.strip()]
        if not paths:
            raise ManifestError("stdin: holds no paths; give one picture a line, as find prints them")
        return pictures_manifest(paths, "stdin")
    suffix = Path(source).suffix.lower()
    if suffix in PICTURE_SUFFIXES and not Path(source).is_dir():
        if not Path(source).exists():
            raise ManifestError(f"{printable(source)}: no such file; check the path")
        return pictures_manifest([source], source)
    if suffix not in MANIFEST_SUFFIXES and Path(source).is_file():
        raise ManifestError(
            f"{printable(source)}: neither a picture nor a manifest by its name; give a folder, a picture, "
            "a manifest, or - for paths on stdin"
        )
    return read_manifest(source, root_dir)


def pictures_manifest(paths: Iterable[str], source: str) -> Manifest:
    """A manifest of whole pictures that the user named one by one (no root to stay in)."""
    paths = list(paths)
    return Manifest(source=source, root=None, paths=paths, boxes=[None] * len(paths), rows=range(len(paths)))


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write rows as `.npy` (the seed's dict), `.csv` or `.jsonl`, whole or not at all."""
    suffix = Path(path).suffix.lower()
    writers = {".npy": _write_seed, ".csv": _write_csv, ".jsonl": _write_jsonl}
    if suffix not in writers:
        raise ManifestError(
            f"{printable(path)}: cannot write {suffix or 'no suffix'}; name a .npy, .csv or .jsonl file"
        )
    with whole_file(path) as temporary:
        writers[suffix](manifest, temporary)


_LONGEST = 4096  # what Linux takes for a path


@dataclass
class _Columns:
    paths: list[str] = field(default_factory=list)
    boxes: Boxes = field(default_factory=Boxes)
    rows: array = field(default_factory=lambda: array("q"))
    identities: list[str] = field(default_factory=list)
    sides: list[str] = field(default_factory=list)

    def add(self, row: int, path: str, box: Box | None, identity: Any = "", side: Any = "") -> None:
        texts = path, _label(identity), _label(side)
        if max(map(len, texts)) > _LONGEST:
            raise ManifestError(f"row {row}: holds a path or a name of over {_LONGEST} characters; mend it")
        self.rows.append(row)
        self.paths.append(path.replace("\\", "/"))
        self.boxes.append(box)
        self.identities.append(texts[1])
        self.sides.append(texts[2])


def _read_folder(folder: Path) -> Manifest:
    found = []
    for directory, names, files in os.walk(folder):
        names[:] = sorted(n for n in names if not n.startswith("."))
        found += [os.path.join(directory, f) for f in files if _is_picture_name(f)]
    if not found:
        raise ManifestError(
            f"{printable(folder)}: holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}); name the folder they are in"
        )
    paths = sorted(os.path.relpath(f, folder).replace(os.sep, "/") for f in found)
    return Manifest(source=str(folder), root=folder, paths=paths, boxes=[None] * len(paths), rows=range(len(paths)))


def _is_picture_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _read_seed(path: Path, where: str) -> _Columns:
    content = read_npy(path)
    if not isinstance(content, dict):
        raise ManifestError(f"{where}: holds {type(content).__name__}, not a dict; save {{'image_paths', 'bboxes'}}")
    if "image_paths" not in content:
        raise ManifestError(f"{where}: has no 'image_paths' (found: {_names(content)}); save it with that key")
    paths = _as_list(content["image_paths"], "image_paths", where)
    boxes = content.get("bboxes")
    boxes = [None] * len(paths) if boxes is None else _as_list(boxes, "bboxes", where)
    identities = _optional(content, "identities", len(paths), where)
    sides = _optional(content, "sides", len(paths), where)
    _same_length(where, image_paths=paths, bboxes=boxes, identities=identities, sides=sides)
    columns = _Columns()
    for row, (name, entry) in enumerate(zip(paths, boxes, strict=True)):
        name = _path_text(name, where, row)
        several = _boxes_of(entry, where, row)
        people, sideses = _per_box(identities[row], several), _per_box(sides[row], several)
        for box, identity, side in zip(several, people, sideses, strict=True):
            columns.add(row, name, box, identity, side)
    return columns


def _read_csv(path: Path, where: str) -> _Columns:
    columns = _Columns()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            path_key = _path_key(reader.fieldnames or [], where)
            with_boxes = {"x1", "y1", "x2", "y2"} & set(reader.fieldnames)
            if with_boxes and len(with_boxes) < 4:
                raise ManifestError(f"{where}: has {_names(with_boxes)} only; a box needs x1, y1, x2, y2")
            for row, line in enumerate(reader):
                if None in line or None in line.values():
                    raise ManifestError(
                        f"{where} line {reader.line_num}: not as many cells as the header; mend the line"
                    )
                corners = [line[k] for k in ("x1", "y1", "x2", "y2")] if with_boxes else [""]
                box = _box(corners, where, row) if any(c.strip() for c in corners) else None
                labels = (uncell(line.get(name) or "") for name in ("identity", "side"))
                columns.add(row, line[path_key], box, *labels)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{where}: not readable as CSV ({brief(error)}); save it as UTF-8") from error
    return columns


def _read_jsonl(path: Path, where: str) -> _Columns:
    columns = _Columns()
    try:
        with open(path, encoding="utf-8-sig") as file:
            for row, text in enumerate(file):
                if not text.strip():
                    continue
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ManifestError(f'{where} line {row + 1}: is no object; write {{"image_path": ...}}')
                name = _path_text(line[_path_key(line, f"{where} line {row + 1}")], where, row)
                for box in _boxes_of(line.get("bbox", line.get("bboxes")), where, row):
                    columns.add(row, name, box, line.get("identity"), line.get("side"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{where}: not readable as JSON Lines ({brief(error)}); one object a line, UTF-8"
        ) from error
    return columns


def _read_coco(path: Path, where: str) -> _Columns:
    """COCO detection: rows are annotations in file order. Annotations of other things than ears are not told apart."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not readable as JSON ({brief(error)}); save it as UTF-8") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ManifestError(f"{where}: has no 'images' and 'annotations'; a .json manifest is COCO (else use .jsonl)")
    columns = _Columns()
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for row, mark in enumerate(content["annotations"]):
            if mark["image_id"] not in names:
                raise ManifestError(f"{where} annotation {row}: image_id {mark['image_id']} is not in 'images'")
            x, y, width, height = _box(mark["bbox"], where, row)
            name = _path_text(names[mark["image_id"]], where, row)
            columns.add(row, name, (x, y, x + width, y + height), mark.get("identity"), mark.get("side"))
    except (KeyError, TypeError) as error:
        raise ManifestError(
            f"{where}: is not COCO ({type(error).__name__}: {error}); see cocodataset's format"
        ) from error
    return columns


def _find_root(source: Path, paths: Sequence[str]) -> Path:
    """The working directory; or the manifest's folder, when of a sample of the pictures some are only there."""
    sample = [paths[i] for i in range(0, len(paths), max(1, len(paths) // 20)) if "\0" not in paths[i]]
    if any(os.path.exists(p) for p in sample) or not any((source.parent / p).exists() for p in sample):
        return Path(".")
    return source.parent


def _boxes_of(entry: Any, where: str, row: int) -> list[Box | None]:
    """One row's boxes: None, four numbers, or a list of such fours."""
    if entry is None:
        return [None]
    if isinstance(entry, np.ndarray):
        entry = entry.tolist()
    if isinstance(entry, list | tuple) and entry and isinstance(entry[0], list | tuple | np.ndarray):
        return [_box(box, where, row) for box in entry]
    if isinstance(entry, list | tuple) and not entry:
        return []  # a picture in which no ear was marked
    return [_box(entry, where, row)]


def _box(entry: Any, where: str, row: int) -> Box:
    """Four numbers (NaN and any order allowed here: validate-data reports those with the picture at hand)."""
    try:
        x1, y1, x2, y2 = (float(v) for v in entry)
    except (TypeError, ValueError):
        raise ManifestError(f"{where} row {row}: box {printable(entry)[:80]} is not four numbers; mend it") from None
    return x1, y1, x2, y2


def _as_list(value: Any, name: str, where: str) -> list:
    if isinstance(value, np.ndarray) and value.ndim >= 1:
        return list(value) if value.dtype == object else value.tolist()
    if isinstance(value, list | tuple):
        return list(value)
    raise ManifestError(f"{where}: '{name}' is {type(value).__name__}; save an array or a list")


def _optional(content: dict, name: str, length: int, where: str) -> list:
    return [""] * length if content.get(name) is None else _as_list(content[name], name, where)


def _same_length(where: str, **columns: list) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ManifestError(f"{where}: lengths disagree ({found}); every picture needs one entry in each")


def _per_box(label: Any, boxes: list) -> list:
    """Labels of one picture's boxes: one each if a list of that length is given, else the same for all."""
    if isinstance(label, list | tuple | np.ndarray) and len(label) == len(boxes):
        return list(label)
    return [label] * len(boxes)


def _path_text(value: Any, where: str, row: int) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f"{where} row {row}: path is {printable(repr(value))[:80]}; give a text")
    return str(value)


def _path_key(names: Iterable[str], where: str) -> str:
    names = list(names)
    for name in ("image_path", "image_paths", "path", "file_name"):
        if name in names:
            return name
    raise ManifestError(f"{where}: has no image_path (found: {_names(names)}); name the column image_path")


def _label(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _names(keys: Iterable) -> str:
    return printable(", ".join(sorted(map(str, keys)))[:120]) or "nothing"


def _suffixes() -> str:
    return ", ".join(sorted(MANIFEST_SUFFIXES))


def _write_seed(manifest: Manifest, path: Path) -> None:
    content: dict[str, Any] = {"image_paths": np.array(manifest.paths, dtype=object)}
    if any(box is not None for box in manifest.boxes):
        if all(box is not None for box in manifest.boxes):
            content["bboxes"] = np.array(manifest.boxes, dtype=np.float64)
        else:  # some rows without a box: one entry per picture
            content["bboxes"] = [box if box is None else list(box) for box in manifest.boxes]
    for name, column in (("identities", manifest.identities), ("sides", manifest.sides)):
        if column is not None:
            content[name] = np.array(column, dtype=object)
    with open(path, "wb") as file:
        np.save(file, np.array(content, dtype=object))


def _write_csv(manifest: Manifest, path: Path) -> None:
    for i, name in enumerate(manifest.paths):
        if printable("".join([name, *_labels(manifest, i)])) != "".join([name, *_labels(manifest, i)]):
            raise ManifestError(f"{manifest.where(i)}: its control characters cannot go into CSV; write .npy or .jsonl")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "x1", "y1", "x2", "y2", "identity", "side"])
        for i, name in enumerate(manifest.paths):
            box = manifest.boxes[i] or ("",) * 4
            same = name if cell(name) == name else f"./{name}"  # the same path, and no formula
            writer.writerow([same, *box, *map(cell, _labels(manifest, i))])


def _write_jsonl(manifest: Manifest, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for i, name in enumerate(manifest.paths):
            line: dict[str, Any] = {"image_path": name}
            if manifest.boxes[i] is not None:
                line["bbox"] = list(manifest.boxes[i])
            line |= {k: v for k, v in zip(("identity", "side"), _labels(manifest, i), strict=True) if v}
            file.write(json.dumps(line) + "\n")


def _labels(manifest: Manifest, index: int) -> tuple[str, str]:
    identity = manifest.identities[index] if manifest.identities is not None else ""
    return identity, manifest.sides[index] if manifest.sides is not None else ""

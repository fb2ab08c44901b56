"""Match rows of embeddings with identities: the rows that files have in common, their labels, and which are left out.

`left_out`: reason -> count, filled in by these functions. Rows are lists of row numbers, one list per file, of equal
length.
"""

import hashlib
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import Reading
from ..console import Console
from ..data.boxes import Box
from ..data.manifest import Manifest, folder_name, print_summary, read_manifest, side_of
from ..embedding.files import Embeddings
from ..errors import EarTeachError, ManifestError
from ..files import printable

_BLOCK = 4096


def common_rows(files: Sequence[Embeddings], left_out: dict[str, int], console: Console) -> list[list[int]]:
    """Return for each file the rows that all files have, in the order of the first; a repeated path and box is left out.

    Raises EarTeachError if the files have no image in common.
    """
    tables: list[dict[tuple, int]] = []
    for file in files:
        first: dict[tuple, int] = {}
        for row, (path, box) in enumerate(zip(file.paths, file.boxes, strict=True)):
            first.setdefault((_path(path), _box(box)), row)
        tables.append(first)
    again = max(len(file) - len(first) for file, first in zip(files, tables, strict=True))
    keys = [key for key in tables[0] if all(key in first for first in tables)]
    if not keys:
        raise EarTeachError(
            f"--compare: {printable(files[0].source)} and {printable(files[1].source)} have no image in common (by "
            "path and box); embed one list with both"
        )
    _leave_out(left_out, "same path and box", again, "rows repeat the path and box of an earlier row", console)
    lost = max(len(first) for first in tables) - len(keys)
    _leave_out(left_out, "in one file only", lost, "images are in one of the files only", console)
    return [[first[key] for key in keys] for first in tables]


def labels_of(
    files: Sequence[Embeddings],
    rows: Sequence[list[int]],
    labels: str | None,
    root_dir: str | None,
    reading: Reading | None,
    console: Console,
) -> tuple[list[str], list[str] | None, Path | None]:
    """Return the person ('' where unknown) and side of each common row, and the folder of the list's images.

    `labels`: a list with identities; None: the identities in the embeddings' own list, else the names of the images'
    folders. Raises ManifestError if none of these has identities.
    """
    file, own = files[0], rows[0]
    if labels is not None:
        manifest = read_manifest(labels, root_dir, reading)
        print_summary(manifest, console)
        if manifest.identities is None:
            raise ManifestError(f"{printable(labels)}: has no identities; give a list with a column 'identity'")
        return *_matched(file, own, manifest), manifest.root
    for known, places in zip(files, rows, strict=True):
        if known.identities is not None:
            sides = None if known.sides is None else [known.sides[i] for i in places]
            return [known.identities[i] for i in places], sides, None
    people = [folder_name(_path(file.paths[i])) for i in own]
    if not any(people):
        raise ManifestError(
            f"{printable(file.source)}: neither it nor the folders of its images give identities; give LABELS (a CSV with image_path, identity, side)"
        )
    example = next(i for i, person in enumerate(people) if person)
    console.info(
        f"identities: the names of the images' folders ({printable(file.paths[own[example]])}: {printable(people[example])})"
    )
    return people, None, None


def _matched(file: Embeddings, own: Sequence[int], manifest: Manifest) -> tuple[list[str], list[str] | None]:
    """Return the labels of rows by path, and by box where both have one.

    A row without a box, of an image on which several people are, has no label. Raises ManifestError if no row matches.
    """
    identities = manifest.identities or [""] * len(manifest)
    known: dict[str, list[tuple[Box | None, str, str]]] = defaultdict(list)
    for i, path in enumerate(manifest.paths):
        side = manifest.sides[i] if manifest.sides is not None else ""
        known[_path(path)].append((_box(manifest.boxes[i]), identities[i], side))
    people, sides = [], []
    for i in own:
        box = _box(file.boxes[i])
        entries = known.get(_path(file.paths[i]), [])
        found = {entry[1:] for entry in entries if None in (box, entry[0]) or entry[0] == box}
        person, side = found.pop() if len(found) == 1 else ("", "")
        people.append(person)
        sides.append(side)
    if not any(people):
        raise ManifestError(
            f"{printable(manifest.source)}: has none of the {len(own)} images of {printable(file.source)} "
            f"({printable(file.paths[own[0]])}, ...); write paths and boxes in the same way in both"
        )
    return people, sides if manifest.sides is not None else None


def labelled_rows(
    rows: list[list[int]], people: list[str], sides: list[str] | None, left_out: dict[str, int], console: Console
) -> tuple[list[list[int]], list[str], list[str] | None]:
    """Return only the rows with a known person and, where sides are known, a known side."""
    kept = [i for i, person in enumerate(people) if person]
    _leave_out(left_out, "no identity", len(people) - len(kept), "images have no identity", console)
    if sides is not None:
        sides = [side_of(side) or "" for side in sides]
        sided = [i for i in kept if sides[i]]
        if sided:
            lost = len(kept) - len(sided)
            _leave_out(
                left_out,
                "no side",
                lost,
                "images have a side other than left or right (--no-sides keeps them)",
                console,
            )
            kept = sided
        else:
            sides = None
            console.warn("sides: no value is left or right (or l, r); each person is one identity")
    return [[own[i] for i in kept] for own in rows], [people[i] for i in kept], sides and [sides[i] for i in kept]


def distinct_rows(
    files: Sequence[Embeddings],
    rows: list[list[int]],
    people: list[str],
    sides: list[str] | None,
    left_out: dict[str, int],
    console: Console,
) -> tuple[list[list[int]], list[str], list[str] | None]:
    """Leave out rows that equal an earlier row of the same identity: copies of one image.

    Equal rows of different identities stay, because a wrong label or a collapsed model must affect the metrics.
    """
    again, conflicting = set(), set()
    for file, own in zip(files, rows, strict=True):
        seen: dict[bytes, set] = defaultdict(set)
        for start in range(0, len(own), _BLOCK):
            block = np.ascontiguousarray(file.rows[own[start : start + _BLOCK]])
            _check_rows(file, own[start : start + _BLOCK], block)
            for i, numbers in enumerate(block, start):
                who = (people[i], sides[i] if sides else "")
                holders = seen[hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()]
                if who in holders:
                    again.add(i)
                elif holders:
                    conflicting.add(i)
                holders.add(who)
    if conflicting:
        console.warn(
            f"{len(conflicting)} images have the same embedding as an image of another identity: one image with two labels, or "
            "a collapsed model; they are kept"
        )
    _leave_out(
        left_out,
        "same numbers",
        len(again),
        "duplicates have the same embedding as another image of their identity",
        console,
    )
    kept = [i for i in range(len(people)) if i not in again]
    return [[own[i] for i in kept] for own in rows], [people[i] for i in kept], sides and [sides[i] for i in kept]


def _check_rows(file: Embeddings, own: Sequence[int], block: np.ndarray) -> None:
    for what, bad in (("NaN or infinity", ~np.isfinite(block).all(1)), ("zeros only", ~block.any(1))):
        if bad.any():
            raise EarTeachError(f"{file.where(own[int(bad.argmax())])}: holds {what}; embed again, or drop the row")


def _leave_out(left_out: dict[str, int], reason: str, count: int, what: str, console: Console) -> None:
    left_out[reason] = count
    if count:
        console.warn(f"{count} {what}; left out")


def _path(path: str) -> str:
    """Normalise a path as in a CSV file: control characters escaped, forward slashes."""
    return posixpath.normpath(printable(path).replace("\\", "/"))


def _box(box: Box | None) -> Box | None:
    """Round a box to float32: files hold boxes as text, float64 or float32."""
    if box is None:
        return None
    x1, y1, x2, y2 = (float(np.float32(value)) for value in box)
    return x1, y1, x2, y2

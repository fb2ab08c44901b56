"""Who is on which row of embeddings: rows that files share, their labels, and what is left out, which is counted and said.

`left_out`: reason -> count, filled in. Rows are lists of places, one list per file, all of one length.
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
    """For each file its rows that all files have, in the first one's order. A path and box met again is a duplicate."""
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
    _leave_out(left_out, "same path and box", again, "rows with a path and box met before", console)
    lost = max(len(first) for first in tables) - len(keys)
    _leave_out(left_out, "in one file only", lost, "images that only one of the files has", console)
    return [[first[key] for key in keys] for first in tables]


def labels_of(
    files: Sequence[Embeddings],
    rows: Sequence[list[int]],
    labels: str | None,
    root_dir: str | None,
    reading: Reading | None,
    console: Console,
) -> tuple[list[str], list[str] | None, Path | None]:
    """Person ('' where unknown) and side of each common row, and the folder the list's images are in."""
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
            f"{printable(file.source)}: neither it nor its images' folders say who is on them; give LABELS (CSV of image_path, identity, side)"
        )
    example = next(i for i, person in enumerate(people) if person)
    console.info(
        f"identities: the names of the images' folders ({printable(file.paths[own[example]])}: {printable(people[example])})"
    )
    return people, None, None


def _matched(file: Embeddings, own: Sequence[int], manifest: Manifest) -> tuple[list[str], list[str] | None]:
    """Labels by path; by box too where both have one. An image of several people without a box stays unknown."""
    known: dict[str, list[tuple[Box | None, str, str]]] = defaultdict(list)
    for i, path in enumerate(manifest.paths):
        side = manifest.sides[i] if manifest.sides is not None else ""
        known[_path(path)].append((_box(manifest.boxes[i]), manifest.identities[i], side))
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
            f"{printable(manifest.source)}: names none of the {len(own)} images of {printable(file.source)} "
            f"({printable(file.paths[own[0]])}, ...); paths must be written alike in both, and boxes be the same"
        )
    return people, sides if manifest.sides is not None else None


def labelled_rows(
    rows: list[list[int]], people: list[str], sides: list[str] | None, left_out: dict[str, int], console: Console
) -> tuple[list[list[int]], list[str], list[str] | None]:
    """Only rows of known person and, where sides are known, side."""
    kept = [i for i, person in enumerate(people) if person]
    _leave_out(left_out, "no identity", len(people) - len(kept), "images without an identity", console)
    if sides is not None:
        sides = [side_of(side) or "" for side in sides]
        sided = [i for i in kept if sides[i]]
        if sided:
            lost = len(kept) - len(sided)
            _leave_out(
                left_out, "no side", lost, "images whose side is not left or right (--no-sides keeps them)", console
            )
            kept = sided
        else:
            sides = None
            console.warn("sides: none is left or right (or l, r); the person is the identity")
    return [[own[i] for i in kept] for own in rows], [people[i] for i in kept], sides and [sides[i] for i in kept]


def distinct_rows(
    files: Sequence[Embeddings],
    rows: list[list[int]],
    people: list[str],
    sides: list[str] | None,
    left_out: dict[str, int],
    console: Console,
) -> tuple[list[list[int]], list[str], list[str] | None]:
    """Without rows whose numbers are those of an earlier row of the same identity: the same image under two names.

    The same numbers under two identities stay: they are a wrong label, or a collapsed model, and must be seen.
    """
    again, impostors = set(), set()
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
                    impostors.add(i)
                holders.add(who)
    if impostors:
        console.warn(
            f"{len(impostors)} images have exactly the numbers of another identity's: one image under two labels, or "
            "a collapsed model; they stay in"
        )
    _leave_out(
        left_out, "same numbers", len(again), "duplicates (the very numbers of another image of the identity)", console
    )
    kept = [i for i in range(len(people)) if i not in again]
    return [[own[i] for i in kept] for own in rows], [people[i] for i in kept], sides and [sides[i] for i in kept]


def _check_rows(file: Embeddings, own: Sequence[int], block: np.ndarray) -> None:
    for what, bad in (("NaN or infinity", ~np.isfinite(block).all(1)), ("zeros only", ~block.any(1))):
        if bad.any():
            raise EarTeachError(f"{file.where(own[int(bad.argmax())])}: holds {what}; embed again, or drop the row")


def _leave_out(left_out: dict[str, int], reason: str, count: int, words: str, console: Console) -> None:
    left_out[reason] = count
    if count:
        console.warn(f"{count} {words}: left out")


def _path(path: str) -> str:
    """One form for all: in CSV control characters are escaped."""
    return posixpath.normpath(printable(path).replace("\\", "/"))


def _box(box: Box | None) -> Box | None:
    """As .npz keeps it: boxes are written as text, as float64 and as float32."""
    if box is None:
        return None
    x1, y1, x2, y2 = (float(np.float32(value)) for value in box)
    return x1, y1, x2, y2

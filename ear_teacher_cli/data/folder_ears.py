"""The ears of a folder with their boxes in pixels, whatever lists and files they were read from. For every command.

An image that two annotations mark must have the same boxes in both: then each ear is one.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..config import Reading
from ..errors import ManifestError
from ..files import printable
from .boxes import Box
from .formats import folder
from .formats.folder import Found
from .formats.rows import Rows
from .resolve_boxes import Corners, Files, to_pixels

SAME = 2.0  # pixels that the edges of two boxes of one ear may be apart: exports round


class FolderEar(NamedTuple):
    """One ear. `part`, `row`: the list that it is from, and its row there."""

    path: str
    box: Box | None
    identity: str
    side: str
    part: str
    row: int


@dataclass
class FolderEars:
    """Ears sorted by path; those of one image stay in the order of its annotation."""

    found: Found
    ears: list[FolderEar]
    corners: dict[str, Corners]  # part -> how its boxes were read
    warnings: list[str]  # without those of `corners`


def read_ears(source: Path, reading: Reading, files_of: Callable[[Rows], Files]) -> FolderEars:
    """Read a folder. `files_of`: the images of rows, whose paths start from the folder.

    Raises ManifestError as `folder.read` and `to_pixels` do, if two annotations of an image differ, or if no ear is marked.
    """
    found = folder.read(source, reading.identity_column)
    ears: list[FolderEar] = []
    corners: dict[str, Corners] = {}
    for part, rows in found.parts.items():
        read = corners[part] = to_pixels(rows, files_of(rows), reading, f"{printable(source)}: {part}")
        columns = rows.paths, read.boxes, rows.identities, rows.sides, [part] * len(rows.paths), rows.numbers
        ears += map(FolderEar._make, zip(*columns, strict=True))
    if not ears:
        raise ManifestError(f"{printable(source)}: its annotations mark no ear; nothing to do")
    ears.sort(key=lambda ear: ear.path)  # stable
    ears, warnings = _each_once(ears, source)
    return FolderEars(found, ears, corners, [*found.warnings, *warnings])


def _each_once(ears: list[FolderEar], source: Path) -> tuple[list[FolderEar], list[str]]:
    """Ears without those that another part has, too, and a warning per pair of parts. Raises ManifestError."""
    once: list[FolderEar] = []
    images: dict[tuple[str, str], int] = defaultdict(int)
    for path, of_image in groupby(ears, key=lambda ear: ear.path):
        by_part: dict[str, list[FolderEar]] = defaultdict(list)
        for ear in of_image:
            by_part[ear.part].append(ear)
        first, *others = by_part
        kept = by_part[first]
        for part in others:
            merged = joined(kept, by_part[part])
            if merged is None:
                raise ManifestError(
                    f"{printable(source / path)}: has other boxes in {printable(first)} than in {printable(part)}; remove it "
                    "from one of them"
                )
            kept = merged
            images[first, part] += 1
        once += kept
    where = printable(source)
    return once, [
        f"{where}: {count} images have the same boxes in {printable(one)} and {printable(two)}; each ear is read once"
        for (one, two), count in images.items()
    ]


def joined(kept: Sequence[FolderEar], others: Sequence[FolderEar]) -> list[FolderEar] | None:
    """The ears of one image in one part, with the identities of another part where they have none; None if their boxes
    differ. An ear without a box says nothing of boxes."""
    if all(ear.box is None for ear in kept):
        kept, others = others, kept
    if all(ear.box is None for ear in others):
        pairs = [0] * len(others) if len(kept) == 1 else []
    else:
        found = match_boxes([ear.box for ear in kept], [ear.box for ear in others])
        if found is None:
            return None
        pairs = found
    result = list(kept)
    for place, other in zip(pairs, others, strict=False):
        ear = result[place]
        if not ear.identity:
            result[place] = ear._replace(identity=other.identity, side=ear.side or other.side)
    return result


def match_boxes(kept: Sequence[Box | None], others: Sequence[Box | None]) -> list[int] | None:
    """For each of `others` the place of the same box in `kept`, each once; None if one is not there, or more are."""
    if len(kept) != len(others):
        return None
    free, places = list(range(len(kept))), []
    for box in others:
        place = next((place for place in free if are_same(kept[place], box)), None)
        if place is None:
            return None
        free.remove(place)
        places.append(place)
    return places


def are_same(one: Box | None, other: Box | None) -> bool:
    """Whether two boxes are of one ear: no edge is more than SAME pixels apart."""
    if one is None or other is None:
        return one is other
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= SAME

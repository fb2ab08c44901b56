"""Read the ears of a folder, with boxes in pixels, from whatever annotations lie in it. Used by every command.

formats/folder.py reads the annotations, resolve_boxes.py converts their boxes; here both are joined. If two annotations
mark the same image, they must have the same boxes; each ear is then read once.
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
from .resolve_boxes import Corners, ImageSizes, to_pixels

SAME = 2.0  # px by which edges of two boxes of one ear may differ: exports round


class FolderEar(NamedTuple):
    """One ear. `part`, `row`: the list that it is from (a key of Found.parts), and its row there."""

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


def read_ears(source: Path, reading: Reading, sizes_of: Callable[[Rows], ImageSizes]) -> FolderEars:
    """Read a folder. `sizes_of(rows)`: the sizes of the images of rows, whose paths start from the folder.

    Raises ManifestError as `folder.read` and `to_pixels` do, and if two annotations of an image differ or no ear is
    marked.
    """
    found = folder.read(source, reading.identity_column)
    ears: list[FolderEar] = []
    corners: dict[str, Corners] = {}
    for part, rows in found.parts.items():
        read = corners[part] = to_pixels(rows, sizes_of(rows), reading, f"{printable(source)}: {part}")
        columns = rows.paths, read.boxes, rows.identities, rows.sides, [part] * len(rows.paths), rows.numbers
        ears += map(FolderEar._make, zip(*columns, strict=True))
    if not ears:
        raise ManifestError(f"{printable(source)}: its annotations mark no ear; add boxes, or name another folder")
    ears.sort(key=lambda ear: ear.path)  # stable: keeps the order within an image
    ears, warnings = _merge_parts(ears, source)
    return FolderEars(found, ears, corners, [*found.warnings, *warnings])


def _merge_parts(ears: list[FolderEar], source: Path) -> tuple[list[FolderEar], list[str]]:
    """Return each ear once, and a warning per pair of parts that mark the same images. Raises ManifestError."""
    result: list[FolderEar] = []
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
                    f"{printable(source / path)}: has other boxes in {printable(first)} than in {printable(part)}; "
                    "remove it from one of them"
                )
            kept = merged
            images[first, part] += 1
        result += kept
    where = printable(source)
    return result, [
        f"{where}: {count} images have the same boxes in {printable(one)} and {printable(two)}; each ear is read once"
        for (one, two), count in images.items()
    ]


def joined(kept: Sequence[FolderEar], others: Sequence[FolderEar]) -> list[FolderEar] | None:
    """Merge the ears of one image in two parts; None if their boxes differ.

    Ears without an identity get that of the other part. An ear without a box agrees with any boxes.
    """
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
    """Return for each of `others` the position of the same box in `kept`; None unless they match one to one."""
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
    """Whether two boxes are of one ear: no edge differs by more than SAME pixels."""
    if one is None or other is None:
        return one is other
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= SAME

"""Ears that cannot be used, or are there twice: what to drop, what to merge, and what must stay on one side of a split.

Copies are files of the same bytes (sha256). Near duplicates are crops of ears whose perceptual hashes are alike, also if
one is mirrored, and whole images of two sources whose hashes are: an export of the same photos, written anew, with other
boxes. Images that Roboflow made of one photo (`NAME.rf.HASH.jpg`) are known by their names.
"""

import posixpath
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..console import Console
from .boxes import Box
from .crop import REASONS as UNUSABLE
from .folder_ears import are_same, match_boxes
from .image_checks import CropStats, Photo, inspect_all, near_pairs, photos_of
from .mixed_sources import Mixed
from .split import Links

COPY, REPEATED = "duplicate-image", "duplicate-row"
UNMARKED, UNDECODABLE = "no-annotation", "no-decoder"
REASONS = {
    **UNUSABLE,
    REPEATED: "the same image and box twice",
    COPY: "the same file content under another name",
    UNMARKED: "an image without an annotation in a folder that has some",
    UNDECODABLE: "HEIC, which needs the extra heic (pip install 'ear-teacher-cli[heic]')",
}
_WHOLE = -1  # the row of `Photo` that stands for the whole image


@dataclass(frozen=True)
class Dropped:
    """One ear, or an image without ears, that is not written. `part`, `row`: the list it is in, "" and None if none."""

    reason: str  # one of REASONS
    path: str
    detail: str = ""
    part: str = ""
    row: int | None = None


@dataclass(frozen=True)
class Merged:
    """Images of the same bytes. `boxes_differ`: a copy that was dropped has other boxes than the one that is kept."""

    kept: str
    copies: list[str]
    boxes_differ: bool
    identities_differ: bool


@dataclass
class Examined:
    """What is known of the images after every one was decoded."""

    kept: list[int]  # ears that are of use, in order
    dropped: list[Dropped]
    crops: dict[int, CropStats] = field(default_factory=dict)  # ear -> its crop
    whole: dict[str, CropStats] = field(default_factory=dict)  # path -> the whole image


def examine(found: Mixed, num_workers: int, console: Console) -> Examined:
    """Decode every image and cut every ear; drop what cannot be."""
    photos = list(photos_of(found.ears, order_of=lambda index: found.orders[found.parts[index]]))
    for photo in photos:
        if all(box is not None for _, box in photo.ears):
            photo.ears.append((_WHOLE, None))
    examined = Examined([], [Dropped(UNMARKED, path) for path in found.unmarked])
    examined.dropped += [Dropped(UNDECODABLE, path) for path in found.undecodable]
    bad: set[int] = set()

    def take(photo: Photo, findings: list, crops: list) -> None:
        for index, reason, detail in findings:
            if index != _WHOLE and reason in UNUSABLE:
                bad.add(index)
                examined.dropped.append(_dropped(found, index, reason, detail))
        whole = next(index for index, box in photo.ears if box is None)
        for index, stats in crops:
            if index == whole:
                examined.whole[found.ears.paths[photo.ears[0][0]]] = stats
            if index != _WHOLE:
                examined.crops[index] = stats

    results = zip(photos, inspect_all(photos, num_workers), strict=True)
    photo, first = next(results)  # before the clock runs: processes start meanwhile
    take(photo, *first)
    with console.progress("looking at", len(photos), "images", done=1) as steps:
        for photo, result in results:
            take(photo, *result)
            steps.advance()
    examined.kept = [index for index in range(len(found.ears)) if index not in bad]
    return examined


def _dropped(found: Mixed, index: int, reason: str, detail: str) -> Dropped:
    return Dropped(reason, found.ears.paths[index], detail, found.parts[index], found.ears.rows[index])


def drop_repeated_rows(found: Mixed, examined: Examined) -> None:
    """Of rows with the same image and box keep the first, or the first that names somebody."""
    ears = found.ears
    first: dict[tuple[str, Box | None], int] = {}
    for index in examined.kept:
        key = ears.paths[index], ears.boxes[index]
        if key not in first or (ears.ear(index) and not ears.ear(first[key])):
            first[key] = index
    stay = set(first.values())
    for index in examined.kept:
        if index not in stay:
            other = first[ears.paths[index], ears.boxes[index]]
            detail = f"as {found.parts[other]} row {ears.rows[other]}"
            if ears.ear(index) and ears.ear(index) != ears.ear(other):
                detail += "; it names another identity or side"
            examined.dropped.append(_dropped(found, index, REPEATED, detail))
    examined.kept = [index for index in examined.kept if index in stay]


def merge_copies(found: Mixed, examined: Examined) -> list[Merged]:
    """Keep one of the images with the same bytes: the first in path order that has boxes, else that names somebody, else
    of all. Its ears get the identities of the same ears in copies where they have none."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index in examined.kept:
        rows[found.ears.paths[index]].append(index)
    same: dict[bytes, list[str]] = defaultdict(list)
    for path in rows:
        same[examined.whole[path].digest].append(path)
    people = _People(found)
    merged, gone = [], set()
    for paths in same.values():
        if len(paths) == 1:
            continue
        kept = min(paths, key=lambda path: (not _boxes(found, rows[path]), not people.any(rows[path]), path))
        copies = [path for path in paths if path != kept]
        boxes_differ = [path for path in copies if not _boxes_agree(found, rows[kept], rows[path])]
        for path in copies:
            people.carry(rows[path], rows[kept])
        merged.append(Merged(kept, copies, bool(boxes_differ), any(people.differ(rows[p], rows[kept]) for p in copies)))
        for index in (index for path in copies for index in rows[path]):
            differs = found.ears.paths[index] in boxes_differ
            detail = f"as {kept}" + ("; its boxes are other than there" if differs else "")
            examined.dropped.append(_dropped(found, index, COPY, detail))
        gone.update(copies)
    people.put()
    examined.kept = [index for index in examined.kept if found.ears.paths[index] not in gone]
    return merged


def _boxes(found: Mixed, indices: list[int]) -> list[Box]:
    return [box for index in indices if (box := found.ears.boxes[index]) is not None]


def _boxes_agree(found: Mixed, one: list[int], other: list[int]) -> bool:
    return match_boxes(_boxes(found, one), _boxes(found, other)) is not None


class _People:
    """Identities and sides of ears, which copies can complete."""

    def __init__(self, found: Mixed):
        self._found = found
        nobody = [""] * len(found.ears)
        self._identities, self._sides = (list(names or nobody) for names in (found.ears.identities, found.ears.sides))

    def any(self, indices: list[int]) -> bool:
        return any(self._identities[index] for index in indices)

    def carry(self, copy: list[int], kept: list[int]) -> None:
        """Give the ears of the kept image the identities of the same ears of a copy, where they have none."""
        for index in copy:
            to = self._counterpart(index, kept)
            if self._identities[index] and to is not None and not self._identities[to]:
                self._identities[to] = self._identities[index]
                self._sides[to] = self._sides[to] or self._sides[index]

    def _counterpart(self, index: int, kept: list[int]) -> int | None:
        """The same ear on the kept image: of the same box, or the only one where one of the two has no box."""
        boxes = self._found.ears.boxes
        box = boxes[index]
        if len(kept) == 1 and (box is None or boxes[kept[0]] is None):
            return kept[0]
        return next((other for other in kept if are_same(boxes[other], box)), None)

    def differ(self, copy: list[int], kept: list[int]) -> bool:
        """Whether a copy names somebody whom the kept image does not."""
        return bool({self._identities[index] for index in copy} - {self._identities[index] for index in kept} - {""})

    def put(self) -> None:
        """Put them into the list of ears."""
        identities, sides = (names if any(names) else None for names in (self._identities, self._sides))
        self._found.ears = replace(self._found.ears, identities=identities, sides=sides)


def near_duplicates(found: Mixed, examined: Examined) -> Links:
    """Links between images (paths) that show almost the same."""
    links = Links()
    sources = {found.ears.paths[index]: found.source(index) for index in examined.kept}
    crops = [(found.ears.paths[index], examined.crops[index]) for index in examined.kept]
    whole = [(path, examined.whole[path]) for path in sources]
    _link_near(crops, links, lambda paths: True)
    # Within a source whole images may be alike because of one backdrop and pose.
    _link_near(whole, links, lambda paths: len({sources[path] for path in paths}) > 1)
    return links


def _link_near(crops: list[tuple[str, CropStats]], links: Links, alike: Callable[[list[str]], bool]) -> None:
    """Link images whose crops are alike, or are if one is mirrored."""
    plain: dict[int, list[str]] = defaultdict(list)
    mirrored: dict[int, list[str]] = defaultdict(list)
    for path, stats in crops:
        plain[stats.hash].append(path)
        mirrored[stats.mirrored].append(path)
    hashes, groups = [*plain, *mirrored], [*plain.values(), *mirrored.values()]
    # of two mirrored ones nothing is new
    pairs = [groups[i] + groups[j] for i, j in near_pairs(hashes) if i < len(plain)]
    for paths in (*plain.values(), *pairs):
        if alike(paths):
            links.link(paths)


def link_groups(found: Mixed, examined: Examined, merged: list[Merged], near: Links) -> Links:
    """Links between images (paths) and identities of which nothing may be on two sides; identities of rows that were
    dropped count, too."""
    links = Links()
    for paths in near.groups(dict.fromkeys(found.ears.paths[index] for index in examined.kept)):
        links.link(paths)
    for one in merged:
        links.link([one.kept, *one.copies])
    for paths in same_photo(found, examined):
        links.link(paths)
    nobody = [""] * len(found.ears)
    for path, identity in zip(found.ears.paths, found.ears.identities or nobody, strict=True):
        if identity:
            links.link([path, ("identity", identity)])
    return links


def same_photo(found: Mixed, examined: Examined) -> list[list[str]]:
    """Images that Roboflow made of one photo of a source, plain and altered: `NAME.rf.HASH.jpg`."""
    groups: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for index in examined.kept:
        name, mark, _ = posixpath.basename(found.ears.paths[index]).partition(".rf.")
        if mark:
            groups[found.source(index), name][found.ears.paths[index]] = None
    return [list(paths) for paths in groups.values() if len(paths) > 1]

"""Find ears to drop, copies to merge, and images that must stay on one side of a split.

Copies are files of the same bytes (sha256). Near duplicates are crops with similar perceptual hashes, one of them
perhaps mirrored, and whole images of two sources with similar hashes: an export of the same photos, encoded again, with
other boxes. Images that Roboflow made of one photo are recognised by their names (`NAME.rf.HASH.jpg`).
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
_WHOLE = -1  # index in Photo.ears that stands for the whole image


@dataclass(frozen=True)
class Dropped:
    """One ear, or an image without ears, that is left out.

    `part`, `row`: the list it is from and its row there; "" and None if it is in no list.
    """

    reason: str  # one of REASONS
    path: str
    detail: str = ""
    part: str = ""
    row: int | None = None


@dataclass(frozen=True)
class Merged:
    """Images of the same bytes: one is kept, the copies are dropped.

    `boxes_differ`, `identities_differ`: a copy has boxes, or identities, that the kept image does not have.
    """

    kept: str
    copies: list[str]
    boxes_differ: bool
    identities_differ: bool


@dataclass
class Examined:
    """What decoding every image has shown."""

    kept: list[int]  # ears that can be used, in order
    dropped: list[Dropped]
    crops: dict[int, CropStats] = field(default_factory=dict)  # ear -> its crop
    whole: dict[str, CropStats] = field(default_factory=dict)  # path -> the whole image


def examine(found: Mixed, num_workers: int, console: Console) -> Examined:
    """Decode every image and cut out every ear; drop what fails."""
    photos = list(photos_of(found.ears, order_of=lambda index: found.orders[found.parts[index]]))
    for photo in photos:
        if all(box is not None for _, box in photo.ears):
            photo.ears.append((_WHOLE, None))
    examined = Examined([], [Dropped(UNMARKED, path) for path in found.unmarked])
    examined.dropped += [Dropped(UNDECODABLE, path) for path in found.undecodable]
    unusable: set[int] = set()

    def record(photo: Photo, findings: list, crops: list) -> None:
        for index, reason, detail in findings:
            if index != _WHOLE and reason in UNUSABLE:
                unusable.add(index)
                examined.dropped.append(_dropped(found, index, reason, detail))
        whole = next(index for index, box in photo.ears if box is None)
        for index, stats in crops:
            if index == whole:
                examined.whole[found.ears.paths[photo.ears[0][0]]] = stats
            if index != _WHOLE:
                examined.crops[index] = stats

    results = zip(photos, inspect_all(photos, num_workers), strict=True)
    photo, first = next(results)  # starts the processes, which should not count in the rate that is shown
    record(photo, *first)
    with console.progress("checking", len(photos), "images", done=1) as steps:
        for photo, result in results:
            record(photo, *result)
            steps.advance()
    examined.kept = [index for index in range(len(found.ears)) if index not in unusable]
    return examined


def _dropped(found: Mixed, index: int, reason: str, detail: str) -> Dropped:
    return Dropped(reason, found.ears.paths[index], detail, found.parts[index], found.ears.rows[index])


def drop_repeated_rows(found: Mixed, examined: Examined) -> None:
    """Keep one of the rows with the same image and box: the first with an identity, else the first."""
    ears = found.ears
    first: dict[tuple[str, Box | None], int] = {}
    for index in examined.kept:
        key = ears.paths[index], ears.boxes[index]
        if key not in first or (ears.ear(index) and not ears.ear(first[key])):
            first[key] = index
    chosen = set(first.values())
    for index in examined.kept:
        if index not in chosen:
            other = first[ears.paths[index], ears.boxes[index]]
            detail = f"same as {found.parts[other]} row {ears.rows[other]}"
            if ears.ear(index) and ears.ear(index) != ears.ear(other):
                detail += ", but with another identity or side"
            examined.dropped.append(_dropped(found, index, REPEATED, detail))
    examined.kept = [index for index in examined.kept if index in chosen]


def merge_copies(found: Mixed, examined: Examined) -> list[Merged]:
    """Keep one of the images with the same bytes: the first by path that has boxes, else that has an identity, else the
    first. Where its ears have no identity, they get that of the same ear in a copy."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index in examined.kept:
        rows[found.ears.paths[index]].append(index)
    same: dict[bytes, list[str]] = defaultdict(list)
    for path in rows:
        same[examined.whole[path].digest].append(path)
    people = _Identities(found)
    merged, removed = [], set()
    for paths in same.values():
        if len(paths) == 1:
            continue
        kept = min(paths, key=lambda path: (not _boxes(found, rows[path]), not people.any(rows[path]), path))
        copies = [path for path in paths if path != kept]
        boxes_differ = [path for path in copies if not _boxes_agree(found, rows[kept], rows[path])]
        for path in copies:
            people.complete(rows[kept], rows[path])
        merged.append(Merged(kept, copies, bool(boxes_differ), any(people.differ(rows[p], rows[kept]) for p in copies)))
        for index in (index for path in copies for index in rows[path]):
            differs = found.ears.paths[index] in boxes_differ
            detail = f"same as {kept}" + (", but with other boxes" if differs else "")
            examined.dropped.append(_dropped(found, index, COPY, detail))
        removed.update(copies)
    people.store()
    examined.kept = [index for index in examined.kept if found.ears.paths[index] not in removed]
    return merged


def _boxes(found: Mixed, indices: list[int]) -> list[Box]:
    return [box for index in indices if (box := found.ears.boxes[index]) is not None]


def _boxes_agree(found: Mixed, one: list[int], other: list[int]) -> bool:
    return match_boxes(_boxes(found, one), _boxes(found, other)) is not None


class _Identities:
    """Identities and sides of ears, which copies can complete. `kept`, `copy`: ears of one image each."""

    def __init__(self, found: Mixed):
        self._found = found
        empty = [""] * len(found.ears)
        self._identities, self._sides = (list(names or empty) for names in (found.ears.identities, found.ears.sides))

    def any(self, indices: list[int]) -> bool:
        return any(self._identities[index] for index in indices)

    def complete(self, kept: list[int], copy: list[int]) -> None:
        """Give ears of the kept image without an identity that of the same ear of the copy."""
        for index in copy:
            same = self._counterpart(index, kept)
            if self._identities[index] and same is not None and not self._identities[same]:
                self._identities[same] = self._identities[index]
                self._sides[same] = self._sides[same] or self._sides[index]

    def _counterpart(self, index: int, kept: list[int]) -> int | None:
        """Return the same ear on the kept image: that with the same box, or the only one if one of the two has no
        box."""
        boxes = self._found.ears.boxes
        box = boxes[index]
        if len(kept) == 1 and (box is None or boxes[kept[0]] is None):
            return kept[0]
        return next((other for other in kept if are_same(boxes[other], box)), None)

    def differ(self, copy: list[int], kept: list[int]) -> bool:
        """Whether the copy has an identity that the kept image does not have."""
        return bool({self._identities[index] for index in copy} - {self._identities[index] for index in kept} - {""})

    def store(self) -> None:
        """Write them into the list of ears."""
        identities, sides = (names if any(names) else None for names in (self._identities, self._sides))
        self._found.ears = replace(self._found.ears, identities=identities, sides=sides)


def near_duplicates(found: Mixed, examined: Examined) -> Links:
    """Return links between images (paths) that look almost the same."""
    links = Links()
    sources = {found.ears.paths[index]: found.source(index) for index in examined.kept}
    crops = [(found.ears.paths[index], examined.crops[index]) for index in examined.kept]
    whole = [(path, examined.whole[path]) for path in sources]
    _link_near(crops, links, lambda paths: True)
    # Within a source, whole images may be similar because of the same backdrop and pose.
    _link_near(whole, links, lambda paths: len({sources[path] for path in paths}) > 1)
    return links


def _link_near(crops: list[tuple[str, CropStats]], links: Links, accept: Callable[[list[str]], bool]) -> None:
    """Link images whose crops are similar, one of them perhaps mirrored, if `accept(paths)`."""
    plain: dict[int, list[str]] = defaultdict(list)
    mirrored: dict[int, list[str]] = defaultdict(list)
    for path, stats in crops:
        plain[stats.hash].append(path)
        mirrored[stats.mirrored].append(path)
    hashes, groups = [*plain, *mirrored], [*plain.values(), *mirrored.values()]
    # pairs of two mirrored crops repeat those of two plain ones
    pairs = [groups[i] + groups[j] for i, j in near_pairs(hashes) if i < len(plain)]
    for paths in (*plain.values(), *pairs):
        if accept(paths):
            links.link(paths)


def link_groups(found: Mixed, examined: Examined, merged: list[Merged], near: Links) -> Links:
    """Return links between images (paths) and identities that must stay on one side. Identities of dropped rows count,
    too."""
    links = Links()
    for paths in near.groups(dict.fromkeys(found.ears.paths[index] for index in examined.kept)):
        links.link(paths)
    for one in merged:
        links.link([one.kept, *one.copies])
    for paths in roboflow_versions(found, examined):
        links.link(paths)
    empty = [""] * len(found.ears)
    for path, identity in zip(found.ears.paths, found.ears.identities or empty, strict=True):
        if identity:
            links.link([path, ("identity", identity)])
    return links


def roboflow_versions(found: Mixed, examined: Examined) -> list[list[str]]:
    """Return groups of images that Roboflow made of one photo of a source, plain and altered: `NAME.rf.HASH.jpg`."""
    groups: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for index in examined.kept:
        name, mark, _ = posixpath.basename(found.ears.paths[index]).partition(".rf.")
        if mark:
            groups[found.source(index), name][found.ears.paths[index]] = None
    return [list(paths) for paths in groups.values() if len(paths) > 1]

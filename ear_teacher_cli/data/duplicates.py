"""Ears that are of no use or there twice: what to drop, what to merge, and what must stay on one side of a split.

Copies are files of the same bytes (sha256). Near duplicates are crops of ears whose perceptual hashes are alike, and
whole images of two sources whose hashes are: an export of the same photos, written anew, with other boxes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..errors import PictureError
from ..talk import Talk
from .boxes import Box
from .crop import REASONS as UNUSABLE
from .inspect import Photo, Seen, inspect_all, near_pairs
from .mixed import Mixed
from .split import Links

COPY, REPEATED = "duplicate-picture", "duplicate-row"
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
class Looks:
    """What is known of the images after every one was decoded."""

    kept: list[int]  # ears that are of use, in order
    dropped: list[Dropped]
    ears: dict[int, Seen] = field(default_factory=dict)
    whole: dict[str, Seen] = field(default_factory=dict)  # path -> the whole image


def look(found: Mixed, num_workers: int, talk: Talk) -> Looks:
    """Decode every image and cut every ear; drop what cannot be."""
    jobs = list(_jobs(found))
    looks = Looks([], [Dropped(UNMARKED, path) for path in found.unmarked])
    looks.dropped += [Dropped(UNDECODABLE, path) for path in found.undecodable]
    bad: set[int] = set()
    with talk.progress("looking at", len(jobs), "images") as steps:
        for job, (findings, seen) in zip(jobs, inspect_all(jobs, num_workers), strict=True):
            for index, reason, detail in findings:
                if index != _WHOLE and reason in UNUSABLE:
                    bad.add(index)
                    looks.dropped.append(_dropped(found, index, reason, detail))
            whole = [index for index, box in job.ears if box is None]
            for index, one in seen:
                if index == whole[0]:
                    looks.whole[found.ears.paths[job.ears[0][0]]] = one
                if index != _WHOLE:
                    looks.ears[index] = one
            steps.advance()
    looks.kept = [index for index in range(len(found.ears)) if index not in bad]
    return looks


def _jobs(found: Mixed) -> Iterable[Photo]:
    ears = found.ears
    rows: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(ears.paths):
        rows[path].append(index)
    for indices in rows.values():
        marks: list[tuple[int, Box | None]] = [(i, ears.boxes[i]) for i in indices]
        if all(box is not None for _, box in marks):
            marks.append((_WHOLE, None))
        order = found.orders[found.parts[indices[0]]] or "xyxy"
        try:
            yield Photo(0, ears.file(indices[0]), marks, order)
        except PictureError as error:
            yield Photo(0, None, marks, order, (error.reason, error.detail))


def _dropped(found: Mixed, index: int, reason: str, detail: str) -> Dropped:
    return Dropped(reason, found.ears.paths[index], detail, found.parts[index], found.ears.rows[index])


def drop_repeated_rows(found: Mixed, looks: Looks) -> None:
    """Of rows with the same image and box keep the first, or the first that names somebody."""
    ears = found.ears
    first: dict[tuple[str, Box | None], int] = {}
    for index in looks.kept:
        key = ears.paths[index], ears.boxes[index]
        if key not in first or (ears.ear(index) and not ears.ear(first[key])):
            first[key] = index
    stay = set(first.values())
    for index in looks.kept:
        if index not in stay:
            other = first[ears.paths[index], ears.boxes[index]]
            detail = f"as {found.parts[other]} row {ears.rows[other]}"
            if ears.ear(index) and ears.ear(index) != ears.ear(other):
                detail += "; it names another identity or side"
            looks.dropped.append(_dropped(found, index, REPEATED, detail))
    looks.kept = [index for index in looks.kept if index in stay]


def merge_copies(found: Mixed, looks: Looks) -> list[Merged]:
    """Keep one of the images with the same bytes: the first in path order that has boxes, else that names somebody, else
    of all."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index in looks.kept:
        rows[found.ears.paths[index]].append(index)
    same: dict[bytes, list[str]] = defaultdict(list)
    for path in rows:
        same[looks.whole[path].digest].append(path)

    def marks(path: str, of: Callable[[int], object]) -> list:
        return sorted(str(of(index)) for index in rows[path] if of(index) is not None)

    boxes, people = found.ears.boxes.__getitem__, found.ears.ear
    merged, gone = [], set()
    for paths in same.values():
        if len(paths) == 1:
            continue
        kept = min(paths, key=lambda path: (not marks(path, boxes), not marks(path, people), path))
        copies = [path for path in paths if path != kept]
        differ = [path for path in copies if marks(path, boxes) != marks(kept, boxes)]
        names = any(marks(path, people) != marks(kept, people) for path in copies)
        merged.append(Merged(kept, copies, bool(differ), names))
        for index in (index for path in copies for index in rows[path]):
            detail = f"as {kept}" + ("; its boxes are other than there" if found.ears.paths[index] in differ else "")
            looks.dropped.append(_dropped(found, index, COPY, detail))
        gone.update(copies)
    looks.kept = [index for index in looks.kept if found.ears.paths[index] not in gone]
    return merged


def near_duplicates(found: Mixed, looks: Looks) -> Links:
    """Links between images (paths) that show almost the same."""
    links = Links()
    sources = {found.ears.paths[index]: found.source(index) for index in looks.kept}
    crops: dict[int, list[str]] = defaultdict(list)
    whole: dict[int, list[str]] = defaultdict(list)
    for index in looks.kept:
        crops[looks.ears[index].hash].append(found.ears.paths[index])
    for path in sources:
        whole[looks.whole[path].hash].append(path)
    _link_near(crops, links, lambda paths: True)
    # Within a source whole images may be alike because of one backdrop and pose.
    _link_near(whole, links, lambda paths: len({sources[path] for path in paths}) > 1)
    return links


def _link_near(by_hash: dict[int, list[str]], links: Links, alike: Callable[[list[str]], bool]) -> None:
    hashes = list(by_hash)
    pairs = [by_hash[hashes[i]] + by_hash[hashes[j]] for i, j in near_pairs(hashes)]
    for paths in (*by_hash.values(), *pairs):
        if alike(paths):
            links.link(paths)


def link_groups(found: Mixed, looks: Looks, merged: list[Merged], near: Links) -> Links:
    """Links between images (paths) and identities of which nothing may be on two sides; identities of rows that were
    dropped count, too."""
    links = Links()
    for paths in near.groups(dict.fromkeys(found.ears.paths[index] for index in looks.kept)):
        links.link(paths)
    for one in merged:
        links.link([one.kept, *one.copies])
    for path, identity in zip(found.ears.paths, found.ears.identities or (), strict=False):
        if identity:
            links.link([path, ("identity", identity)])
    return links

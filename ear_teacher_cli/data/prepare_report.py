"""What `prepare` reports: warnings, the summary on the terminal, and the content of prepare.json."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..console import Console, counted
from ..files import printable, shell_word
from .duplicates import REASONS, Dropped, Examined, Merged
from .mixed_sources import Mixed
from .split import Links

REPORT = "prepare.json"
SPLITS = ("train", "val")
_MAX_LINES = 12  # sources, lists and reasons that are printed one by one
_MAX_PATHS = 3  # paths that are printed of many
_SHARE_TOLERANCE = 0.05  # share of validation that may differ from the requested one without a warning


@dataclass
class Prepared:
    """What `prepare` found and decided. Ears are indices into `found.ears`."""

    found: Mixed
    examined: Examined
    merged: list[Merged]
    near: list[list[str]]  # paths of images that are near duplicates of each other
    altered: list[list[str]]  # paths of images that Roboflow made of one photo
    groups: list[list[int]]  # ears that stay together
    validation: set[int]  # ears
    root_dir: str | None  # where the lists' paths start; None: the working directory
    warnings: list[str] = field(default_factory=list)

    def split(self, name: str) -> list[int]:
        """Return the ears of one of SPLITS."""
        return [index for index in self.examined.kept if (index in self.validation) == (name == "val")]

    def identity(self, index: int) -> str:
        """Return the identity of an ear, "" if it has none."""
        return self.found.ears.identities[index] if self.found.ears.identities else ""


def count_reasons(examined: Examined) -> str:
    """Return how many ears were dropped for which reason: `3 missing, 1 truncated`."""
    return ", ".join(f"{len(group)} {reason}" for reason, group in _by_reason(examined.dropped).items())


def _by_reason(dropped: list[Dropped]) -> dict[str, list[Dropped]]:
    return {reason: group for reason in REASONS if (group := [one for one in dropped if one.reason == reason])}


# Warnings


def warnings_of(prepared: Prepared, links: Links, share: float) -> list[str]:
    """Return warnings about the lists, one sentence each. `links`: between paths and identities; `share`: requested
    share of validation."""
    kept, where = prepared.examined.kept, printable(prepared.found.ears.source)
    warnings = _warnings_about_people(prepared, links)
    largest = max(prepared.groups, key=len)
    if len(largest) > len(kept) / 2:
        warnings.append(
            f"{where}: {len(largest)} of {len(kept)} ears are one group, that of "
            f"{printable(prepared.found.ears.paths[largest[0]])}, linked by identity or near duplicates; check them"
        )
    actual = len(prepared.validation) / len(kept)
    if abs(actual - share) > _SHARE_TOLERANCE:
        warnings.append(
            f"{where}: {actual:.1%} of the ears are for validation instead of {share:.1%}, because groups cannot be "
            "divided; add images of other people"
        )
    if min(len(prepared.validation), len(kept) - len(prepared.validation)) < 2:
        warnings.append(f"{where}: one side has a single ear, but training needs two on each; add images")
    return warnings


def _warnings_about_people(prepared: Prepared, links: Links) -> list[str]:
    found, kept, where = prepared.found, prepared.examined.kept, printable(prepared.found.ears.source)
    warnings = []
    sources: dict[str, set[str]] = defaultdict(set)
    for index in kept:
        if identity := prepared.identity(index):
            sources[identity].add(found.source(index))
    shared = [identity for identity in sorted(sources) if len(sources[identity]) > 1]
    if shared:
        warnings.append(
            f"{where}: the same identity in several sources ({_first_few(shared)}) is taken as one person; if it is "
            "not, rename it in one of them"
        )
    people: dict[Hashable, set[str]] = defaultdict(set)
    for identity in sources:
        people[links.find(("identity", identity))].add(identity)
    several = [" = ".join(sorted(names)) for names in people.values() if len(names) > 1]
    if several:
        warnings.append(
            f"{where}: people who share an image, a copy or a near duplicate stay on one side "
            f"({_first_few(sorted(several))}); check whether they are one person, or a label is wrong"
        )
    unnamed = sum(not prepared.identity(index) for index in kept)
    if unnamed:
        warnings.append(
            f"{where}: {unnamed} of {len(kept)} ears have no identity, and photos of one person may be on both sides; "
            "if lists or folders name people, add --identity-column or --folder-identities"
        )
    return warnings


# prepare.json


def report_of(prepared: Prepared) -> dict[str, Any]:
    """Return the content of prepare.json, without time or machine: the same inputs give the same bytes."""
    found, examined = prepared.found, prepared.examined
    all_ears = range(len(found.ears))
    by_source: dict[str, list[int]] = defaultdict(list)
    for index in all_ears:
        by_source[found.source(index)].append(index)
    kept, in_part = set(examined.kept), Counter(found.parts)
    return {
        "paths_start_from": "the working directory" if prepared.root_dir is None else "--root-dir",
        "found": _counts(prepared, all_ears),
        "read": {part: {"ears": in_part[part], "boxes": how} for part, how in found.how.items()},
        "sources": {
            source: _counts(prepared, indices) | {"written": _written(prepared, [i for i in indices if i in kept])}
            for source, indices in sorted(by_source.items())
        },
        "written": _written(prepared, examined.kept) | {"groups": len(prepared.groups)},
        "near_duplicates": prepared.near,
        "altered_copies": prepared.altered,
        "merged": [asdict(one) for one in prepared.merged],
        "dropped_by_reason": {reason: len(group) for reason, group in _by_reason(examined.dropped).items()},
        "dropped": [asdict(one) for group in _by_reason(examined.dropped).values() for one in group],
        "not_read": found.unread,
        "warnings": prepared.warnings,
    }


def _counts(prepared: Prepared, indices: Iterable[int]) -> dict[str, Any]:
    found, indices = prepared.found, list(indices)
    boxes = sum(found.ears.boxes[index] is not None for index in indices)
    return {
        "images": len({found.ears.paths[index] for index in indices}),
        "ears": len(indices),
        "with_boxes": boxes,
        "whole_images": len(indices) - boxes,
        "identities": len({prepared.identity(index) for index in indices} - {""}),
        "formats": dict(sorted(Counter(map(found.kind, indices)).items())),
    }


def _written(prepared: Prepared, kept: list[int]) -> dict[str, Any]:
    val = sum(index in prepared.validation for index in kept)
    return {"train": len(kept) - val, "val": val, "val_share": round(val / len(kept), 4) if kept else None}


# What is printed: console.summary escapes it.


def print_summary(prepared: Prepared, report: dict[str, Any], console: Console) -> None:
    """Print what was found, dropped, merged and how it is split."""
    found = report["found"]
    counts = (
        f"{counted(found['ears'], 'ear')} on {counted(found['images'], 'image')} in "
        f"{counted(len(report['sources']), 'source')}: {found['with_boxes']} with boxes, {found['whole_images']} whole "
        f"images, {found['identities']} identities"
    )
    dropped = _by_reason(prepared.examined.dropped)
    split = f"{_shares(report['written'])}, by {report['written']['groups']} groups, seed {report['seed']}"
    console.summary(
        [
            ("found", counts),
            *_block("boxes", [f"{part}: {one['boxes']}" for part, one in report["read"].items() if one["boxes"]]),
            *_block("dropped", [_dropped_line(reason, group) for reason, group in dropped.items()]),
            *_repetition_lines(prepared),
            *_block("sources", [_source_line(name, one) for name, one in report["sources"].items()]),
            ("split", split),
        ]
    )


def _dropped_line(reason: str, group: list[Dropped]) -> str:
    return f"{len(group)} {reason} ({REASONS[reason]}): {_first_few([one.path for one in group])}"


def _repetition_lines(prepared: Prepared) -> list[tuple[str, str]]:
    """Lines about copies, near duplicates, and versions of one photo."""
    lines = []
    if prepared.merged:
        copies = [f"{one.kept} is also {', '.join(one.copies)}" for one in prepared.merged]
        other = sum(one.boxes_differ for one in prepared.merged)
        differ = f"; {other} with other boxes or none in a copy" if other else ""
        lines.append(("merged", f"{counted(len(copies), 'image')} with copies{differ}: {_first_few(copies)}"))
    if prepared.near:
        near = [" ~ ".join(paths[:_MAX_PATHS]) for paths in prepared.near]
        lines.append(
            ("similar", f"{counted(len(near), 'group')} of near duplicates, each on one side: {_first_few(near)}")
        )
    if prepared.altered:
        photos = [" ~ ".join(paths[:_MAX_PATHS]) for paths in prepared.altered]
        count = counted(len(photos), "photo")
        lines.append(("altered", f"{count} in several versions (.rf.), each on one side: {_first_few(photos)}"))
    return lines


def _source_line(name: str, counts: dict[str, Any]) -> str:
    formats = ", ".join(f"{count} {kind}" for kind, count in counts["formats"].items())
    people = f", {counts['identities']} identities" if counts["identities"] else ""
    return f"{name}: {formats}{people}; {_shares(counts['written'])}"


def _shares(written: dict[str, Any]) -> str:
    share = "" if written["val_share"] is None else f" ({written['val_share']:.1%})"
    return f"{written['train']} to train, {written['val']} to validate{share}"


def _block(head: str, lines: list[str]) -> list[tuple[str, str]]:
    """Return the first few lines as rows of a summary, with the head at the first."""
    shown = lines[:_MAX_LINES] + [f"and {len(lines) - _MAX_LINES} more ({REPORT} has all)"] * (len(lines) > _MAX_LINES)
    return [(head if place == 0 else "", line) for place, line in enumerate(shown)]


def _first_few(names: list[str]) -> str:
    more = f", and {len(names) - _MAX_PATHS} more" if len(names) > _MAX_PATHS else ""
    return ", ".join(printable(name) for name in names[:_MAX_PATHS]) + more


def print_next_step(prepared: Prepared, lists: list[Path], out: Path, console: Console) -> None:
    """Print what was written, and the command that trains on it."""
    root = f" --root-dir {shell_word(prepared.root_dir)}" if prepared.root_dir is not None else ""
    train, val = map(shell_word, lists)
    lines = [("written", f"{lists[0]}, {lists[1]}, {out / REPORT}")]
    if root:
        lines.append(("paths", f"start from {prepared.root_dir}; other commands need{root}"))
    lines.append(("next", f"earteach train --train-metadata {train} --val-metadata {val}{root}"))
    console.summary(lines)

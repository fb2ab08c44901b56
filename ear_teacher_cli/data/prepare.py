"""`prepare`: a folder of mixed sources to a training and a validation list that share nothing. No torch on the way.

Every image is decoded once. What cannot be used is dropped with a reason, files of the same content are merged, and what
belongs together (a person, a photo, near duplicates) stays on one side. The lists and the report depend on the inputs,
the seed and the options alone. Images are neither copied nor changed.

Paths in the lists start from the working directory where RAW lies in it: other commands that are run there find the
images. Otherwise they start from RAW (or from where RAW's paths start, if it is a list), and `--root-dir` must name it.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Reading
from ..console import Console, counted
from ..errors import ConfigError, EarTeachError, UsageError
from ..files import printable, refuse_existing, shell_word, whole_file
from .duplicates import (
    REASONS,
    Dropped,
    Examined,
    Merged,
    drop_repeated_rows,
    examine,
    link_groups,
    merge_copies,
    near_duplicates,
    same_photo,
)
from .formats import FORMATS as LISTS
from .mixed_sources import Mixed, name_by_folders, read_mixed
from .resolve_boxes import Files
from .split import Group, Links, choose_validation

FORMATS = ("npy", "csv")
REPORT = "prepare.json"
SPLITS = ("train", "val")
_MANY = 12  # sources, lists and reasons that are named one by one
_FEW = 3  # paths that are named of many
_OFF = 0.05  # share of validation that may differ from the wanted one without a warning


@dataclass
class Prepared:
    """What is written, and how it came about."""

    found: Mixed
    examined: Examined
    merged: list[Merged]
    near: list[list[str]]  # paths of images that are near duplicates of each other
    altered: list[list[str]]  # paths of images that Roboflow made of one photo
    groups: list[list[int]]  # ears that stay together
    validation: set[int]  # ears
    root_dir: str | None  # where the lists' paths start; None: the working directory
    warnings: list[str]

    def split(self, name: str) -> list[int]:
        """Ears of one of SPLITS."""
        return [index for index in self.examined.kept if (index in self.validation) == (name == "val")]


def prepare(
    raw: str,
    out: str,
    console: Console,
    *,
    val_share: float = 0.2,
    seed: int = 0,
    format: str = "npy",
    reading: Reading | None = None,
    root_dir: str | None = None,
    folder_identities: bool = False,
    num_workers: int = 8,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Prepared:
    """Read RAW and write OUT/train_teacher.*, OUT/val_teacher.* and OUT/prepare.json (nothing with `dry_run`).

    `val_share`: share of the ears to validate on, above 0 and below 1. `root_dir`: where the paths of RAW start from, if it
    is a list. Raises EarTeachError.
    """
    if not 0 < val_share < 1:
        raise ConfigError("val_share", f"{val_share:g} is no share of the ears", "give a number between 0 and 1")
    if format not in FORMATS:
        raise UsageError(f"--format {printable(format)}: not written; choose one of {', '.join(FORMATS)}")
    lists = [Path(out) / f"{split}_teacher.{format}" for split in SPLITS]
    if not dry_run:
        _refuse_outputs(raw, Path(out), [*lists, Path(out) / REPORT], overwrite)
    found = read_mixed(raw, root_dir, reading or Reading())
    if folder_identities:
        name_by_folders(found)
    prepared = _prepared(found, val_share, seed, num_workers, console)
    options = {"raw": raw, "val_share": val_share, "seed": seed, "folder_identities": folder_identities}
    report = options | _report(prepared)
    for warning in prepared.warnings:
        console.warn(warning)
    _say(prepared, report, console)
    if dry_run:
        console.info("dry run: nothing was written")
        return prepared
    _write(prepared, report, lists, Path(out) / REPORT)
    _say_next(prepared, lists, Path(out), console)
    return prepared


def _own_files(out: Path) -> list[Path]:
    return [out / REPORT, *(out / f"{split}_teacher.{format}" for split in SPLITS for format in FORMATS)]


def _refuse_outputs(raw: str, out: Path, paths: list[Path], overwrite: bool) -> None:
    """Raise EarTeachError if the outputs cannot be written there, before the images are read."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{printable(out)}: is a file; name a folder for the lists")
    if not out.exists():
        refuse_existing(out, overwrite)  # the folder that it is to be in
    else:
        for path in paths:
            refuse_existing(path, overwrite, inputs=[raw])


def _prepared(found: Mixed, share: float, seed: int, num_workers: int, console: Console) -> Prepared:
    examined = examine(found, num_workers, console)
    drop_repeated_rows(found, examined)
    merged = merge_copies(found, examined)
    where, paths = printable(found.ears.source), found.ears.paths
    if not examined.kept:
        raise EarTeachError(f"{where}: no ear can be used ({_reasons(examined)}); `earteach validate-data` names each")
    near = near_duplicates(found, examined)
    links = link_groups(found, examined, merged, near)
    by_group: dict[Any, list[int]] = defaultdict(list)
    for index in examined.kept:
        by_group[links.find(paths[index])].append(index)
    groups = list(by_group.values())
    if len(groups) == 1:
        raise EarTeachError(
            f"{where}: all {counted(len(examined.kept), 'ear')} that can be used belong to one group (one person, one photo, "
            f"or near duplicates of each other), which cannot be split (dropped: {_reasons(examined) or 'none'}); add images "
            "of other people"
        )
    sized = [Group(paths[group[0]], Counter(map(found.source, group))) for group in groups]
    chosen = choose_validation(sized, share, seed)
    alike = [group for group in near.groups(dict.fromkeys(paths[i] for i in examined.kept)) if len(group) > 1]
    prepared = Prepared(
        found,
        examined,
        merged,
        alike,
        same_photo(found, examined),
        groups,
        {index for place in chosen for index in groups[place]},
        None if _start(found.ears.root) is not None else str(found.ears.root),
        [],
    )
    prepared.warnings = [*found.warnings, *_warnings(prepared, links, share)]
    return prepared


def _reasons(examined: Examined) -> str:
    """`3 missing, 1 truncated`."""
    return ", ".join(f"{len(group)} {reason}" for reason, group in _by_reason(examined.dropped).items())


def _warnings(prepared: Prepared, links: Links, share: float) -> list[str]:
    """What the user has to know of the lists, a sentence each."""
    found, kept, where = prepared.found, prepared.examined.kept, printable(prepared.found.ears.source)
    warnings = _warnings_of_people(prepared, links)
    largest = max(prepared.groups, key=len)
    if len(largest) > len(kept) / 2:
        warnings.append(
            f"{where}: {len(largest)} of {len(kept)} ears are one group, that of "
            f"{printable(found.ears.paths[largest[0]])}, linked by identity or near duplicates; look at them"
        )
    got = len(prepared.validation) / len(kept)
    if abs(got - share) > _OFF:
        warnings.append(
            f"{where}: {got:.1%} of the ears are for validation, not {share:.1%}; the groups are too large for less or more"
        )
    if min(len(prepared.validation), len(kept) - len(prepared.validation)) < 2:
        warnings.append(f"{where}: one side has a single ear, and training needs two on each; add images")
    return warnings


def _warnings_of_people(prepared: Prepared, links: Links) -> list[str]:
    found, kept, where = prepared.found, prepared.examined.kept, printable(prepared.found.ears.source)
    warnings = []
    sources: dict[str, set[str]] = defaultdict(set)
    for index in kept:
        if identity := _identity(found, index):
            sources[identity].add(found.source(index))
    shared = [identity for identity in sorted(sources) if len(sources[identity]) > 1]
    if shared:
        warnings.append(
            f"{where}: the same identity in several sources ({_some(shared)}) is taken for one person; if it is not, rename "
            "it in one of them"
        )
    people: dict[Any, set[str]] = defaultdict(set)
    for identity in sources:
        people[links.find(("identity", identity))].add(identity)
    several = [" = ".join(sorted(names)) for names in people.values() if len(names) > 1]
    if several:
        warnings.append(
            f"{where}: people that share an image, a copy or a near duplicate stay on one side ({_some(sorted(several))}); "
            "check whether they are one person, or a label is wrong"
        )
    nobody = sum(not _identity(found, index) for index in kept)
    if nobody:
        warnings.append(
            f"{where}: {nobody} of {len(kept)} ears have no identity, and photos of one person may be on both sides; "
            "if lists or folders name people, add --identity-column or --folder-identities"
        )
    return warnings


def _identity(found: Mixed, index: int) -> str:
    return found.ears.identities[index] if found.ears.identities else ""


def _start(root: Path) -> str | None:
    """What comes before the paths of images below `root` so that they start from the working directory: "" or `photos/`.
    None where `root` is elsewhere."""
    here, there = os.path.realpath("."), os.path.realpath(root)
    if there == here:
        return ""
    within = there.startswith(here.rstrip(os.sep) + os.sep)
    return os.path.relpath(there, here).replace(os.sep, "/") + "/" if within else None


def _report(prepared: Prepared) -> dict[str, Any]:
    """prepare.json: no time, no machine, so that the same inputs give the same bytes."""
    found, examined = prepared.found, prepared.examined
    every, start = range(len(found.ears)), "the working directory" if prepared.root_dir is None else "--root-dir"
    by_source: dict[str, list[int]] = defaultdict(list)
    for index in every:
        by_source[found.source(index)].append(index)
    kept, in_part = set(examined.kept), Counter(found.parts)
    return {
        "paths_start_from": start,
        "found": _counts(found, every),
        "read": {part: {"ears": in_part[part], "boxes": how} for part, how in found.how.items()},
        "sources": {
            source: _counts(found, indices) | {"written": _written(prepared, [i for i in indices if i in kept])}
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


def _counts(found: Mixed, indices: Iterable[int]) -> dict[str, Any]:
    indices = list(indices)
    boxes = sum(found.ears.boxes[index] is not None for index in indices)
    return {
        "images": len({found.ears.paths[index] for index in indices}),
        "ears": len(indices),
        "with_boxes": boxes,
        "whole_images": len(indices) - boxes,
        "identities": len({_identity(found, index) for index in indices} - {""}),
        "formats": dict(sorted(Counter(map(found.kind, indices)).items())),
    }


def _written(prepared: Prepared, kept: list[int]) -> dict[str, Any]:
    val = sum(index in prepared.validation for index in kept)
    return {"train": len(kept) - val, "val": val, "val_share": round(val / len(kept), 4) if kept else None}


def _by_reason(dropped: list[Dropped]) -> dict[str, list[Dropped]]:
    return {reason: group for reason in REASONS if (group := [one for one in dropped if one.reason == reason])}


def _write(prepared: Prepared, report: dict[str, Any], lists: list[Path], report_path: Path) -> None:
    """Write all three beside their places, then give each its name, the validation list first, the report last. If writing
    fails, the old ones stay; only if renaming does, a new list may be beside an old one."""
    report_path.parent.mkdir(exist_ok=True)
    train, val = (_rows(prepared, prepared.split(name)) for name in SPLITS)
    write = LISTS[lists[0].suffix].write
    assert write is not None
    with whole_file(report_path) as told, whole_file(lists[0]) as first, whole_file(lists[1]) as second:
        write(first, train)
        write(second, val)
        told.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _rows(prepared: Prepared, indices: list[int]) -> list[tuple]:
    """(path, corners, identity, side) as they are written. A whole image is written with the box of all of it, which
    gives the same crop: the original package's trainer wants a box in every row."""
    ears = prepared.found.ears.subset(indices)
    start = _start(ears.root) or ""
    sizes = Files(ears.paths, ears.file)
    sizes.read(np.flatnonzero([box is None for box in ears.boxes]))
    nobody = [""] * len(ears)
    rows = zip(ears.paths, ears.boxes, ears.identities or nobody, ears.sides or nobody, strict=True)
    return [
        (start + path, box or (0.0, 0.0, *sizes.size(place)), identity, side)
        for place, (path, box, identity, side) in enumerate(rows)
    ]


def _say(prepared: Prepared, report: dict[str, Any], console: Console) -> None:
    found, lines = report["found"], []
    lines.append(
        (
            "found",
            f"{counted(found['ears'], 'ear')} on {counted(found['images'], 'image')} in "
            f"{counted(len(report['sources']), 'source')}: {found['with_boxes']} with boxes, {found['whole_images']} "
            f"whole images, {found['identities']} identities",
        )
    )
    boxes = [f"{printable(part)}: {one['boxes']}" for part, one in report["read"].items() if one["boxes"]]
    lines += _named("boxes", boxes)
    dropped = _by_reason(prepared.examined.dropped)
    lines += _named(
        "dropped",
        [f"{len(g)} {reason} ({REASONS[reason]}): {_some([one.path for one in g])}" for reason, g in dropped.items()],
    )
    if prepared.merged:
        copies = [f"{one.kept} also is {', '.join(one.copies)}" for one in prepared.merged]
        other = sum(one.boxes_differ for one in prepared.merged)
        differ = f"; {other} with other boxes or none in a copy" if other else ""
        lines.append(("merged", f"{counted(len(copies), 'image')} with copies{differ}: {_some(copies)}"))
    if prepared.near:
        alike = [" ~ ".join(paths[:_FEW]) for paths in prepared.near]
        lines.append(("alike", f"{counted(len(alike), 'group')} of near duplicates, each on one side: {_some(alike)}"))
    if prepared.altered:
        alike = [" ~ ".join(paths[:_FEW]) for paths in prepared.altered]
        lines.append(
            ("altered", f"{counted(len(alike), 'photo')} in several versions (.rf.), each on one side: {_some(alike)}")
        )
    lines += _named("sources", [_source_line(name, one) for name, one in report["sources"].items()])
    lines.append(
        ("split", f"{_shares(report['written'])}, by {report['written']['groups']} groups, seed {report['seed']}")
    )
    console.summary(lines)


def _source_line(name: str, one: dict[str, Any]) -> str:
    formats = ", ".join(f"{count} {kind}" for kind, count in one["formats"].items())
    people = f", {one['identities']} identities" if one["identities"] else ""
    return f"{printable(name)}: {formats}{people}; {_shares(one['written'])}"


def _shares(written: dict[str, Any]) -> str:
    share = "" if written["val_share"] is None else f" ({written['val_share']:.1%})"
    return f"{written['train']} to train, {written['val']} to validate{share}"


def _named(head: str, lines: list[str]) -> list[tuple[str, str]]:
    """Facts under one head, the first few."""
    shown = lines[:_MANY] + [f"and {len(lines) - _MANY} more ({REPORT} has all)"] * (len(lines) > _MANY)
    return [(head if place == 0 else "", line) for place, line in enumerate(shown)]


def _some(names: list[str], most: int = _FEW) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def _was(names: list[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _say_next(prepared: Prepared, lists: list[Path], out: Path, console: Console) -> None:
    root = f" --root-dir {shell_word(prepared.root_dir)}" if prepared.root_dir is not None else ""
    train, val = map(shell_word, lists)
    lines = [("written", f"{printable(lists[0])}, {printable(lists[1])}, {printable(out / REPORT)}")]
    if root:
        lines.append(("paths", f"start from {printable(prepared.root_dir)}, which commands must be told:{root}"))
    lines.append(("next", f"earteach train --train-metadata {train} --val-metadata {val}{root}"))
    console.summary(lines)
    stale = [path.name for path in _own_files(out) if path.exists() and path not in (*lists, out / REPORT)]
    if stale:
        console.warn(f"{printable(out)}: {', '.join(stale)} {_was(stale)} there before, and of another split; remove")

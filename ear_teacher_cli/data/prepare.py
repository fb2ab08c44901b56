"""`earteach prepare`: turn a folder of mixed sources into a training and a validation list. Imports no torch.

Each image is decoded once. Ears that cannot be used are dropped with a reason, files of the same content are merged,
and whatever belongs together (a person, a photo, near duplicates) stays on one side of the split. Lists and report
depend only on the inputs, the seed and the options. Images are neither copied nor changed.

Paths in the lists start from the working directory if RAW lies below it: commands that run there find the images.
Otherwise they start from RAW (or, if RAW is a list, from where its paths start), and `--root-dir` must name that
folder.

The steps are in mixed_sources.py (read), duplicates.py (drop, merge, link) and split.py (divide); prepare_report.py
makes what is printed and prepare.json.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from ..command_config import LIST_FORMATS, PrepareConfig
from ..console import Console, counted
from ..errors import ConfigError, EarTeachError, UsageError
from ..files import printable, refuse_existing, whole_file
from .boxes import Box
from .duplicates import (
    drop_repeated_rows,
    examine,
    link_groups,
    merge_copies,
    near_duplicates,
    roboflow_versions,
)
from .formats import FORMATS
from .mixed_sources import Mixed, name_by_folders, read_mixed
from .prepare_report import (
    REPORT,
    SPLITS,
    Prepared,
    count_reasons,
    print_next_step,
    print_summary,
    report_of,
    warnings_of,
)
from .resolve_boxes import ImageSizes
from .split import Group, choose_validation


def prepare(raw: str, out: str, config: PrepareConfig, console: Console) -> Prepared:
    """Read RAW; write OUT/train_teacher.*, OUT/val_teacher.* and OUT/prepare.json (nothing if `config.dry_run`).

    Raises EarTeachError.
    """
    if not 0 < config.val_share < 1:
        reason = f"{config.val_share:g} is not a share of the ears"
        raise ConfigError("val_share", reason, "give a number between 0 and 1")
    lists = [Path(out) / f"{split}_teacher.{config.format}" for split in SPLITS]
    if not config.dry_run:
        _refuse_outputs(raw, Path(out), [*lists, Path(out) / REPORT], config.overwrite)
    found = read_mixed(raw, config.root_dir, config.reading)
    if config.folder_identities:
        name_by_folders(found)
    prepared = _group_and_split(found, config, console)
    options = {
        "raw": raw,
        "val_share": config.val_share,
        "seed": config.seed,
        "folder_identities": config.folder_identities,
    }
    report = options | report_of(prepared)
    for warning in prepared.warnings:
        console.warn(warning)
    print_summary(prepared, report, console)
    if config.dry_run:
        console.info("dry run: nothing was written")
        return prepared
    _write(prepared, report, lists, Path(out) / REPORT)
    print_next_step(prepared, lists, Path(out), console)
    _warn_of_stale_lists(Path(out), lists, console)
    return prepared


def _refuse_outputs(raw: str, out: Path, paths: list[Path], overwrite: bool) -> None:
    """Raise EarTeachError if the outputs cannot be written, before any image is read."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{printable(out)}: is a file; name a folder for the lists")
    if not out.exists():
        refuse_existing(out, overwrite)  # checks the folder in which it is made
    else:
        for path in paths:
            refuse_existing(path, overwrite, inputs=[raw])


def _group_and_split(found: Mixed, config: PrepareConfig, console: Console) -> Prepared:
    """Decode every image, drop and merge ears, group those that belong together, choose groups for validation."""
    examined = examine(found, config.num_workers, console)
    drop_repeated_rows(found, examined)
    merged = merge_copies(found, examined)
    where, paths = printable(found.ears.source), found.ears.paths
    if not examined.kept:
        reasons = count_reasons(examined)
        raise EarTeachError(f"{where}: no ear can be used ({reasons}); `earteach validate-data` lists each")
    near = near_duplicates(found, examined)
    links = link_groups(found, examined, merged, near)
    by_group: dict[Hashable, list[int]] = defaultdict(list)
    for index in examined.kept:
        by_group[links.find(paths[index])].append(index)
    groups = list(by_group.values())
    if len(groups) == 1:
        raise EarTeachError(
            f"{where}: all {counted(len(examined.kept), 'ear')} that can be used belong to one group (one person, one "
            f"photo, or near duplicates of each other), which cannot be split (dropped: "
            f"{count_reasons(examined) or 'none'}); add images of other people"
        )
    sized = [Group(paths[group[0]], Counter(map(found.source, group))) for group in groups]
    chosen = choose_validation(sized, config.val_share, config.seed)
    similar = [group for group in near.groups(dict.fromkeys(paths[i] for i in examined.kept)) if len(group) > 1]
    prepared = Prepared(
        found,
        examined,
        merged,
        near=similar,
        altered=roboflow_versions(found, examined),
        groups=groups,
        validation={index for place in chosen for index in groups[place]},
        root_dir=None if _path_prefix(found.ears.root) is not None else str(found.ears.root),
    )
    prepared.warnings = [*found.warnings, *warnings_of(prepared, links, config.val_share)]
    return prepared


def _path_prefix(root: Path | None) -> str | None:
    """Return what makes paths below `root` start from the working directory: "" or `photos/`; None if `root` is not
    below it."""
    working, real_root = os.path.realpath("."), os.path.realpath(root or ".")
    if real_root == working:
        return ""
    below = real_root.startswith(working.rstrip(os.sep) + os.sep)
    return os.path.relpath(real_root, working).replace(os.sep, "/") + "/" if below else None


def _write(prepared: Prepared, report: dict[str, Any], lists: list[Path], report_path: Path) -> None:
    """Write the two lists and the report to temporary files, then rename them, the report last.

    If writing fails, earlier files stay unchanged; only if renaming fails, a new list may lie beside an old one.
    """
    report_path.parent.mkdir(exist_ok=True)
    train, val = (_list_rows(prepared, prepared.split(name)) for name in SPLITS)
    write = FORMATS[lists[0].suffix].write
    assert write is not None
    with whole_file(report_path) as json_file, whole_file(lists[0]) as train_file, whole_file(lists[1]) as val_file:
        write(train_file, train)
        write(val_file, val)
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _list_rows(prepared: Prepared, indices: list[int]) -> list[tuple[str, Box | None, str, str]]:
    """Return the rows of a list: (path, box as x1, y1, x2, y2, identity, side).

    A whole image gets a box around all of it, which gives the same crop: the original package's trainer needs a box in
    every row.
    """
    ears = prepared.found.ears.subset(indices)
    prefix = _path_prefix(ears.root) or ""
    sizes = ImageSizes(ears.paths, ears.file)
    sizes.read(whole := np.flatnonzero([box is None for box in ears.boxes]))
    regions = {int(row): (0.0, 0.0, *size) for row, size in zip(whole, sizes.of(whole).tolist(), strict=True)}
    empty = [""] * len(ears)
    rows = zip(ears.paths, ears.boxes, ears.identities or empty, ears.sides or empty, strict=True)
    one: dict[str, str] = {}  # equal texts become one object: the bytes of a pickle depend on it
    return [
        (
            prefix + one.setdefault(path, path),
            box or regions[row],
            one.setdefault(identity, identity),
            one.setdefault(side, side),
        )
        for row, (path, box, identity, side) in enumerate(rows)
    ]


def _warn_of_stale_lists(out: Path, lists: list[Path], console: Console) -> None:
    """Warn of lists of an earlier run in another format: they are of another split."""
    own = [out / f"{split}_teacher.{format}" for split in SPLITS for format in LIST_FORMATS]
    stale = [path.name for path in own if path.exists() and path not in lists]
    if stale:
        was = "was" if len(stale) == 1 else "were"
        console.warn(f"{out}: {', '.join(stale)} {was} there before, from another split; remove")

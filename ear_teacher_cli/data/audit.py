"""`earteach validate-data`: check every image and every box before training. Imports no torch.

Each photo is decoded once, completely, in parallel; each ear is cut out as in training. Problems are listed by reason,
with row and path. Duplicates are found by file content, near duplicates by a perceptual hash, within a manifest and
between manifests. image_checks.py checks one photo; contact_sheet.py draws; data_card.py writes the card.
"""

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..command_config import ValidateConfig
from ..config_fields import Reading
from ..console import Console
from ..errors import EarTeachError, ManifestError, UsageError
from ..files import printable, refuse_existing, whole_file
from .boxes import Box
from .contact_sheet import contact_sheet
from .crop import REASONS
from .data_card import data_card, stated
from .image_checks import WARNINGS, CropStats, inspect_all, near_pairs, photos_of
from .manifest import Manifest, keep_rows, print_summary, read_manifest, write_manifest
from .texts import Texts

ERRORS = {"manifest": "the manifest cannot be read", **REASONS}
_MEANINGS = ERRORS | WARNINGS

Ear = tuple[int, int]  # (position of the manifest among the sources, position of the ear in it)


@dataclass(frozen=True)
class Finding:
    """One problem of one ear.

    `row`: as the file counts rows; `ear`: position in the manifest (a row may have several boxes); both None if the
    whole manifest is meant. `other`: the row that it duplicates, as `manifest row N (path)`.
    """

    reason: str
    manifest: str
    row: int | None
    ear: int | None
    path: str
    detail: str
    other: str | None = None

    @property
    def is_error(self) -> bool:
        """Whether the ear cannot be used; otherwise it is a warning."""
        return self.reason in ERRORS


@dataclass
class Report:
    """What was checked, and what was found."""

    manifests: list[str]
    rows: int
    images: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Number of errors."""
        return sum(f.is_error for f in self.findings)

    @property
    def warnings(self) -> int:
        """Number of warnings."""
        return len(self.findings) - self.errors

    def by_reason(self) -> dict[str, list[Finding]]:
        """Return the findings by reason: errors first, each group in manifest order."""
        groups = defaultdict(list)
        for finding in self.findings:
            groups[finding.reason].append(finding)
        return {reason: groups[reason] for reason in (*ERRORS, *WARNINGS) if reason in groups}

    def as_dict(self) -> dict[str, Any]:
        """Return the content of the JSON report."""
        return {
            "manifests": self.manifests,
            "rows": self.rows,
            "pictures": self.images,
            "errors": self.errors,
            "warnings": self.warnings,
            "counts": {reason: len(group) for reason, group in self.by_reason().items()},
            "findings": [{"severity": "error" if f.is_error else "warning", **asdict(f)} for f in self.findings],
        }


def validate_data(sources: list[str], config: ValidateConfig, console: Console) -> Report:
    """Check manifests and write the outputs that `config` names.

    A manifest that cannot be read is a finding. Raises EarTeachError if an output cannot be written.
    """
    _refuse_outputs(sources, config)
    manifests, findings = _read_all(sources, config)
    for manifest in manifests:
        print_summary(manifest, console)
    report = Report(list(sources), sum(map(len, manifests)), 0, findings)
    stats = _inspect_images(manifests, report, config.num_workers, console)
    report.findings += _duplicate_rows(manifests) + _duplicate_images(manifests, stats)
    order = {m.source: i for i, m in enumerate(manifests)}
    report.findings.sort(key=lambda f: (order.get(f.manifest, -1), -1 if f.ear is None else f.ear))
    _write_outputs(manifests, report, stats, config, console)
    return report


def _refuse_outputs(sources: list[str], config: ValidateConfig) -> None:
    """Raise EarTeachError if an output cannot be written, before any image is read."""
    if config.card is not None and Path(config.card).suffix.lower() != ".md":
        raise UsageError(f"--card {printable(config.card)}: is written as Markdown; name a .md file")
    outputs = [config.json, config.contact_sheet, config.write_clean, config.card]
    paths = [path for path in outputs if path and path != "-"]
    for path in paths:
        refuse_existing(path, config.overwrite, inputs=sources)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError(f"{printable(paths[0])}: two outputs have the same name; give each its own")
    if config.write_clean and len(sources) != 1:
        raise UsageError(f"--write-clean: needs one manifest, not {len(sources)}; clean them one at a time")


def _read_all(sources: list[str], config: ValidateConfig) -> tuple[list[Manifest], list[Finding]]:
    manifests, findings = [], []
    for source in sources:
        try:
            manifests.append(read_manifest(source, config.root_dir, config.reading))
        except ManifestError as error:
            findings.append(Finding("manifest", source, None, None, "", str(error)))
    return manifests, findings


def _inspect_images(
    manifests: list[Manifest], report: Report, num_workers: int, console: Console
) -> dict[Ear, CropStats]:
    """Decode every photo once, in parallel; add findings to the report, return the statistics of each crop."""
    photos = [photo for number, manifest in enumerate(manifests) for photo in photos_of(manifest, number)]
    report.images = len(photos)
    stats: dict[Ear, CropStats] = {}
    results = inspect_all(photos, num_workers)
    with console.progress("checking", len(photos), "images") as steps:
        for photo, (problems, crops) in zip(photos, results, strict=True):
            manifest = manifests[photo.manifest]
            report.findings += [_finding(reason, manifest, index, detail) for index, reason, detail in problems]
            stats.update({(photo.manifest, index): crop for index, crop in crops})
            steps.advance()
    return stats


def _duplicate_rows(manifests: list[Manifest]) -> list[Finding]:
    """Find rows with the image and the box of an earlier row of the same manifest."""
    findings = []
    for manifest in manifests:
        for ears in Texts.of(manifest.paths).groups():
            first: dict[Box | None, int] = {}
            for index in ears if len(ears) > 1 else ():
                other = first.setdefault(manifest.boxes[index], index)
                if other != index:
                    findings.append(
                        _finding("duplicate-row", manifest, index, "same image, same box", manifest.where(other))
                    )
    return findings


def _duplicate_images(manifests: list[Manifest], stats: dict[Ear, CropStats]) -> list[Finding]:
    """Find images of the same content, and crops that are almost the same.

    Each ear is reported once per reason, with the first ear that it repeats.
    """
    ears = sorted(stats)
    findings, reported = [], set()

    def report(later: Ear, earlier: Ear, reason: str, detail: str) -> None:
        if (later, reason) not in reported:
            reported.add((later, reason))
            other = manifests[earlier[0]].where(earlier[1])
            findings.append(_finding(reason, manifests[later[0]], later[1], detail, other))

    first_of: dict[bytes, Ear] = {}
    for ear in ears:
        earlier = first_of.setdefault(stats[ear].digest, ear)
        if earlier[0] != ear[0]:
            report(ear, earlier, "leak-photo", "same file content")
        elif manifests[ear[0]].paths[ear[1]] != manifests[earlier[0]].paths[earlier[1]]:
            report(ear, earlier, "duplicate-image", "same file content")
    for i, j in near_pairs(stats[ear].hash for ear in ears):
        earlier, later = ears[i], ears[j]
        if stats[earlier].digest != stats[later].digest:
            bits = (stats[earlier].hash ^ stats[later].hash).bit_count()
            reason = "near-duplicate" if earlier[0] == later[0] else "leak-near-duplicate"
            report(later, earlier, reason, f"{bits} of 128 hash bits differ")
    return findings


def _finding(reason: str, manifest: Manifest, index: int, detail: str, other: str | None = None) -> Finding:
    return Finding(reason, manifest.source, manifest.rows[index], index, manifest.paths[index], detail, other)


def _write_outputs(
    manifests: list[Manifest], report: Report, stats: dict[Ear, CropStats], config: ValidateConfig, console: Console
) -> None:
    if config.json and config.json != "-":
        with whole_file(config.json) as temporary:
            temporary.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if config.contact_sheet:
        wrong = {(f.manifest, f.ear) for f in report.findings if f.reason.startswith("box-") and f.is_error}
        sheet = contact_sheet(manifests, wrong, stats)
        if sheet is None:
            console.warn(f"{config.contact_sheet}: no crop could be made; no contact sheet was written")
        else:
            with whole_file(config.contact_sheet) as temporary:
                sheet.save(temporary, format="PNG")
    if config.card:
        counts = {reason: (len(group), _MEANINGS[reason]) for reason, group in report.by_reason().items()}
        sizes = {ear: crop.size for ear, crop in stats.items()}
        consent, license = stated(config.consent, "consent"), stated(config.license, "license")
        with whole_file(config.card) as temporary:
            temporary.write_text(data_card(manifests, sizes, counts, consent, license), encoding="utf-8")
    if config.write_clean and manifests:
        kept = _write_clean(manifests[0], report, config.write_clean, config.reading)
        total, root = len(manifests[0]), manifests[0].root
        console.info(f"{config.write_clean}: {kept} of {total} rows; read it with --root-dir {root}")


def _write_clean(manifest: Manifest, report: Report, path: str, reading: Reading | None) -> int:
    """Write the ears without errors, in the layout of the list if the suffix is the same; return how many."""
    wrong = {finding.ear for finding in report.findings if finding.is_error}
    kept = [i for i in range(len(manifest)) if i not in wrong]
    if not kept:
        raise EarTeachError(f"{printable(manifest.source)}: every row has an error; nothing to write")
    if Path(path).suffix.lower() == Path(manifest.source).suffix.lower() and Path(manifest.source).is_file():
        keep_rows(manifest, kept, path, reading.identity_column if reading else None)
    else:
        write_manifest(manifest.subset(kept), path)
    return len(kept)

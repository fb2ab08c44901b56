"""`validate-data`: look at every image and every box before days are spent on them. No torch on the way.

Each photo is decoded once, wholly, in parallel; each ear is cut out as training would. What is wrong is
listed by reason, with row and path; duplicates are found by content, near duplicates by a perceptual hash,
within a manifest and between manifests.
"""

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..config import Reading
from ..console import Console
from ..errors import EarTeachError, ImageError, ManifestError, UsageError
from ..files import printable, refuse_existing, whole_file
from .box_drawing import Photo as BoxedPhoto
from .box_drawing import photo_page
from .boxes import Box
from .crop import REASONS, cut, read_image
from .data_card import data_card, stated
from .image_checks import PREVIEW, SMALL, WARNINGS, CropStats, inspect_all, near_pairs, photos_of
from .manifest import Manifest, keep_rows, read_manifest, tell, write_manifest

ERRORS = {"manifest": "the manifest cannot be read", **REASONS}
_MEANINGS = ERRORS | WARNINGS


@dataclass(frozen=True)
class Finding:
    """One thing about one ear. `row`: as the file counts; `ear`: position in the manifest (a row may hold
    several boxes); `other`: the row it duplicates, as `manifest row N (path)`."""

    reason: str
    manifest: str
    row: int | None
    ear: int | None
    path: str
    detail: str
    other: str | None = None

    @property
    def is_error(self) -> bool:
        return self.reason in ERRORS


@dataclass
class Report:
    manifests: list[str]
    rows: int
    images: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(f.is_error for f in self.findings)

    @property
    def warnings(self) -> int:
        return len(self.findings) - self.errors

    def by_reason(self) -> dict[str, list[Finding]]:
        """Errors first, each group in manifest order."""
        groups = defaultdict(list)
        for finding in self.findings:
            groups[finding.reason].append(finding)
        return {reason: groups[reason] for reason in (*ERRORS, *WARNINGS) if reason in groups}

    def as_dict(self) -> dict[str, Any]:
        return {
            "manifests": self.manifests,
            "rows": self.rows,
            "pictures": self.images,
            "errors": self.errors,
            "warnings": self.warnings,
            "counts": {reason: len(group) for reason, group in self.by_reason().items()},
            "findings": [{"severity": "error" if f.is_error else "warning", **asdict(f)} for f in self.findings],
        }


def validate_data(
    sources: list[str],
    console: Console,
    *,
    root_dir: str | None = None,
    reading: Reading | None = None,
    json_file: str | None = None,
    contact_sheet: str | None = None,
    write_clean: str | None = None,
    card: str | None = None,
    consent: str | None = None,
    license: str | None = None,
    num_workers: int = 8,
    overwrite: bool = False,
) -> Report:
    """Check manifests; write what was asked for. Raises EarTeachError only if an output cannot be written."""
    if card is not None and Path(card).suffix.lower() != ".md":
        raise UsageError(f"--card {printable(card)}: is Markdown; name a .md file")
    outputs = [path for path in (json_file, contact_sheet, write_clean, card) if path and path != "-"]
    for path in outputs:
        refuse_existing(path, overwrite, inputs=sources)
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise UsageError(f"{printable(outputs[0])}: two outputs have one name; give each its own")
    if write_clean and len(sources) != 1:
        raise UsageError(f"--write-clean: needs one manifest, not {len(sources)}; clean them one at a time")
    manifests, findings = _read_all(sources, root_dir, reading)
    for manifest in manifests:
        tell(manifest, console)
    report = Report(list(sources), sum(map(len, manifests)), 0, findings)
    seen: dict[tuple[int, int], CropStats] = {}
    _look(manifests, report, seen, num_workers, console)
    report.findings += _duplicate_rows(manifests) + _duplicates(manifests, seen)
    order = {m.source: i for i, m in enumerate(manifests)}
    report.findings.sort(key=lambda f: (order.get(f.manifest, -1), -1 if f.ear is None else f.ear))
    if json_file and json_file != "-":
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if contact_sheet:
        _draw_sheet(manifests, report, seen, contact_sheet, console)
    if card:
        counts = {reason: (len(group), _MEANINGS[reason]) for reason, group in report.by_reason().items()}
        sizes = {place: look.size for place, look in seen.items()}
        with whole_file(card) as temporary:
            temporary.write_text(
                data_card(manifests, sizes, counts, stated(consent, "consent"), stated(license, "license")),
                encoding="utf-8",
            )
    if write_clean and manifests:
        kept = _write_clean(manifests[0], report, write_clean, reading)
        console.info(
            f"{printable(write_clean)}: {kept} of {len(manifests[0])} rows; read it with --root-dir {printable(manifests[0].root)}"
        )
    return report


def _write_clean(manifest: Manifest, report: Report, path: str, reading: Reading | None) -> int:
    """Write the ears without an error, in the layout of the list where the suffix is the same; returns how many."""
    bad = {finding.ear for finding in report.findings if finding.is_error}
    kept = [i for i in range(len(manifest)) if i not in bad]
    if not kept:
        raise EarTeachError(f"{printable(manifest.source)}: no row is without an error; nothing to write")
    if Path(path).suffix.lower() == Path(manifest.source).suffix.lower() and Path(manifest.source).is_file():
        keep_rows(manifest, kept, path, reading.identity_column if reading else None)
    else:
        write_manifest(manifest.subset(kept), path)
    return len(kept)


def _read_all(
    sources: list[str], root_dir: str | None, reading: Reading | None
) -> tuple[list[Manifest], list[Finding]]:
    manifests, findings = [], []
    for source in sources:
        try:
            manifests.append(read_manifest(source, root_dir, reading))
        except ManifestError as error:
            findings.append(Finding("manifest", source, None, None, "", str(error)))
    return manifests, findings


def _look(manifests: list[Manifest], report: Report, seen: dict, num_workers: int, console: Console) -> None:
    """Decode every photo once, in parallel, and collect findings and what each ear looks like."""
    jobs = [job for number, manifest in enumerate(manifests) for job in photos_of(manifest, number)]
    report.images = len(jobs)
    with console.progress("looking at", len(jobs), "pictures") as steps:
        for job, (findings, looks) in zip(jobs, inspect_all(jobs, num_workers), strict=True):
            manifest = manifests[job.manifest]
            for index, reason, detail in findings:
                report.findings.append(_finding(reason, manifest, index, detail))
            seen.update({(job.manifest, index): look for index, look in looks})
            steps.advance()


def _duplicate_rows(manifests: list[Manifest]) -> list[Finding]:
    findings = []
    for manifest in manifests:
        first: dict[tuple[str, Box | None], int] = {}
        for index, key in enumerate(zip(manifest.paths, manifest.boxes, strict=True)):
            if key in first:
                findings.append(
                    _finding("duplicate-row", manifest, index, "same image, same box", manifest.where(first[key]))
                )
            else:
                first[key] = index
    return findings


def _duplicates(manifests: list[Manifest], seen: dict[tuple[int, int], CropStats]) -> list[Finding]:
    """Same file content, and near-same crops; each row is named once, against the first it repeats."""
    keys = sorted(seen)
    findings, named = [], set()

    def name(later: tuple[int, int], earlier: tuple[int, int], reason: str, detail: str) -> None:
        if (later, reason) not in named:
            named.add((later, reason))
            other = manifests[earlier[0]].where(earlier[1])
            findings.append(_finding(reason, manifests[later[0]], later[1], detail, other))

    first_of: dict[bytes, tuple[int, int]] = {}
    for key in keys:
        earlier = first_of.setdefault(seen[key].digest, key)
        if earlier[0] != key[0]:
            name(key, earlier, "leak-photo", "same file content")
        elif manifests[key[0]].paths[key[1]] != manifests[earlier[0]].paths[earlier[1]]:
            name(key, earlier, "duplicate-image", "same file content")
    for i, j in near_pairs(seen[key].hash for key in keys):
        earlier, later = keys[i], keys[j]
        if seen[earlier].digest != seen[later].digest:
            bits = (seen[earlier].hash ^ seen[later].hash).bit_count()
            name(
                later,
                earlier,
                "near-duplicate" if earlier[0] == later[0] else "leak-near-duplicate",
                f"{bits} of 128 hash bits differ",
            )
    return findings


def _finding(reason: str, manifest: Manifest, index: int, detail: str, other: str | None = None) -> Finding:
    return Finding(reason, manifest.source, manifest.rows[index], index, manifest.paths[index], detail, other)


def _draw_sheet(
    manifests: list[Manifest], report: Report, seen: dict[tuple[int, int], CropStats], path: str, console: Console
) -> None:
    """Photos with their boxes, which show whether the list is read as it was meant, above the worst crops."""
    pages = [page for page in (_photos(manifests, report), _worst_crops(manifests, seen)) if page is not None]
    if not pages:
        console.warn(f"{printable(path)}: not one crop could be made; no contact sheet was written")
        return
    sheet = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), (250, 250, 248))
    top = 0
    for page in pages:
        sheet.paste(page, (0, top))
        top += page.height
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


_RIGHT, _WRONG = (0, 140, 70), (214, 40, 40)


def _photos(manifests: list[Manifest], report: Report, most: int = 10) -> Image.Image | None:
    """Up to ten photos with all their boxes, up to half of them with a wrong one; None if no row has a box."""
    wrong = {(f.manifest, f.ear) for f in report.findings if f.reason.startswith("box-") and f.is_error}
    boxed: dict[tuple[int, str], list[int]] = defaultdict(list)
    for number, manifest in enumerate(manifests):
        for index, box in enumerate(manifest.boxes):
            if box is not None:
                boxed[number, manifest.paths[index]].append(index)
    bad = [key for key, rows in boxed.items() if any((manifests[key[0]].source, i) in wrong for i in rows)]
    good = [key for key in boxed if key not in set(bad)]
    first = _spread(bad, max(most // 2, most - len(good)))
    shown: list[BoxedPhoto] = []
    for number, name in first + _spread(good, most - len(first)):
        manifest, rows = manifests[number], boxed[number, name]
        try:
            photo = read_image(manifest.file(rows[0])).image
        except ImageError:
            continue
        colours = [_WRONG if (manifest.source, i) in wrong else _RIGHT for i in rows]
        boxes = [(manifest.boxes[i], colour) for i, colour in zip(rows, colours, strict=True)]
        place = f"{printable(Path(manifest.source).stem)[:16]} {manifest.rows[rows[0]]}"
        shown.append((photo, boxes, f"{place}: {photo.width} x {photo.height}"))
    legend = [("box", _RIGHT), *([("wrong box", _WRONG)] if bad else [])]
    return (
        photo_page(shown, f"{len(shown)} of {len(boxed)} photos with boxes, as they were read", legend)
        if shown
        else None
    )


def _spread(keys: list, most: int) -> list:
    """At most `most` of the keys, evenly spread."""
    return keys if len(keys) <= most else [keys[i * len(keys) // most] for i in range(most)]


def _worst_crops(
    manifests: list[Manifest], seen: dict[tuple[int, int], CropStats], most: int = 60
) -> Image.Image | None:
    """The smallest crops, then the blurriest, each with its row and size; None if no crop could be made."""
    worst = sorted(seen, key=lambda key: (min(seen[key].size, SMALL), seen[key].sharpness))[:most]
    if not worst:
        return None
    side, gap, foot, head, columns = 120, 8, 34, 34, min(10, len(worst))
    rows = -(-len(worst) // columns)
    page = Image.new(
        "RGB", (max(560, columns * (side + gap) + gap), head + rows * (side + foot + gap)), (250, 250, 248)
    )
    draw = ImageDraw.Draw(page)
    title = f"the {len(worst)} smallest and blurriest of {len(seen)} ears"
    draw.text((gap, 8), title, fill=(24, 28, 36), font=ImageFont.load_default(16))
    for place, (number, index) in enumerate(worst):
        x, y = gap + place % columns * (side + gap), head + place // columns * (side + foot + gap)
        manifest, look = manifests[number], seen[(number, index)]
        crop = cut(read_image(manifest.file(index)).image, manifest.boxes[index], PREVIEW)
        page.paste(crop.resize((side, side), Image.Resampling.NEAREST), (x, y))
        label = (
            f"{Path(manifest.source).stem[:16]} {manifest.rows[index]}\n{look.size:.0f} px, sharp {look.sharpness:.0f}"
        )
        draw.text((x, y + side + 2), label, fill=(90, 96, 108), font=ImageFont.load_default(11))
    return page

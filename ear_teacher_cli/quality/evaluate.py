"""Command `evaluate`: compute identity metrics with intervals, curves and a look-alike sheet from embeddings and labels.

Does not import torch, unless images are embedded first (`weights`).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..command_config import EvaluateConfig
from ..console import Console
from ..data.manifest import print_summary, read_input
from ..embedding.files import Embeddings, read_embeddings, read_rows, space_of
from ..errors import EarTeachError, UsageError
from ..files import printable, refuse_existing, whole_file
from ..model.whitening import Whitening, centre, fit
from . import identity_metrics
from .scoring import Evaluation, System, excludes_0, look_alike_sheet, score

_BLOCK = 4096


def evaluate(sources: Sequence[str], labels: str | None, config: EvaluateConfig, console: Console) -> Evaluation:
    """Compute the identity metrics of one file of embeddings, or compare two on the rows that both have.

    `labels`: a manifest with identities; None: the identities in the embeddings' own list, else the names of the images'
    folders. Writes the outputs that `config` names. Raises EarTeachError.
    """
    _refuse_outputs(sources, labels, config)
    if config.sheet and len(sources) > 1:
        raise UsageError("--sheet: shows the pairs of one file; leave --compare out")
    transforms = _transforms(sources, config.center, config.whiten, config.whiten_dim)
    files = (
        [read_embeddings(source) for source in sources]
        if config.weights is None
        else [_embed(sources, config, console)]
    )
    for option, fitted_on in (("--center", config.center), ("--whiten", config.whiten)):
        for file, other in zip(files, fitted_on, strict=False):
            _refuse_mixture(file, option, other, console)
    evaluation = score(files, transforms, labels, config, console)
    if len(files) > 1 and files[0].whitened != files[1].whitened and not config.whiten:
        console.warn(
            "--compare: only one file is whitened (by its run), which accounts for part of the difference; "
            "use --whiten FILE for the other, or embed both with --no-whiten"
        )
    if config.json not in (None, "-"):
        with whole_file(config.json) as temporary:
            temporary.write_text(json.dumps(evaluation.as_dict(), indent=2) + "\n", encoding="utf-8")
    if config.plots is not None:
        _write_plots(evaluation, Path(config.plots))
    if config.sheet is not None:
        from ..drawing import save_image

        root = config.root_dir or evaluation.root or files[-1].root
        save_image(look_alike_sheet(evaluation, files[-1], root, console), config.sheet)
    return evaluation


def _embed(sources: Sequence[str], config: EvaluateConfig, console: Console) -> Embeddings:
    """Embed the images of the only source with `config.weights`."""
    from ..embedding.embedder import embed_manifest, load_embedder

    if len(sources) > 1:
        raise UsageError("--weights: --compare takes embeddings; embed the images with each first")
    manifest = read_input(sources[0], config.root_dir, config.reading)
    whiten = not config.raw
    embedder = load_embedder(config.weights, config.backbone, config.image_size, whiten)
    print_summary(manifest, console)
    console.info(f"weights: {embedder.receipt}; {embedder.architecture}, {embedder.preprocessing.image_size} px")
    return embed_manifest(embedder, manifest, config.batch_size, config.num_workers, console, whiten)


def table(report: Evaluation) -> str:
    """Return the metrics as a text table: in percent, differences in percentage points."""
    two = len(report.systems) > 1
    names = [printable(Path(system.name).name) for system in report.systems]
    heads = [
        [f"{letter}: {name}", *_described(system)]
        for letter, name, system in zip("AB"[: len(names)], names, report.systems, strict=True)
    ]
    lines = [", ".join(head if two else [head[0][3:], *head[1:]]) for head in heads]
    counts = report.counts
    kinds = (
        f"{counts['identities']} ears of {counts['people']} people" if report.by_sides else f"{counts['people']} people"
    )
    lines.append(
        f"{counts['pictures']} images, {kinds}; {counts['queries']} queries, {counts['genuine_pairs']} genuine and "
        f"{counts['impostor_pairs']} impostor pairs; rank-1 by chance {100 * report.chance:.1f} %"
    )
    interval = f"95 % interval ({report.resamples} resamples)" if report.resamples else ""
    rows = [["", "A, %", "B, %", "B - A", interval, ""] if two else ["", "%", interval]]
    for place, figure in enumerate(report.systems[0].measured.figures):
        if two:
            change = report.difference[place]
            values = [f"{100 * figure.value:.1f}", f"{100 * report.systems[1].measured.figures[place].value:.1f}"]
            mark = "*" if excludes_0(change) else ""
            rows.append([figure.name, *values, f"{100 * change.value:+.1f}", _interval(change, "+"), mark])
        else:
            rows.append([figure.name, f"{100 * figure.value:.1f}", _interval(figure)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = range(1, 4) if two else range(1, 2)
    for row in rows:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if two and any(map(excludes_0, report.difference)):
        lines.append("* the interval of the difference excludes 0")
    return "\n".join(lines)


def _described(system: System) -> list[str]:
    return [part for part in (f"weights {printable(system.weights)}" if system.weights else "", f"{system.dim} dimensions", printable(system.transform)) if part]  # fmt: skip


def _interval(figure: identity_metrics.Figure, sign: str = "") -> str:
    return "" if math.isnan(figure.low) else f"[{100 * figure.low:{sign}.1f}, {100 * figure.high:{sign}.1f}]"


def _refuse_outputs(sources: Sequence[str], labels: str | None, config: EvaluateConfig) -> None:
    """Raise EarTeachError if an output exists (without `overwrite`), is an input, or cannot be written."""
    from .plots import PLOTS

    beside = [Path(source).with_suffix(suffix) for source in sources for suffix in (".csv", ".json") if source != "-"]
    inputs: list[str | Path | None] = [*sources, *beside, labels, config.weights, *config.center, *config.whiten]
    outputs = [Path(path) for path in (config.json, config.sheet) if path not in (None, "-")]
    if config.sheet is not None and Path(config.sheet).suffix.lower() != ".png":
        raise UsageError(f"--sheet {printable(config.sheet)}: is written as PNG; name a .png file")
    if config.plots is not None:
        folder = Path(config.plots)
        if folder.exists() and not folder.is_dir():
            raise EarTeachError(f"{printable(folder)}: is a file; --plots names a folder")
        outputs += [folder / name for name in PLOTS] if folder.is_dir() else [folder]
    for path in outputs:
        refuse_existing(path, config.overwrite, inputs)


def _transforms(
    sources: Sequence[str], centre_on: Sequence[str], whiten_on: Sequence[str], whiten_dim: int | None
) -> list[tuple[Whitening | None, str]]:
    """Return for each source the transform of its rows (None: none) and its description."""
    for flag, given in (("--center", centre_on), ("--whiten", whiten_on)):
        if given and len(given) != len(sources):
            raise UsageError(
                f"{flag}: given {len(given)} times for {len(sources)} files of embeddings; give it once for each, in "
                "their order ('none' for no transform)"
            )
    if whiten_dim is not None and not any(name != "none" for name in whiten_on):
        raise UsageError("--whiten-dim: there is no whitening; give --whiten FILE too")
    found: list[tuple[Whitening | None, str]] = []
    for place in range(len(sources)):
        chosen = [given[place] if given else "none" for given in (centre_on, whiten_on)]
        if "none" not in chosen:
            raise UsageError("--center: --whiten centres, too; give one of the two for each file")
        centred, whitened = chosen
        if centred != "none":
            found.append((centre(_finite(centred)), f"centred on {Path(centred).name}"))
        elif whitened != "none":
            transform = fit(_finite(whitened), whiten_dim)
            found.append((transform, f"whitened on {Path(whitened).name}"))
        else:
            found.append((None, ""))
    return found


def _refuse_mixture(file: Embeddings, flag: str, other: str, console: Console) -> None:
    """Raise EarTeachError if `other`, on which a transform is fitted, was embedded with other weights or whitening than `file`.

    Warns where the weights of one of them are unknown.
    """
    if other == "none":
        return
    mark, whitened = space_of(other)
    if not mark or not file.fingerprint:
        unknown = printable(file.source if mark else other)
        console.warn(
            f"{flag} {printable(other)}: the .json beside {unknown} has no fingerprint of the weights, so the two may come from different weights"
        )
        return
    if (mark, whitened) == (file.fingerprint, file.whitened):
        return
    kinds = ["raw", "whitened by its run"]
    found = (
        f"was embedded with other weights or preprocessing (fingerprint {printable(mark[:16])}, not {printable(file.fingerprint[:16])})"
        if mark != file.fingerprint
        else f"is {kinds[whitened]}, {printable(file.source)} is {kinds[file.whitened]}"
    )
    raise EarTeachError(f"{flag} {printable(other)}: {found}; embed both with the same weights and options")


def _finite(source: str) -> np.ndarray:
    """Read embeddings. Raises EarTeachError naming the first row that is not finite."""
    rows = read_rows(source)
    for start in range(0, len(rows), _BLOCK):
        bad = np.flatnonzero(~np.isfinite(rows[start : start + _BLOCK]).all(1))
        if len(bad):
            raise EarTeachError(f"{printable(source)} row {start + bad[0]}: holds NaN or infinity; embed again")
    return rows


def _write_plots(report: Evaluation, folder: Path) -> None:
    from .plots import Curve, draw_plots

    folder.mkdir(exist_ok=True)
    names = [Path(system.name).stem for system in report.systems]
    if len(names) > 1:
        names = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    curves = [Curve(printable(name), system.measured) for name, system in zip(names, report.systems, strict=True)]
    draw_plots(folder, curves, identity_metrics.smallest_far(report.counts["impostor_pairs"]))

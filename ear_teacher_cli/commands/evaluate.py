"""`evaluate`: embeddings and who is on them in; identity scores with intervals, curves and a look-alike sheet out.

No torch on the way, unless pictures are to be embedded first (`weights`).
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainConfig
from ..core import metrics, pairs
from ..core.metrics import Measured
from ..core.pairs import Order
from ..core.whitening import Whitening, centre, fit, unit
from ..data.embeddings import Embeddings, read_embeddings, read_rows, space_of
from ..data.labels import common_rows, distinct_rows, labelled_rows, labels_of
from ..data.manifest import Manifest, read_input
from ..errors import EarTeachError, PictureError, WordsError
from ..files import printable, refuse_existing, whole_file
from ..talk import Talk

FEW_PEOPLE = 20
LOOK_ALIKES = 12
_BLOCK = 4096


@dataclass(frozen=True)
class System:
    """One file's part of a report. `transform`: what was done to its rows, as in 'whitened on x.npy'."""

    name: str
    weights: str
    dim: int
    transform: str
    measured: Measured


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `difference`: second minus first, of two systems."""

    systems: list[System]
    difference: list[metrics.Figure]
    counts: dict[str, int]
    left_out: dict[str, int]
    by_sides: bool
    chance: float
    resamples: int
    seed: int
    drawn: int
    look_alikes: dict[str, list[dict[str, Any]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; shares are from 0 to 1, and null where there is none."""
        return {
            "systems": [
                {
                    "file": system.name,
                    "weights": system.weights,
                    "dim": system.dim,
                    "transform": system.transform,
                    "figures": [_figure(figure) for figure in system.measured.figures],
                    "cmc": [[_number(value) for value in rank] for rank in system.measured.cmc.tolist()],
                }
                for system in self.systems
            ],
            "difference": [_figure(figure) | {"excludes_0": excludes_0(figure)} for figure in self.difference],
            "identity": "person and side" if self.by_sides else "person",
            "counts": self.counts,
            "left_out": self.left_out,
            "rank-1 by chance": self.chance,
            "bootstrap": {"resamples": self.resamples, "seed": self.seed, "drawn": self.drawn},
            "look_alikes": self.look_alikes,
        }


def evaluate(
    sources: Sequence[str],
    labels: str | None = None,
    *,
    weights: str | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    centre_on: Sequence[str] = (),
    whiten_on: Sequence[str] = (),
    whiten_dim: int | None = None,
    whitened: bool = True,
    fars: Sequence[float] = (),
    by_sides: bool = True,
    bootstrap: int = 1000,
    seed: int = 0,
    json_file: str | None = None,
    plots: str | None = None,
    sheet: str | None = None,
    root_dir: str | None = None,
    batch_size: int = 32,
    num_workers: int = 8,
    overwrite: bool = False,
    talk: Talk,
) -> Report:
    """Score one file of embeddings, or compare two on the rows both have.

    `labels`: a manifest with identities, or None for what the embeddings' own list says, else the name of each
    picture's folder. `whitened`: pictures are embedded with the whitening of their `weights`, where these have one.
    `centre_on`, `whiten_on`: none, or for each source a file of embeddings or 'none'. `fars` empty:
    metrics.FARS as far as the impostor pairs carry them. Raises EarTeachError.
    """
    beside = [Path(source).with_suffix(suffix) for source in sources for suffix in (".csv", ".json") if source != "-"]
    inputs = (*sources, *beside, labels, weights, *centre_on, *whiten_on)
    _refuse_outputs(json_file, plots, sheet, overwrite, inputs)
    if sheet and len(sources) > 1:
        raise WordsError("--sheet: shows one file's pairs; leave --compare out")
    transforms = _transforms(sources, centre_on, whiten_on, whiten_dim)
    if weights is not None:
        if len(sources) > 1:
            raise WordsError("--weights: --compare takes embeddings; embed the pictures with each first")
        files = [
            _embedded(sources[0], weights, backbone, image_size, root_dir, batch_size, num_workers, whitened, talk)
        ]
    else:
        files = [read_embeddings(source) for source in sources]
    for flag, fitted_on in (("--center", centre_on), ("--whiten", whiten_on)):
        for file, other in zip(files, fitted_on, strict=False):
            _refuse_mixture(file, flag, other, talk)
    left_out: dict[str, int] = {}
    rows = common_rows(files, left_out, talk)
    people, sides, root = labels_of(files, rows, labels, root_dir, talk)
    rows, people, sides = labelled_rows(rows, people, sides if by_sides else None, left_out, talk)
    rows, people, sides = distinct_rows(files, rows, people, sides, left_out, talk)
    order = pairs.arrange(people, sides, seed)
    places = [np.asarray(own)[order.index] for own in rows]
    fars = _fars(order, fars, talk)
    drawn = metrics.resamples(order.groups, bootstrap, seed)
    systems = []
    for file, own, (transform, said) in zip(files, places, transforms, strict=True):
        measured = metrics.measure(_unit_rows(file, own, transform), order, fars, drawn)
        made = ", ".join(part for part in ("whitened by its run" if file.whitened else "", said) if part)
        systems.append(System(file.source, file.weights, _dim(file, transform), made, measured))
    if len(files) > 1 and files[0].whitened != files[1].whitened and not whiten_on:
        talk.warn(
            "--compare: one file is whitened by its run and the other is not, which is part of the difference; "
            "--whiten FILE for the other, or embed with --no-whiten, takes it out"
        )
    report = _report(systems, order, sides is not None, left_out, bootstrap, seed)
    report.look_alikes.update(_look_alikes(systems[-1], order, files[-1], places[-1], people, sides))
    _say_limits(report, talk)
    if json_file not in (None, "-"):
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if plots is not None:
        _write_plots(report, Path(plots))
    if sheet is not None:
        _write_sheet(report, files[-1], root_dir or root or files[-1].root, sheet, talk)
    return report


def excludes_0(figure: metrics.Figure) -> bool:
    return figure.low > 0 or figure.high < 0


def table(report: Report) -> str:
    """For people: shares in per cent, differences in points."""
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
        f"{counts['pictures']} pictures, {kinds}; {counts['queries']} queries, {counts['genuine_pairs']} genuine and "
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
    if two and report.resamples:
        lines.append("* the interval of the difference excludes 0")
    return "\n".join(lines)


def _described(system: System) -> list[str]:
    return [part for part in (f"weights {printable(system.weights)}" if system.weights else "", f"{system.dim} numbers a picture", printable(system.transform)) if part]  # fmt: skip


def _interval(figure: metrics.Figure, sign: str = "") -> str:
    return "" if math.isnan(figure.low) else f"[{100 * figure.low:{sign}.1f}, {100 * figure.high:{sign}.1f}]"


def _refuse_outputs(json_file: str | None, plots: str | None, sheet: str | None, overwrite: bool, inputs: Sequence[str | Path | None]) -> None:  # fmt: skip
    from ..core.plots import PLOTS

    for path in [None if json_file == "-" else json_file, sheet]:
        if path is not None:
            refuse_existing(path, overwrite, inputs)
    if sheet is not None and Path(sheet).suffix.lower() != ".png":
        raise WordsError(f"--sheet {printable(sheet)}: is drawn as PNG; name a .png file")
    if plots is not None:
        if Path(plots).exists() and not Path(plots).is_dir():
            raise EarTeachError(f"{printable(plots)}: is a file; --plots names a folder")
        refuse_existing(Path(plots) / "x" if Path(plots).is_dir() else plots, overwrite, inputs)
        for name in PLOTS if Path(plots).is_dir() else ():
            refuse_existing(Path(plots) / name, overwrite, inputs)


def _transforms(
    sources: Sequence[str], centre_on: Sequence[str], whiten_on: Sequence[str], whiten_dim: int | None
) -> list[tuple[Whitening | None, str]]:
    """For each source what is done to its rows, and how that is said."""
    for flag, given in (("--center", centre_on), ("--whiten", whiten_on)):
        if given and len(given) != len(sources):
            raise WordsError(
                f"{flag}: given {len(given)} times for {len(sources)} files of embeddings; give it once for each, in "
                "their order ('none' leaves one as it is)"
            )
    if whiten_dim is not None and not any(name != "none" for name in whiten_on):
        raise WordsError("--whiten-dim: has nothing to whiten; give --whiten FILE too")
    found = []
    for place in range(len(sources)):
        chosen = [given[place] if given else "none" for given in (centre_on, whiten_on)]
        if "none" not in chosen:
            raise WordsError("--center: --whiten centres already; give one of the two for each file")
        centred, whitened = chosen
        if centred != "none":
            found.append((centre(_finite(centred)), f"centred on {Path(centred).name}"))
        elif whitened != "none":
            transform = fit(_finite(whitened), whiten_dim)
            found.append((transform, f"whitened on {Path(whitened).name}"))
        else:
            found.append((None, ""))
    return found


def _refuse_mixture(file: Embeddings, flag: str, other: str, talk: Talk) -> None:
    """Rows of two teachers, or raw and whitened ones, have nothing to say to each other."""
    if other == "none":
        return
    mark, whitened = space_of(other)
    if not mark or not file.fingerprint:
        unknown = printable(file.source if mark else other)
        talk.warn(
            f"{flag} {printable(other)}: the .json beside {unknown} names no weights, so they may be of another teacher"
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
    raise EarTeachError(f"{flag} {printable(other)}: {found}; embed both alike")


def _finite(source: str) -> np.ndarray:
    rows = read_rows(source)
    for start in range(0, len(rows), _BLOCK):
        bad = np.flatnonzero(~np.isfinite(rows[start : start + _BLOCK]).all(1))
        if len(bad):
            raise EarTeachError(f"{printable(source)} row {start + bad[0]}: holds NaN or infinity; embed again")
    return rows


def _embedded(
    source: str,
    weights: str,
    backbone: str | None,
    image_size: int | None,
    root_dir: str | None,
    batch_size: int,
    num_workers: int,
    whiten: bool,
    talk: Talk,
) -> Embeddings:
    """Pictures as embeddings in memory."""
    from ..core.embedder import embed_pictures, load_embedder

    manifest = read_input(source, root_dir)
    embedder = load_embedder(weights, backbone, image_size, whiten)
    talk.say(f"weights: {embedder.receipt}; {embedder.architecture}, {embedder.preprocessing.image_size} px")
    rows, kept = [], []
    for good, vectors, _ in embed_pictures(embedder, manifest, batch_size, num_workers, TrainConfig.load_timeout, talk):
        if good:
            rows.append(embedder.unit_rows(vectors, whiten))
            kept += good
    if not kept:
        raise EarTeachError(f"{printable(source)}: not one of {len(manifest)} pictures could be read; nothing to score")
    part = manifest.subset(kept)
    return Embeddings(
        source,
        np.concatenate(rows),
        part.paths,
        part.boxes,
        part.identities,
        part.sides,
        Path(embedder.source).name,
        embedder.whitening is not None and whiten,
        embedder.fingerprint,
        manifest.root,
    )


def _fars(order: Order, asked: Sequence[float], talk: Talk) -> list[float]:
    """The FARs asked for, or those of the usual ones that there are impostor pairs for."""
    count = metrics.impostor_pairs(order)
    least = metrics.smallest_far(count)
    for far in asked:
        if not 0 < far < 1:
            raise WordsError(f"--far {far:g}: is no rate; give one between 0 and 1")
        if far < least:
            digits = 10 ** (1 - math.floor(math.log10(least)))
            raise WordsError(
                f"--far {far:g}: too small for {count} impostor pairs, of which it accepts {far * count:.2g}; the "
                f"smallest they carry ({metrics.FALSE_ACCEPTS} false accepts) is {math.ceil(least * digits) / digits:g}"
            )
    if asked:
        return sorted(set(asked), reverse=True)
    usual = [far for far in metrics.FARS if far >= least]
    if not usual:
        talk.say(
            f"no TAR: {count} impostor pairs carry no FAR of {max(metrics.FARS):g} ({metrics.FALSE_ACCEPTS} false accepts)"
        )
    return usual


def _unit_rows(file: Embeddings, places: np.ndarray, transform: Whitening | None) -> np.ndarray:
    """float32 [N, D] unit rows of the places, a block at a time."""
    rows = np.empty((len(places), _dim(file, transform)), np.float32)
    for start in range(0, len(places), _BLOCK):
        block = file.rows[places[start : start + _BLOCK]]
        if transform is not None and block.shape[1] != len(transform.mean):
            raise EarTeachError(
                f"{printable(file.source)}: has {block.shape[1]} numbers a row, the file to centre or whiten on "
                f"{len(transform.mean)}; embed both with the same weights"
            )
        rows[start : start + _BLOCK] = unit(block) if transform is None else transform.apply(block)
    return rows


def _dim(file: Embeddings, transform: Whitening | None) -> int:
    return file.rows.shape[1] if transform is None or transform.matrix is None else transform.matrix.shape[1]


def _report(
    systems: list[System], order: Order, by_sides: bool, left_out: dict[str, int], bootstrap: int, seed: int
) -> Report:
    tally = systems[0].measured.tally
    counts = {
        "pictures": len(order.index),
        "identities": len(np.unique(order.ear)),
        "people": order.people,
        "singletons": int((np.bincount(order.ear) == 1).sum()),
        "queries": len(tally.first),
        "genuine_pairs": metrics.genuine_pairs(order),
        "impostor_pairs": metrics.impostor_pairs(order),
    }
    difference = []
    if len(systems) > 1:
        first, second = (system.measured for system in systems)
        for one, other in zip(first.figures, second.figures, strict=True):
            draws = second.draws[one.name] - first.draws[one.name] if one.name in first.draws else None
            difference.append(metrics.Figure(one.name, other.value - one.value, *metrics.interval(draws)))
    return Report(
        systems, difference, counts, left_out, by_sides, float(tally.chance.mean()), bootstrap, seed, order.groups, {}
    )


def _say_limits(report: Report, talk: Talk) -> None:
    counts = report.counts
    if counts["singletons"]:
        talk.say(f"{counts['singletons']} identities have one picture: they are impostors only, never queries")
    if report.drawn < counts["people"] and report.resamples:
        talk.say(f"the bootstrap draws {report.drawn} random groups of the {counts['people']} people")
    if counts["people"] < FEW_PEOPLE and report.resamples:
        talk.warn(f"intervals over {counts['people']} people are themselves rough; evaluate on {FEW_PEOPLE} or more")


def _look_alikes(
    system: System, order: Order, file: Embeddings, places: np.ndarray, people: list[str], sides: list[str] | None
) -> dict[str, list[dict[str, Any]]]:
    """The hardest pairs: one for each pair of identities, and one for each identity."""
    tally = system.measured.tally
    chosen = {
        "impostor": pairs.hardest(tally.nearest, order.ear, LOOK_ALIKES, high=True),
        "genuine": pairs.hardest(tally.farthest, order.ear, LOOK_ALIKES, high=False),
    }

    def about(row: int) -> dict[str, Any]:
        old = int(order.index[row])
        found = {"row": int(places[row]), "path": file.paths[places[row]], "identity": people[old]}
        return found | ({"side": sides[old]} if sides else {})

    return {
        kind: [{"similarity": similarity, "pictures": [about(row), about(other)]} for similarity, row, other in found]
        for kind, found in chosen.items()
    }


def _write_plots(report: Report, folder: Path) -> None:
    from ..core.plots import Curve, draw_plots

    folder.mkdir(exist_ok=True)
    names = [Path(system.name).stem for system in report.systems]
    if len(names) > 1:
        names = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    curves = [Curve(printable(name), system.measured) for name, system in zip(names, report.systems, strict=True)]
    draw_plots(folder, curves, metrics.smallest_far(report.counts["impostor_pairs"]))


def _write_sheet(report: Report, file: Embeddings, root: str | Path | None, sheet: str, talk: Talk) -> None:
    from ..core.pictures import Pair, pairs_sheet, save_picture
    from ..data.crop import cut, read_picture
    from ..data.inspect import PREVIEW

    manifest = Manifest(file.source, None if root is None else Path(root), file.paths, file.boxes, range(len(file)))
    look = replace(PREVIEW, image_size=132, interpolation="bicubic")
    sections, bad = [], Counter()
    titles = {"impostor": "Different identities, most alike", "genuine": "The same identity, least alike"}
    for kind, title in titles.items():
        drawn = []
        for pair in report.look_alikes[kind]:
            rows = [picture["row"] for picture in pair["pictures"]]
            try:
                crops = [cut(read_picture(manifest.file(row)).image, file.boxes[row], look) for row in rows]
            except PictureError as error:
                bad[error.detail] += 1
                continue
            names = tuple(printable(" ".join(_said(picture))) for picture in pair["pictures"])
            drawn.append(Pair(*crops, f"similarity {pair['similarity']:.3f}", names))
        sections.append((title, drawn))
    if bad:
        talk.warn(
            f"--sheet: {bad.total()} pairs left out, a picture of theirs cannot be read "
            f"({printable(bad.most_common(1)[0][0])}); --root-dir says where the pictures are"
        )
    if not any(drawn for _, drawn in sections):
        raise EarTeachError(f"{printable(sheet)}: not one pair's pictures could be read; give --root-dir")
    save_picture(pairs_sheet(sections), sheet)


def _said(picture: dict[str, Any]) -> list[str]:
    return [picture["identity"], *([picture["side"]] if "side" in picture else []), picture["path"]]


def _figure(figure: metrics.Figure) -> dict[str, Any]:
    return {"name": figure.name, "value": figure.value, "low": _number(figure.low), "high": _number(figure.high)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value

"""Compute the identity metrics of embeddings in memory, for `evaluate` and for the report of a run. Does not import torch."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..command_config import EvaluateConfig
from ..console import Console
from ..data.manifest import Manifest
from ..embedding.files import Embeddings
from ..errors import EarTeachError, ImageError, UsageError
from ..files import printable
from ..model.whitening import Whitening, unit
from . import identity_metrics, pairs
from .identity_metrics import Measured
from .labels import common_rows, distinct_rows, labelled_rows, labels_of
from .pairs import Order

FEW_PEOPLE = 20
LOOK_ALIKES = 12
_BLOCK = 4096


@dataclass(frozen=True)
class System:
    """Metrics of one file of embeddings. `transform`: describes what was applied to its rows ('whitened on x.npy')."""

    name: str
    weights: str
    dim: int
    transform: str
    measured: Measured


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one or two systems on the same images.

    `difference`: second minus first. `root`: the folder from which the paths of the labels' list start.
    """

    systems: list[System]
    difference: list[identity_metrics.Figure]
    counts: dict[str, int]
    left_out: dict[str, int]
    by_sides: bool
    chance: float
    resamples: int
    seed: int
    drawn: int
    look_alikes: dict[str, list[dict[str, Any]]]
    root: Path | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; metrics are from 0 to 1, null where there is no value."""
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


def score(
    files: Sequence[Embeddings],
    transforms: Sequence[tuple[Whitening | None, str]],
    labels: str | None,
    config: EvaluateConfig,
    console: Console,
) -> Evaluation:
    """Compute metrics of one file of embeddings, or of two on the images that both have, and their difference.

    `transforms`: for each file the transform of its rows and its description. `labels`: a manifest with identities; None:
    the identities in the embeddings' own list, else the names of the images' folders. `config.far` empty: those of
    identity_metrics.FARS for which there are enough impostor pairs. Raises EarTeachError.
    """
    left_out: dict[str, int] = {}
    rows = common_rows(files, left_out, console)
    people, sides, root = labels_of(files, rows, labels, config.root_dir, config.reading, console)
    rows, people, sides = labelled_rows(rows, people, sides if config.sides else None, left_out, console)
    rows, people, sides = distinct_rows(files, rows, people, sides, left_out, console)
    order = pairs.arrange(people, sides, config.seed)
    places = [np.asarray(own)[order.index] for own in rows]
    fars = _fars(order, config.far, console)
    drawn = identity_metrics.resamples(order.groups, config.bootstrap, config.seed)
    systems = []
    for file, own, (transform, description) in zip(files, places, transforms, strict=True):
        measured = identity_metrics.measure(_unit_rows(file, own, transform), order, fars, drawn)
        made = ", ".join(part for part in ("whitened by its run" if file.whitened else "", description) if part)
        systems.append(System(file.source, file.weights, _dim(file, transform), made, measured))
    found = _report(systems, order, sides is not None, left_out, config, root)
    found.look_alikes.update(_look_alikes(systems[-1], order, files[-1], places[-1], people, sides))
    _say_limits(found, console)
    return found


def excludes_0(figure: identity_metrics.Figure) -> bool:
    """Return whether the interval excludes 0."""
    return figure.low > 0 or figure.high < 0


def look_alike_sheet(report: Evaluation, file: Embeddings, root: str | Path | None, console: Console) -> Image.Image:
    """Draw the hardest pairs of the last system, whose embeddings are `file`. Raises EarTeachError if no image can be read."""
    from ..data.crop import cut, read_image
    from ..data.image_checks import PREVIEW
    from ..drawing import Pair, pairs_sheet

    manifest = Manifest(file.source, None if root is None else Path(root), file.paths, file.boxes, range(len(file)))
    look = replace(PREVIEW, image_size=132, interpolation="bicubic")
    sections: list[tuple[str, list[Pair]]] = []
    bad: Counter[str] = Counter()
    one, several = ("ear", "ears") if report.by_sides else ("person", "people")
    titles = {"impostor": f"Different {several}, most alike", "genuine": f"The same {one}, least alike"}
    for kind, title in titles.items():
        drawn = []
        for pair in report.look_alikes[kind]:
            rows = [image["row"] for image in pair["pictures"]]
            try:
                left, right = (cut(read_image(manifest.file(row)).image, file.boxes[row], look) for row in rows)
            except ImageError as error:
                bad[error.detail] += 1
                continue
            left_name, right_name = (printable(" ".join(_caption(image))) for image in pair["pictures"])
            drawn.append(Pair(left, right, f"similarity {pair['similarity']:.3f}", (left_name, right_name)))
        sections.append((title, drawn))
    if bad:
        console.warn(
            f"look-alike sheet: {bad.total()} pairs left out, because one of their images cannot be read "
            f"({printable(bad.most_common(1)[0][0])}); give --root-dir, the folder that their paths start from"
        )
    if not any(drawn for _, drawn in sections):
        raise EarTeachError("look-alike sheet: the images of no pair could be read; give --root-dir")
    return pairs_sheet(sections)


def _fars(order: Order, asked: Sequence[float], console: Console) -> list[float]:
    """Return the FARs given, or those of identity_metrics.FARS for which there are enough impostor pairs.

    Raises UsageError if a FAR given is no rate or too small for the number of impostor pairs.
    """
    count = identity_metrics.impostor_pairs(order)
    least = identity_metrics.smallest_far(count)
    for far in asked:
        if not 0 < far < 1:
            raise UsageError(f"--far {far:g}: is not between 0 and 1; give a rate such as 0.001")
        if far < least:
            digits = 10 ** (1 - math.floor(math.log10(least)))
            raise UsageError(
                f"--far {far:g}: too small for {count} impostor pairs, of which it accepts {far * count:.2g}; the "
                f"smallest possible ({identity_metrics.FALSE_ACCEPTS} false accepts) is {math.ceil(least * digits) / digits:g}"
            )
    if asked:
        return sorted(set(asked), reverse=True)
    usual = [far for far in identity_metrics.FARS if far >= least]
    if not usual:
        console.info(
            f"no TAR: {count} impostor pairs are too few for a FAR of {max(identity_metrics.FARS):g} ({identity_metrics.FALSE_ACCEPTS} false accepts)"
        )
    return usual


def _unit_rows(file: Embeddings, places: np.ndarray, transform: Whitening | None) -> np.ndarray:
    """Return unit rows float32 [N, D] of the row numbers `places`, transformed a block at a time."""
    rows = np.empty((len(places), _dim(file, transform)), np.float32)
    for start in range(0, len(places), _BLOCK):
        block = file.rows[places[start : start + _BLOCK]]
        if transform is not None and block.shape[1] != len(transform.mean):
            raise EarTeachError(
                f"{printable(file.source)}: has {block.shape[1]} dimensions, the file to centre or whiten on "
                f"{len(transform.mean)}; embed both with the same weights"
            )
        rows[start : start + _BLOCK] = unit(block) if transform is None else transform.apply(block)
    return rows


def _dim(file: Embeddings, transform: Whitening | None) -> int:
    return file.rows.shape[1] if transform is None or transform.matrix is None else transform.matrix.shape[1]


def _report(
    systems: list[System],
    order: Order,
    by_sides: bool,
    left_out: dict[str, int],
    config: EvaluateConfig,
    root: Path | None,
) -> Evaluation:
    tally = systems[0].measured.tally
    counts = {
        "pictures": len(order.index),
        "identities": len(np.unique(order.ear)),
        "people": order.people,
        "singletons": int((np.bincount(order.ear) == 1).sum()),
        "queries": len(tally.first),
        "genuine_pairs": identity_metrics.genuine_pairs(order),
        "impostor_pairs": identity_metrics.impostor_pairs(order),
    }
    difference = []
    if len(systems) > 1:
        first, second = (system.measured for system in systems)
        for one, other in zip(first.figures, second.figures, strict=True):
            draws = second.draws[one.name] - first.draws[one.name] if one.name in first.draws else None
            difference.append(
                identity_metrics.Figure(one.name, other.value - one.value, *identity_metrics.interval(draws))
            )
    chance = float(tally.chance.mean())
    return Evaluation(
        systems, difference, counts, left_out, by_sides, chance, config.bootstrap, config.seed, order.groups, {}, root
    )


def _say_limits(report: Evaluation, console: Console) -> None:
    counts = report.counts
    if counts["singletons"]:
        console.info(f"{counts['singletons']} identities have one image: used as impostors, not as queries")
    if report.drawn < counts["people"] and report.resamples:
        console.info(f"the bootstrap draws {report.drawn} random groups of the {counts['people']} people")
    if counts["people"] < FEW_PEOPLE and report.resamples:
        console.warn(f"intervals over {counts['people']} people are unreliable; evaluate on {FEW_PEOPLE} or more")


def _look_alikes(
    system: System, order: Order, file: Embeddings, places: np.ndarray, people: list[str], sides: list[str] | None
) -> dict[str, list[dict[str, Any]]]:
    """Return the hardest pairs: at most one for each pair of identities, and for each identity."""
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


def _caption(image: dict[str, Any]) -> list[str]:
    return [image["identity"], *([image["side"]] if "side" in image else []), image["path"]]


def _figure(figure: identity_metrics.Figure) -> dict[str, Any]:
    return {"name": figure.name, "value": figure.value, "low": _number(figure.low), "high": _number(figure.high)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value

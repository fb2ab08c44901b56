"""The page of a run: what templates/report.html.j2 shows, and the finished HTML.

The page loads nothing: style and images are inside, there is no script. Text is escaped by the template.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import PurePath
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from .. import run_folder
from ..config import TrainConfig
from ..console import Console
from ..distill_config import NOT_OF_DISTILLATION, DistillConfig
from ..drawing import read_saved_image
from ..embedding.files import Embeddings
from ..errors import EarTeachError, ImageError
from ..files import shell_word
from ..metrics_catalogue import metric_of, report_rows
from ..quality import reconstruction
from ..quality.collapse import judge
from ..quality.scoring import Evaluation, look_alike_sheet
from ..templates import environment
from ..training.describe import of_other_weights
from . import plots
from .comparison import compare_with_baseline
from .principal_axes import DrawnAxes, draw_principal_axes
from .summary import RunSummary
from .validation_embeddings import ValidationEmbeddings

QUERIES, NEIGHBOURS = 6, 5
COLLAGES_SHOWN = 4
WIDEST = 1800  # pixels of an image on the page
_PRIVATE = frozenset(spec.name for spec in fields(DistillConfig) if spec.metadata.get("private"))


@dataclass(frozen=True)
class Tile:
    """A value in large type. `kind`: `good`, `bad` or nothing, its colour."""

    value: str
    label: str
    kind: str = ""


@dataclass(frozen=True)
class Figure:
    """An image and its caption. `kind`: `query`, `same` (the same ear as the query) or nothing, its frame."""

    image: Image.Image
    caption: str
    kind: str = ""


@dataclass(frozen=True)
class Neighbours:
    """A query and its nearest neighbours in the embeddings of one system."""

    name: str
    ears: list[Figure]


def render(summary: RunSummary, images: bool, console: Console) -> str:
    """Return the page as HTML. Without `images` it has no image of an ear and no name of a person."""
    comparison = compare_with_baseline(summary)
    found, sizes = summary.embeddings, summary.class_sizes()
    health = [
        svg for section in ("health", "classes") for svg in plots.draw_panels(section, summary.rows, summary.epoch)
    ]
    if sizes is not None:
        health.append(plots.draw_class_sizes(sizes))
    pages = environment("report", html=True)
    pages.filters.update(data_uri=data_uri, fit=fit)
    return pages.get_template("report.html.j2").render(
        title=f"{summary.folder.name}: ear {summary.model}",
        model=summary.model,
        subtitle=_subtitle(summary),
        tiles=_tiles(summary),
        epochs=_epochs(summary),
        note=of_other_weights(summary.config),
        comparison=comparison,
        epoch=summary.epoch,
        learning=[Markup(svg) for svg in plots.draw_panels("learning", summary.rows, summary.epoch)],
        health=[Markup(svg) for svg in health],
        images=images,
        collages=_collages(summary) if images else [],
        axes=_axes(summary, console) if images and summary.config.decodes else None,
        decodes=summary.config.decodes,
        decodes_map=summary.config.decoder_input == "map",
        neighbours=_neighbours(found, summary.config.seed, summary.model) if found and images else [],
        has_baseline=found is not None and found.baseline is not None,
        whitened=found is not None and found.teacher.whitened,
        identities=found is not None and bool(found.teacher.identities),
        look_alikes=_look_alikes(found, comparison.teacher, console) if found and images else None,
        commands=_commands(summary),
        options=_options(summary.config),
    )


def data_uri(image: Image.Image) -> Markup:
    """Return an image as a JPEG in a data URI."""
    content = BytesIO()
    image.convert("RGB").save(content, format="JPEG", quality=88)
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}")


def fit(image: Image.Image) -> Image.Image:
    """Return the image, made smaller if it is wider than WIDEST."""
    if image.width <= WIDEST:
        return image
    return image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)


def _subtitle(summary: RunSummary) -> str:
    """Return what was trained on what, and how many images could not be used."""
    config, reasons = summary.config, summary.unreadable()
    start = "from pretrained weights" if config.pretrained else "from random weights"
    if isinstance(config, DistillConfig):
        start += f", distilled from {_path(config.teacher)}"
    lists = f"Trained on {_path(config.train_metadata)}, validated on {_path(config.val_metadata)}."
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    missing = f" {reasons.total()} images could not be used ({listed}): {run_folder.BAD} lists them." if reasons else ""
    return f"{config.backbone} at {config.image_size} px, {start}. {lists}{missing}"


def _tiles(summary: RunSummary) -> list[Tile]:
    """Return epoch, monitored metric, PSNR and the verdicts on reconstructions and embeddings, as far as they are
    known."""
    config, row, before = summary.config, summary.row(summary.epoch), summary.row(0)
    at = "at the best epoch" if summary.is_best else f"at epoch {summary.epoch}"
    monitor, psnr = metric_of(config.monitor), metric_of("val/psnr")

    def amount(value: str) -> str:  # with the unit of the monitored metric
        return monitor.with_unit(f"{float(value):.4g}")

    measured, first = row.get(monitor.key), before.get(monitor.key)
    tiles = [
        Tile(f"{summary.epoch} of {summary.last}", _which_epoch(summary)),
        Tile(
            amount(measured) if measured else "unknown",
            f"{monitor.key} {at}" + (f"; {amount(first)} before training" if first else ""),
        ),
    ]
    if row.get(psnr.key):
        tiles.append(_reconstruction(summary, f"PSNR of reconstructions {at}"))
    images = int(summary.checkpoint.content["earteach"].get("judged_on", 0))  # older checkpoints lack it
    state, why = judge(_held_out(row), _held_out(before), images)
    if state and not config.distils:
        tiles.append(Tile(state, f"embeddings {at}{f': {why}' if why else ''}", "bad" if why else "good"))
    return tiles


def _reconstruction(summary: RunSummary, what: str) -> Tile:
    """Return the PSNR with its references, and the verdict where the decoder was trained."""
    metrics = _held_out(summary.row(summary.epoch))
    wrong = reconstruction.judge(metrics) if summary.config.reconstruction_weight else ""
    if wrong:  # it has the value of the mean image
        metrics.pop(reconstruction.MEAN_IMAGE)
    value, _, references = reconstruction.in_words(metrics).partition("; ")
    return Tile(value, "; ".join(filter(None, (f"{what}: {wrong}" if wrong else what, references))), wrong and "bad")


def _which_epoch(summary: RunSummary) -> str:
    """Return which epoch the page is of, and whether there are more to come."""
    config = summary.config
    which = (
        f"best epoch, by {config.monitor}"
        if summary.is_best
        else "epoch of the newest intact checkpoint: no best is left"
    )
    if summary.last >= config.max_epochs:
        return which
    return f"{which}; of {config.max_epochs}, {'still running' if summary.running else 'not finished'}"


def _epochs(summary: RunSummary) -> dict[str, Any]:
    """Return the metrics of the catalogue before training, at the checkpoint and at the last epoch, as a table."""
    columns = {
        "before training": summary.row(0),
        f"{'best' if summary.is_best else 'newest intact'} (epoch {summary.epoch})": summary.row(summary.epoch),
        f"last (epoch {summary.last})": summary.rows[-1],
    }
    rows = [
        [
            metric.titled(),
            *(metric.number(float(row[metric.key])) if row.get(metric.key) else "" for row in columns.values()),
        ]
        for metric in report_rows()
        if any(row.get(metric.key) for row in columns.values())
    ]
    return {"head": ["", *columns], "rows": rows}


def _held_out(row: Mapping[str, str]) -> dict[str, float]:
    """Return the validation metrics of a row of metrics.csv, by name."""
    return {name.removeprefix("val/"): float(value) for name, value in row.items() if name.startswith("val/") and value}


def _collages(summary: RunSummary) -> list[Figure]:
    """Return up to COLLAGES_SHOWN collages of the run, evenly chosen; a damaged one is left out."""
    paths = [path for version in run_folder.versions(summary.folder) for path in run_folder.collages(version)]
    if not paths:
        return []
    figures = []
    for place in sorted({round(i * (len(paths) - 1) / (COLLAGES_SHOWN - 1)) for i in range(COLLAGES_SHOWN)}):
        try:
            image = read_saved_image(paths[place])
        except OSError:
            continue
        figures.append(Figure(image, f"reconstructions, {paths[place].stem.replace('_', ' ')}"))
    return figures


def _axes(summary: RunSummary, console: Console) -> DrawnAxes | None:
    """Return the principal axes as the decoder of the checkpoint draws them; None without embeddings."""
    if summary.embeddings is None:
        return None
    metrics = _held_out(summary.row(summary.epoch))
    try:
        return draw_principal_axes(summary.checkpoint, summary.embeddings, metrics, console)
    except EarTeachError as error:
        return DrawnAxes(why_not=str(error))


def _neighbours(found: ValidationEmbeddings, seed: int, model: str) -> list[list[Neighbours]]:
    """Return for each query its nearest neighbours, for the trained model and, if it is there, for the baseline."""
    if len(found.teacher) < 3:
        return []
    systems = [(model, found.teacher), *([("baseline", found.baseline)] if found.baseline else [])]
    rows = []
    for query in _queries(found, seed):
        try:
            rows.append([Neighbours(name, _nearest(found, system, query)) for name, system in systems])
        except ImageError:  # removed since it was embedded
            continue
    return rows


def _queries(found: ValidationEmbeddings, seed: int) -> list[int]:
    """Return QUERIES rows, drawn by seed; where identities are known, of different ears that have another image."""
    order = np.random.default_rng([seed, 5]).permutation(len(found.teacher)).tolist()
    ears = [found.ear(row) for row in order]
    several = {ear for ear, count in Counter(ears).items() if count > 1 and ear}
    chosen, seen = [], set()
    for row, ear in zip(order, ears, strict=True):
        if not several or (ear in several and ear not in seen):
            chosen.append(row)
            seen.add(ear)
    return chosen[:QUERIES]


def _nearest(found: ValidationEmbeddings, system: Embeddings, query: int) -> list[Figure]:
    """Return the query and its nearest neighbours, most similar first. Raises ImageError if one is gone."""
    similarity = system.rows @ system.rows[query]
    similarity[query] = -np.inf
    ears = [Figure(found.thumbnail(query), "", "query")]
    for row in np.argsort(-similarity)[:NEIGHBOURS].tolist():
        same = found.ear(row) is not None and found.ear(row) == found.ear(query)
        ears.append(Figure(found.thumbnail(row), f"{similarity[row]:.2f}", "same" if same else ""))
    return ears


def _look_alikes(found: ValidationEmbeddings, scored: Evaluation | None, console: Console) -> Image.Image | None:
    """Return the sheet of the pairs that the teacher confuses; None without scores, or if no image can be read."""
    if scored is None:
        return None
    try:
        return look_alike_sheet(scored, found.teacher, found.root, console)
    except EarTeachError:
        return None


def _commands(summary: RunSummary) -> Sequence[str]:
    """Return the commands that come next."""
    run = shell_word(summary.folder)
    more = "" if summary.last < summary.config.max_epochs else f" --max-epochs {2 * summary.last}"
    return (
        *([] if summary.running else [f"earteach resume {run}{more}"]),
        f"earteach export-backbone {run} {summary.model}.safetensors",
        f"earteach embed photos/ out.npy --weights {run}",
        "earteach evaluate out.npy labels.csv",
        f"tensorboard --logdir {run} --samples_per_plugin images=1000",
    )


def _options(config: TrainConfig) -> list[tuple[str, str]]:
    """Return the options and their values, as text."""
    left_out = NOT_OF_DISTILLATION if config.distils else ()
    return [(name, _option(name, value)) for name, value in config.as_dict().items() if name not in left_out]


def _option(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in _PRIVATE:
        return _path(str(value))
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _path(path: str) -> str:
    """Return a relative path unchanged, and only the name of an absolute one: pages are shared."""
    return PurePath(path).name if PurePath(path).is_absolute() else path

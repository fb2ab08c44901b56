"""The model card of an exported folder: the header that the hub reads, and templates/model_card.md.j2."""

from dataclasses import dataclass, fields
from math import isfinite

import timm
from huggingface_hub import EvalResult, ModelCardData

from .. import __version__
from ..config import TrainConfig
from ..distill_config import NOT_OF_DISTILLATION
from ..files import printable
from ..metrics_catalogue import card_rows
from ..model import export_format
from ..model.checkpoint import Checkpoint
from ..model.export_format import About
from ..model.feature_maps import MapStatistics
from ..model.weights import published_name
from ..templates import environment

TASK = "image-feature-extraction"
TAGS = ["ear", "biometrics", "embeddings", "distillation"]
# Options of the machine, which are not part of the recipe. Private ones (paths and names) are left out, too.
_PANELS = {"Machine", "Output"}
_OPTIONS = {"cache", "cache_limit", "num_workers", "load_timeout", "max_bad", "images", "num_collage_samples"}


@dataclass(frozen=True)
class Stated:
    """What the user stated of an export. `validated`: the weights are those that the run validated; `half`: rounded to
    float16."""

    consent: str
    license: str
    validated: bool
    half: bool


def model_card(
    about: About,
    checkpoint: Checkpoint,
    maps: list[MapStatistics],
    images: int,
    metrics: dict[str, str],
    before: dict[str, str],
    stated: Stated,
) -> str:
    """Return the card as Markdown.

    `metrics`, `before`: rows of metrics.csv of this checkpoint's epoch and of before training, or empty. `images`: how
    many the statistics of the maps are of.
    """
    config = checkpoint.config
    is_measured = stated.validated and not checkpoint.steps_done
    measured = metrics if is_measured else {}
    pages = environment("export", html=False)
    pages.filters.update(cell=_cell, file_name=_file_name)
    return pages.get_template("model_card.md.j2").render(
        header=_header(about, config, stated, measured),
        about=about,
        checkpoint=checkpoint,
        config=config,
        stated=stated,
        images=images,
        names=export_format,
        version=__version__,
        size=about.preprocessing.image_size,
        strides="/".join(str(stage.stride) for stage in maps),
        channels="/".join(str(stage.channels) for stage in maps),
        labels="and their identities" if config.pseudo_classes == "identity" else "without labels",
        ears=_ears(checkpoint),
        initial=_initial(config),
        options=_recipe(config),
        metrics=_rows(measured, before),
        no_metrics=_UNKNOWN if is_measured else "Not measured for these weights.",
    )


_UNKNOWN = "Not known here: the run's metrics.csv was not beside the checkpoint."


def _header(about: About, config: TrainConfig, stated: Stated, metrics: dict[str, str]) -> str:
    """Return the YAML that the hub reads: library, task, licence, origin and results."""
    known = {metric: float(metrics[metric.key]) for metric in card_rows() if metrics.get(metric.key)}
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="images",
            dataset_name=printable(_file_name(config.val_metadata)),
            metric_type=metric.key.removeprefix("val/"),
            metric_name=metric.titled(metric.card),
            metric_value=value,
        )
        for metric, value in known.items()
        if isfinite(value)
    ]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag=TASK,
        tags=TAGS,
        license="other",
        license_name=printable(stated.license),
        base_model=_base_model(config),
        model_name=f"{about.architecture} ear {'student' if config.distils else 'teacher'}" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n")


def _base_model(config: TrainConfig) -> str | None:
    """Return the hub's name of the initial weights; None if they are random or from a file of the user's."""
    if not config.pretrained or config.pretrained_path != TrainConfig.pretrained_path:
        return None
    name = published_name(config.backbone)
    return timm.get_pretrained_cfg(name).hf_hub_id if timm.is_model_pretrained(name) else None


def _recipe(config: TrainConfig) -> list[tuple[str, str]]:
    """Return the options of the recipe with their values."""
    values = {
        entry.name: getattr(config, entry.name)
        for entry in fields(config)
        if entry.metadata["panel"] not in _PANELS and entry.name not in _OPTIONS and not entry.metadata.get("private")
    }
    if config.distils:
        values = {name: value for name, value in values.items() if name not in NOT_OF_DISTILLATION}
    return [(name.replace("_", "-"), "" if value is None else str(value)) for name, value in values.items()]


def _initial(config: TrainConfig) -> str:
    """Return where the initial weights came from."""
    if not config.pretrained:
        return "random weights"
    name = _file_name(config.pretrained_path)
    if config.pretrained_path == TrainConfig.pretrained_path:
        name += f", or timm's of {config.backbone}"
    return f"pretrained weights: {name} (whose licence applies as well)"


def _rows(metrics: dict[str, str], before: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return (name, before training, at this checkpoint) of the metrics that there are."""
    return [
        (metric.titled(metric.card), _short(before.get(metric.key, "")), _short(metrics[metric.key]))
        for metric in card_rows()
        if metrics.get(metric.key)
    ]


def _ears(checkpoint: Checkpoint) -> str:
    """Return `, 24 ears`, where the checkpoint knows it."""
    classes = checkpoint.content.get("pseudo_classes")
    labels = classes.get("labels") if isinstance(classes, dict) else None
    return f", {len(labels)} ears" if labels is not None else ""


def _short(value: str) -> str:
    """Return a number of metrics.csv with four digits."""
    return f"{float(value):.4g}" if value else ""


def _file_name(path: str) -> str:
    """Return the last part of a path of any system: folders belong to the machine."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _cell(text: str) -> str:
    """Return the text on one line, as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")

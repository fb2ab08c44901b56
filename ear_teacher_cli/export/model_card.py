"""The model card of an exported folder: what it is, what it learned from and how, its figures, its limits."""

import json
from dataclasses import dataclass, fields

from .. import __version__
from ..config import TrainConfig
from ..files import printable
from ..model.checkpoint import Checkpoint
from ..model.export_format import CONFIG, FEATURES, PREPROCESS, About
from ..model.feature_maps import MapStatistics

# Of the machine or of the user's folders, not of the recipe.
_PANELS = {"Machine", "Output"}
_OPTIONS = {"train_metadata", "val_metadata", "root_dir", "pretrained_path", "cache", "cache_limit", "num_workers"}
_OPTIONS |= {"load_timeout", "max_bad", "images", "num_collage_samples"}
_FIGURES = (
    ("val/retrieval", "validation images found from their own augmented view, %"),
    ("val/rank1", "rank-1 by identity, %"),
    ("val/eer", "equal error rate by identity, %"),
    ("val/psnr", "PSNR of the reconstruction, dB"),
    ("val/recon_loss", "reconstruction loss"),
    ("val/effective_rank", "effective rank of the embeddings"),
)


@dataclass(frozen=True)
class Stated:
    """What the user said. `validated`: these are the weights that the run validated; `half`: rounded to float16."""

    consent: str
    license: str
    validated: bool
    half: bool


def model_card(
    about: About,
    checkpoint: Checkpoint,
    maps: list[MapStatistics],
    images: int,
    figures: dict[str, str],
    before: dict[str, str],
    stated: Stated,
) -> str:
    """Markdown. `figures`, `before`: rows of metrics.csv for this checkpoint's epoch and for before training, or empty.
    `images`: how many the statistics of the maps are of."""
    size = about.preprocessing.image_size
    channels = "/".join(str(stage.channels) for stage in maps)
    strides = "/".join(str(stage.stride) for stage in maps)
    whitening = (
        "\nThe backbone's numbers are raw. `model.whitening.safetensors` holds a whitening that `earteach embed` and "
        "`load_embedder` of ear_teacher_cli apply: x -> (x / |x| - mean) @ matrix, then unit length.\n"
        if about.whitening_sha256
        else ""
    )
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
license: other
license_name: {json.dumps(printable(stated.license))}
---
# An ear teacher: {about.architecture}, {size} px

A backbone that learned from photographs of ears {_with_labels(checkpoint)}. Its embedding ({about.embedding_dim} numbers) tells ears apart;
its feature maps (strides {strides}, channels {channels}) are for the distillation of ear detectors and landmarkers.

## Opening it

```python
import timm
backbone = timm.create_model("local-dir:FOLDER", pretrained=True)                   # B,3,{size},{size} -> B,{about.embedding_dim}
maps = timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)   # -> one map per stride
```

`{PREPROCESS}` says how an image becomes the input, `{FEATURES}` has mean and variance of every channel of the maps over
{images} crops, `{CONFIG}` is timm's. `earteach verify FOLDER` checks the whole on any machine.
{whitening}
Fingerprint (weights and preprocessing): `{about.fingerprint}`

## Data

| | |
|---|---|
| learned from | {_name(checkpoint.config.train_metadata)}{_seen(checkpoint)} |
| validated on | {_name(checkpoint.config.val_metadata)} |
| started from | {_start(checkpoint.config)} |
| consent of those photographed | {_text(stated.consent)} |

## Recipe

Epoch {checkpoint.epoch} of {checkpoint.config.max_epochs}{_further(checkpoint)}, earteach {__version__}.{_which(stated)}

| option | value |
|---|---|
{_recipe(checkpoint.config)}

## Figures

{_table_of(figures, before, checkpoint, stated)}

## Limits

- The figures are of the validation images of this run, which chose the checkpoint. They say nothing of other cameras:
  measure there with `earteach evaluate` before use.
- Embeddings of ears are biometric data. They must not be used to identify people who have not agreed to it.
- It was not tested for differences between groups of people.

## Licence

{printable(stated.license)}
"""


def _recipe(config: TrainConfig) -> str:
    rows = []
    for entry in fields(TrainConfig):
        if entry.metadata["panel"] not in _PANELS and entry.name not in _OPTIONS:
            value = getattr(config, entry.name)
            rows.append(f"| {entry.name.replace('_', '-')} | {'' if value is None else _text(str(value))} |")
    return "\n".join(rows)


def _with_labels(checkpoint: Checkpoint) -> str:
    return "and who is on them" if checkpoint.config.pseudo_classes == "identity" else "without labels"


def _start(config: TrainConfig) -> str:
    if not config.pretrained:
        return "random weights"
    if config.pretrained_path != TrainConfig.pretrained_path:
        return f"pretrained weights: {_name(config.pretrained_path)} (whose licence counts, too)"
    return f"pretrained weights: {_name(config.pretrained_path)}, or timm's of {config.backbone} (whose licence counts, too)"


def _further(checkpoint: Checkpoint) -> str:
    return f", and {checkpoint.steps_done} steps" if checkpoint.steps_done else ""


def _which(stated: Stated) -> str:
    words = (
        "" if stated.validated else " The weights as training left them, neither averaged nor moved back to the start."
    )
    return words + (" Rounded to float16." if stated.half else "")


def _table_of(figures: dict[str, str], before: dict[str, str], checkpoint: Checkpoint, stated: Stated) -> str:
    if not stated.validated or checkpoint.steps_done:
        return "Not measured for these weights."
    known = [(label, before.get(name, ""), figures[name]) for name, label in _FIGURES if figures.get(name)]
    if not known:
        return "Not known here: the run's metrics.csv was not beside the checkpoint."
    rows = [f"| {label} | {_short(start)} | {_short(value)} |" for label, start, value in known]
    return "\n".join(["| | before training | this checkpoint |", "|---|---|---|", *rows])


def _seen(checkpoint: Checkpoint) -> str:
    classes = checkpoint.content.get("pseudo_classes")
    labels = classes.get("labels") if isinstance(classes, dict) else None
    return f", {len(labels)} ears" if labels is not None else ""


def _short(value: str) -> str:
    try:
        return f"{float(value):.4g}" if value else ""
    except ValueError:
        return "not known"


def _name(path: str) -> str:
    """The file's name alone: folders are of the machine."""
    return _text(path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1])


def _text(value: str) -> str:
    """On one line of a table."""
    return printable(" ".join(value.split())).replace("|", "\\|")

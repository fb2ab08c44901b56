"""The model card of an exported folder: what it is, what it learned from and how, its figures, its limits."""

import json
from dataclasses import fields

from .. import __version__
from ..config import TrainConfig
from ..files import printable
from .checkpoint import Checkpoint
from .exports import CONFIG, FEATURES, PREPROCESS, About
from .features import MapStatistics

NOT_STATED = "not stated"
# Of the machine or of the user's folders, not of the recipe.
_PANELS = {"Machine", "Output"}
_OPTIONS = {"train_metadata", "val_metadata", "root_dir", "pretrained_path", "cache", "cache_limit", "num_workers"}
_OPTIONS |= {"load_timeout", "max_bad", "images", "num_collage_samples"}
_FIGURES = (
    ("val/retrieval", "validation pictures found from their own augmented view, %"),
    ("val/rank1", "rank-1 by identity, %"),
    ("val/eer", "equal error rate by identity, %"),
    ("val/psnr", "PSNR of the reconstruction, dB"),
    ("val/recon_loss", "reconstruction loss"),
    ("val/effective_rank", "effective rank of the embeddings"),
)


def model_card(
    about: About,
    checkpoint: Checkpoint,
    maps: list[MapStatistics],
    pictures: int,
    figures: dict[str, str],
    before: dict[str, str],
    *,
    consent: str,
    license: str,
) -> str:
    """Markdown. `figures`, `before`: rows of metrics.csv for this checkpoint's epoch and for before training, or empty.
    `pictures`: how many the statistics of the maps are of."""
    size = about.preprocessing.image_size
    channels = "/".join(str(stage.channels) for stage in maps)
    strides = "/".join(str(stage.stride) for stage in maps)
    whitening = (
        "\n`model.whitening.safetensors` holds a whitening that `earteach embed` applies: "
        "x -> (x / |x| - mean) @ matrix, then unit length.\n"
        if about.whitening_sha256
        else ""
    )
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
license: other
license_name: {json.dumps(_text(license))}
---
# An ear teacher: {about.architecture}, {size} px

A backbone that learned from photographs of ears without labels. Its embedding ({about.embedding_dim} numbers) tells ears apart;
its feature maps (strides {strides}, channels {channels}) are for the distillation of ear detectors and landmarkers.

## Opening it

```python
import timm
backbone = timm.create_model("local-dir:FOLDER", pretrained=True)                   # B,3,{size},{size} -> B,{about.embedding_dim}
maps = timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)   # -> one map per stride
```

`{PREPROCESS}` says how a picture becomes the input, `{FEATURES}` has mean and variance of every channel of the maps over
{pictures} crops, `{CONFIG}` is timm's. `earteach verify FOLDER` checks the whole on any machine.
{whitening}
Fingerprint (weights and preprocessing): `{about.fingerprint}`

## Data

| | |
|---|---|
| learned from | {_name(checkpoint.config.train_metadata)}{_seen(checkpoint)} |
| validated on | {_name(checkpoint.config.val_metadata)} |
| labels used | {"identities" if checkpoint.config.pseudo_classes == "identity" else "none"} |
| consent of those photographed | {_text(consent)} |

## Recipe

Epoch {checkpoint.epoch} of {checkpoint.config.max_epochs}, earteach {__version__}.

| option | value |
|---|---|
{_recipe(checkpoint.config)}

## Figures

{_table_of(figures, before)}

## Limits

- The figures are of the validation pictures of this run, which chose the checkpoint. They say nothing of other cameras:
  measure there with `earteach evaluate` before use.
- Embeddings of ears are biometric data. They must not be used to identify people who have not agreed to it.
- It was not tested for differences between groups of people.

## Licence

{_text(license)}
"""


def _recipe(config: TrainConfig) -> str:
    rows = []
    for entry in fields(TrainConfig):
        if entry.metadata["panel"] not in _PANELS and entry.name not in _OPTIONS:
            value = getattr(config, entry.name)
            rows.append(f"| {entry.name.replace('_', '-')} | {'' if value is None else _text(str(value))} |")
    return "\n".join(rows)


def _table_of(figures: dict[str, str], before: dict[str, str]) -> str:
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
    return f"{float(value):.4g}" if value else ""


def _name(path: str) -> str:
    """The file's name alone: folders are of the machine."""
    return _text(path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1])


def _text(value: str) -> str:
    """On one line of a table."""
    return printable(" ".join(value.split())).replace("|", "\\|")

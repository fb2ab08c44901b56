"""Every option of a training run: its name, default, range and help, each written once, here.

`TrainConfig` is frozen and holds plain values only (str, int, float, bool, None), so that it goes into a
checkpoint and out again under `weights_only=True`. cli.py builds the options of `earteach train` from
these fields; the Python API (`EarDataModule`, `EarTeacherLightningModule`) takes them as keywords.
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from json import dumps
from math import isfinite
from pathlib import Path
from typing import Any, get_args, get_type_hints

from . import metrics_catalogue
from .errors import ConfigError, EarTeachError, UsageError

PSEUDO_CLASSES = ("kmeans", "instance", "identity", "fixed", "batch", "none")
AUGMENTATIONS = ("mild", "strong")
STRATEGIES = ("auto", "ddp")
CACHES = ("auto", "ram", "disk", "off")
AUTO = "auto"
BOX_FORMATS = (AUTO, "xyxy", "xywh", "cxcywh")  # data/boxes.py has what they mean
BOX_UNITS = (AUTO, "pixels", "relative")
SIDE_POLICIES = ("as-is", "mirror", "separate")
# The metrics that may select the best checkpoint, and whether a lower or a higher value is better.
MONITORS = metrics_catalogue.monitors()
PRECISIONS = ("16-mixed", "bf16-mixed", "32-true")
LOGGERS = ("tensorboard", "wandb", "mlflow")
# The metric losses (core/losses.py has them), with the margins of their papers: ArcFace (Deng et al. 2019, sec. 3.1)
# 0.5 rad; CosFace (Wang et al. 2018, sec. 4.1) 0.35.
DEFAULT_MARGIN = {"arcface": 0.5, "cosface": 0.35, "none": 0.0}
METRIC_LOSSES = tuple(DEFAULT_MARGIN)
# (scale, margin): `paper` the original package's scale and the loss's own margin, for classes that are right; `gentle`
# those of speaker verification on pseudo-classes, which are often wrong.
MARGIN_PRESETS: dict[str, tuple[float, float | None]] = {"paper": (64.0, None), "gentle": (30.0, 0.2)}


# What the original package, ear_teacher, had for the options whose defaults are others here. Those defaults are the
# recommended recipe (examples/study has the evidence), which `recommended` spells out.
ORIGINAL: dict[str, Any] = {
    "pad": False,
    "augment": False,
    "augmentation": "mild",
    "views": 1,
    "freeze_stride": 0,
    "freeze_statistics": False,
    "learning_rate": 1e-4,
    "head_lr_mult": 1.0,
    "warmup_epochs": 10,
    "max_epochs": 100,
    "contrastive_weight": 0.0,
    "pseudo_classes": "batch",
    "metric_weight": 0.1,
    "margin_preset": "paper",
    "baseline_weight": 0.0,
    "whiten": False,
    "monitor": "val/loss",
}


# Options with a default in the environment, EARTEACH_NAME: those of a machine or a house, and none of the recipe.
ENVIRONMENT = (
    "root_dir",
    "num_workers",
    "load_timeout",
    "cache",
    "cache_limit",
    "pretrained_path",
    "images",
    "report",
    "logger",
    "precision",
    "accelerator",
    "devices",
    "output_dir",
)


# The options that `earteach train --help` shows; --help-all shows the rest as well.
COMMON = (
    "train_metadata",
    "val_metadata",
    "root_dir",
    "box_format",
    "identity_column",
    "batch_size",
    "num_workers",
    "cache",
    "image_size",
    "augment",
    "backbone",
    "pretrained",
    "pretrained_path",
    "learning_rate",
    "max_epochs",
    "reconstruction_weight",
    "contrastive_weight",
    "metric_weight",
    "metric_loss",
    "pseudo_classes",
    "early_stop",
    "monitor",
    "images",
    "precision",
    "seed",
    "devices",
    "output_dir",
    "experiment_name",
)


@dataclass(frozen=True)
class Reading:
    """How lists of ears are to be read where they do not say it themselves."""

    box_format: str = AUTO  # one of BOX_FORMATS
    box_units: str = AUTO  # one of BOX_UNITS
    identity_column: str | None = None  # the column to take identities from; None: `identity`, if there is one

    def __post_init__(self):
        _check("box_format", self.box_format, {"choices": BOX_FORMATS})
        _check("box_units", self.box_units, {"choices": BOX_UNITS})


def option(default, panel: str, help: str, **checks) -> Any:
    """A field with its help and checks: `low`, `high` (inclusive), `above` (exclusive), `choices`, `multiple`."""
    return field(default=default, metadata={"panel": panel, "help": help, **checks})


@dataclass(frozen=True)
class TrainConfig:
    # fmt: off
    train_metadata: str = option("data/preprocessed/train_teacher.npy", "Data", "Manifest (or folder of cropped ears) to learn from.")
    val_metadata: str = option("data/preprocessed/val_teacher.npy", "Data", "Manifest (or folder) to validate on.")
    root_dir: str | None = option(None, "Data", "Folder the manifests' paths start from, and must not leave. Default: the working directory, or the manifest's own folder when the images are only there.")
    box_format: str = option(AUTO, "Data", "Order of a box's numbers in lists that do not name it (.npy, a bbox column): xyxy, xywh (x, y, width, height) or cxcywh (centre first); auto: judged by all boxes and the sizes of their images, or refused.", choices=BOX_FORMATS)
    box_units: str = option(AUTO, "Data", "Units of boxes in lists that do not name them: pixels, or relative (shares of the image's width and height); auto: relative if no number is above 1.1.", choices=BOX_UNITS)
    identity_column: str | None = option(None, "Data", "Column of the lists that says who is on an image. Default: identity, if there is one.")
    allow_overlap: bool = option(False, "Data", "Train although images of the validation list are in the training list, too.")
    batch_size: int = option(32, "Data", "Images per step and device.", low=2)
    num_workers: int = option(8, "Data", "Processes that load images; at most one per CPU core is used.", low=0)
    load_timeout: int = option(300, "Data", "Seconds that loading a batch in another process may take before the run stops; 0: for ever.", low=0)
    cache: str = option("auto", "Data", "Where crops are kept once they are cut, so that no photo is decoded again: ram, disk (a folder .crops/ in --output-dir), off; auto: in memory if they fit into half of what is free, else on disk.", choices=CACHES)
    cache_limit: float = option(20.0, "Data", "GB that the kept crops may take; of what does not fit, the photos are decoded every time.", low=0.0)
    image_size: int = option(224, "Data", "Side of the square input in pixels, a multiple of 32.", low=32, high=2048, multiple=32)
    bbox_buffer: float = option(0.10, "Data", "Room around the box: this share of its width to the left and right, of its height above and below.", low=0.0, high=2.0)
    pad: bool = option(True, "Data", "Pad the crop to a square with the mean colour; --no-pad squashes it, as the original package did.")
    augment: bool = option(True, "Data", "Vary the training images, as --augmentation says.")
    augmentation: str = option("strong", "Data", "How --augment, and the second view of validation, vary an image: rotation (15 degrees), shift (5 %), scale (0.8-1.1) and mild: brightness and contrast (0.3), noise, blur; strong: also colour casts, gamma, greys, lost resolution.", choices=AUGMENTATIONS)
    views: int = option(2, "Data", "Augmented views of each image in a step; 2 doubles its cost.", low=1, high=2)
    side_policy: str = option("as-is", "Data", "What to do with known sides: nothing; mirror every right ear to a left one; or separate them, so that no pseudo-class holds both.", choices=SIDE_POLICIES)
    hflip: float = option(0.0, "Data", "Probability of a horizontal flip. 0 because a flipped left ear is a right ear: another ear, not the same one again.", low=0.0, high=1.0)
    max_bad: float = option(0.01, "Data", "Share of images that may turn out unreadable (each is skipped and listed in bad_images.csv) before the run stops.", low=0.0, high=1.0)

    backbone: str = option("convnext_tiny", "Model", "Any timm model that pools to one vector per image.")
    pretrained: bool = option(True, "Model", "Start from pretrained weights; --no-pretrained starts from random ones.")
    pretrained_path: str = option("models/convnext_tiny_22k_224.pth", "Model", "Weights in Facebook's, torchvision's, timm's or Lightning's key names (.pth, .ckpt, .safetensors). Where the default file is absent, timm's hub is asked.")
    embedding_dim: int | None = option(None, "Model", "Size of the embedding. Taken from the backbone (ConvNeXt-Tiny: 768); if given, it must agree.", low=1)
    projection_dim: int = option(256, "Model", "Size of the projection and prediction heads' output.", low=2)

    freeze_stride: int = option(8, "Model", "Keep a pretrained backbone as it started up to the stage of this stride (8: the first two stages of a ConvNeXt); 0: all of it learns.", low=0, high=16)
    freeze_statistics: bool = option(True, "Model", "Keep a pretrained backbone's batch-norm statistics as they started.")

    learning_rate: float = option(3e-4, "Training", "Peak learning rate.", above=0.0)
    layer_decay: float = option(1.0, "Training", "Learning rate of each layer of the backbone, as a share of the next one's; 1: all alike.", above=0.0, high=1.0)
    head_lr_mult: float = option(10.0, "Training", "Learning rate of heads, prototypes and decoder, as a multiple of --learning-rate.", above=0.0, high=1000.0)
    weight_decay: float = option(1e-4, "Training", "AdamW's weight decay (not applied to biases and normalisation).", low=0.0)
    warmup_epochs: int = option(1, "Training", "Epochs of linear warm-up, then cosine to the end. A warm-up as long as the run is cut to a fifth of it.", low=0)
    max_epochs: int = option(10, "Training", "Epochs to train.", low=1)
    reconstruction_weight: float = option(1.0, "Training", "Weight of the reconstruction loss (MSE on [-1, 1]).", low=0.0)
    denoise: bool = option(False, "Training", "Reconstruct the image in its own light: augmented in place and size only.")
    contrastive_weight: float = option(1.0, "Training", "Weight of the contrastive loss: find the other view of an image among those of the batch (NT-Xent of SimCLR; needs --views 2).", low=0.0)
    temperature: float = option(0.2, "Training", "Temperature of the contrastive loss.", above=0.0, high=10.0)
    consistency_weight: float = option(0.0, "Training", "Weight of the consistency loss: predict the other view's projection (SimSiam, with stop-gradient; needs --views 2).", low=0.0)
    metric_weight: float = option(0.5, "Training", "Weight of the metric loss.", low=0.0)
    metric_loss: str = option("arcface", "Training", "Margin softmax over the pseudo-classes.", choices=METRIC_LOSSES)
    pseudo_classes: str = option("kmeans", "Training", "What an image's class is: its cluster of embeddings (kmeans), itself (instance), the manifest's identity, a random but constant one (fixed, the control), its place in the batch (batch: the original package's, which collapses; for comparison), or none.", choices=PSEUDO_CLASSES)
    num_pseudo_classes: int = option(512, "Training", "Most pseudo-classes to use; kmeans uses fewer where that leaves under 4 images each. 0: as many as leave 4 each.", low=0)
    cluster_every: int = option(20, "Training", "Epochs between two rounds of kmeans (none in the last fifth of the run).", low=1)
    arcface_margin: float | None = option(None, "Training", "Margin (radians for arcface, cosine for cosface), instead of --margin-preset's.", low=0.0, high=1.5)
    arcface_scale: float | None = option(None, "Training", "Scale of the cosines before the softmax, instead of --margin-preset's.", above=0.0)
    margin_preset: str = option("gentle", "Training", "Scale and margin of the metric loss: paper: 64, and the margin of the loss's paper; gentle: 30 and 0.2, for classes that are often wrong.", choices=tuple(MARGIN_PRESETS))
    margin_warmup_epochs: int = option(0, "Training", "Epochs over which the margin grows from 0.", low=0)
    ema_decay: float = option(0.0, "Training", "Keep a moving average of the weights, this share of it old at each step, to validate, export and embed with; 0: none.", low=0.0, high=0.99999)
    baseline_weight: float = option(0.5, "Training", "Validate, export and embed with a pretrained backbone's weights moved back this share of the way to where they started (WiSE-FT): against forgetting what other cameras show.", low=0.0, high=1.0)
    whiten: bool = option(True, "Training", "Fit a whitening to the training embeddings at the end of every epoch; it travels with checkpoint and export, and embed applies it.")
    early_stop: int = option(0, "Training", "Stop when --monitor has not improved for so many epochs; 0: never.", low=0)
    monitor: str = option("val/retrieval", "Training", "What picks the best checkpoint. retrieval: share of validation images found from their own augmented view; rank1, eer: need identities in the validation manifest.", choices=tuple(MONITORS))
    fail_on_collapse: bool = option(False, "Training", "Stop with exit 1 when the embeddings collapse, or tell images apart less well than before training.")
    images: bool = option(True, "Training", "Draw collages; --no-images keeps every image out of TensorBoard and the experiment folder.")
    num_collage_samples: int = option(10, "Training", "Validation images in the collage.", low=1, high=100)
    precision: str = option("16-mixed", "Training", "Arithmetic; where the hardware cannot, 32-true is used and said.", choices=PRECISIONS)
    seed: int = option(0, "Training", "Seed of everything random.", low=0, high=2**32 - 1)

    accelerator: str = option("auto", "Machine", "What Lightning trains on: auto, cpu, gpu, mps...")
    devices: int = option(1, "Machine", "How many devices, on each node.", low=1)
    num_nodes: int = option(1, "Machine", "How many nodes (machines), each started by torchrun or SLURM.", low=1)
    strategy: str = option("auto", "Machine", "How several devices share the work; auto: ddp (Lightning's DistributedDataParallel) where there are several.", choices=STRATEGIES)
    compile: bool = option(False, "Machine", "Compile backbone and decoder (torch.compile): a minute or two at the start, then faster steps on some machines. Try it with --dry-run.")

    logger: str = option("tensorboard", "Output", "Who is told the figures beside metrics.csv: TensorBoard's events, always; wandb or mlflow (Lightning's loggers, when installed) as well. Images go to TensorBoard alone.", choices=LOGGERS)
    projector: bool = option(False, "Output", "At the end, put validation embeddings, with thumbnails unless --no-images, into TensorBoard's projector.")
    report: bool = option(True, "Output", "At the end, write report.html (earteach report).")
    output_dir: str = option("ear_teacher/outputs/", "Output", "Where experiments are kept.")
    experiment_name: str = option("ear_teacher", "Output", "Folder of this experiment inside --output-dir.")
    # fmt: on

    def __post_init__(self):
        for name, kind in get_type_hints(TrainConfig).items():
            object.__setattr__(self, name, _plain(name, getattr(self, name), kind))
        for spec in fields(self):
            if isinstance(value := getattr(self, spec.name), str) and "\0" in value:
                raise ConfigError(spec.name, "holds a NUL byte", "give a name without one")
            _check(spec.name, getattr(self, spec.name), spec.metadata)
        if Path(self.experiment_name).name != self.experiment_name or self.experiment_name in ("", ".", ".."):
            raise ConfigError(
                "experiment_name",
                f"{self.experiment_name!r} is not a plain folder name",
                "use one without slashes; --output-dir says where it goes",
            )
        if self.reconstruction_weight == 0 and not self.learns_classes and not self.compares_views:
            raise ConfigError(
                "reconstruction_weight",
                "0 leaves nothing to learn without another loss",
                "raise it, or choose --metric-loss arcface and a --metric-weight above 0",
            )
        for name in ("contrastive_weight", "consistency_weight"):
            flag = name.replace("_", "-")
            if getattr(self, name) and self.views != 2:
                raise ConfigError(name, "compares two views, but there is one", f"add --views 2, or --{flag} 0")
        if self.cache == "disk" and not self.images:
            raise ConfigError("cache", "disk keeps images, --no-images keeps none", "use --cache ram, or --images")
        if self.num_pseudo_classes == 1:
            raise ConfigError(
                "num_pseudo_classes", "1 leaves nothing to tell apart", "use 2 or more, or 0 for no bound"
            )
        if self.monitor == "val/metric_loss" and not self.learns_classes:
            raise ConfigError("monitor", "val/metric_loss is not part of this run", "choose another, or a metric loss")
        if self.views == 2 and not self.augment:
            raise ConfigError(
                "views",
                "2 of an image that does not vary are one",
                "add --augment, or --views 1 --contrastive-weight 0",
            )

    @property
    def learns_classes(self) -> bool:
        """Whether a metric loss over pseudo-classes is part of the run."""
        return self.metric_loss != "none" and self.metric_weight > 0 and self.pseudo_classes != "none"

    @property
    def compares_views(self) -> bool:
        """Whether a loss between two views of an image is part of the run."""
        return self.contrastive_weight > 0 or self.consistency_weight > 0

    @property
    def processes(self) -> int:
        """On all nodes together, one for each device."""
        return self.devices * self.num_nodes

    @property
    def kept_stride(self) -> int:
        """`freeze_stride` where there is something to keep: random weights all have to learn."""
        return self.freeze_stride if self.pretrained else 0

    @property
    def kept_share(self) -> float:
        return self.baseline_weight if self.pretrained else 0.0

    @property
    def keeps_statistics(self) -> bool:
        return self.freeze_statistics and self.pretrained

    @property
    def reading(self) -> Reading:
        return Reading(self.box_format, self.box_units, self.identity_column)

    @property
    def experiment_dir(self) -> Path:
        return Path(self.output_dir) / self.experiment_name

    @property
    def margin(self) -> float:
        """The margin really used: the one given, else the preset's, else the loss's own."""
        given = (self.arcface_margin, MARGIN_PRESETS[self.margin_preset][1], DEFAULT_MARGIN[self.metric_loss])
        return next(margin for margin in given if margin is not None)

    @property
    def scale(self) -> float:
        """The scale really used."""
        return MARGIN_PRESETS[self.margin_preset][0] if self.arcface_scale is None else self.arcface_scale

    @property
    def warmup(self) -> float:
        """Epochs of warm-up really used: a warm-up that would fill the run is cut to a fifth of it."""
        return self.warmup_epochs if self.warmup_epochs < self.max_epochs else self.max_epochs / 5

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_toml(self) -> str:
        """The configuration as TOML that `--config` reads back; options that are unset are left out."""
        return "".join(f"{name} = {_toml(value)}\n" for name, value in self.as_dict().items() if value is not None)


def preset(name: str) -> dict[str, Any]:
    """The options that a recipe of PRESETS sets, with their values. Raises ConfigError."""
    found = PRESETS.get(_EARLIER_NAMES.get(name, name))
    if found is None:
        raise ConfigError("preset", f"{name!r} is not known", f"choose one of {', '.join(PRESETS)}")
    return dict(found)


PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {name: getattr(TrainConfig, name) for name in ORIGINAL},
    "original": ORIGINAL,
}
_EARLIER_NAMES = {"seed": "original"}  # what version 0.1.0 called it


# Version 0.1.0 read every unnamed box as corners in pixels, and let lists overlap.
_RENAMED = {"head_rate": "head_lr_mult", "keep_start": "baseline_weight"}  # as versions before 0.2.0 wrote them
_BEFORE = {"box_format": "xyxy", "box_units": "pixels", "allow_overlap": True}


def from_dict(values: dict[str, Any], where: str) -> TrainConfig:
    """A config from a checkpoint's dict; options it has not, as an older version had none, at the values of what that
    version did.

    Raises EarTeachError if names are unknown to this version.
    """
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    unknown = sorted(set(values) - {spec.name for spec in fields(TrainConfig)})
    if unknown:
        raise EarTeachError(
            f"{where}: options {', '.join(unknown)} are unknown; it is from another version of earteach"
        )
    return TrainConfig(**ORIGINAL | _BEFORE | values)


def with_changes(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A config with the given fields replaced, those that are not None."""
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def read_toml(path: str | Path, recipe: str | None = None) -> dict[str, Any]:
    """Options from a TOML file, with hyphens or underscores, and below them those of `recipe`, else of the file's own
    `preset`. Raises EarTeachError naming file, line and key."""
    text = _text_of(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        windows = " (a path of Windows goes into single quotes: 'C:\\Users\\...')" if "\\" in text else ""
        raise EarTeachError(f"{path}: not readable as TOML ({error}); mend that line{windows}") from error
    found: dict[str, Any] = {}
    below: dict[str, Any] = {}
    for key, value in values.items():
        name, where = key.replace("-", "_"), f"{path}{_line_of(key, text)}"
        name = _RENAMED.get(name, name)
        if name in found:
            raise EarTeachError(f"{where}: {key!r} is given twice, with hyphens and with underscores; keep one")
        try:
            if name == "preset":
                below = preset(_plain(name, value, str))
            else:
                found[name] = _option_of_file(name, key, value, where)
        except ConfigError as error:
            raise UsageError(f"{where}: {error}") from error
    return (preset(recipe) if recipe else below) | found


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EarTeachError(f"{path}: no such file; give --config a TOML file of options") from error
    except OSError as error:
        raise EarTeachError(f"{path}: {error.strerror}; give --config a TOML file of options") from error
    except UnicodeDecodeError as error:
        raise EarTeachError(f"{path}: not readable as TOML ({error}); save it as UTF-8") from error


def _option_of_file(name: str, key: str, value: Any, where: str) -> Any:
    """The checked value of one line."""
    specs = {spec.name: spec for spec in fields(TrainConfig)}
    if name in ("dry_run", "overwrite", "quiet", "config"):
        flag = name.replace("_", "-")
        raise EarTeachError(f"{where}: {key!r} cannot be set in a file; give --{flag} on the command line")
    if name not in specs:
        hint = nearest(name, [*specs, "preset"])
        raise EarTeachError(f"{where}: unknown option {key!r}; {hint}`earteach train --help-all` lists the names")
    plain = _plain(name, value, get_type_hints(TrainConfig)[name])
    _check(name, plain, specs[name].metadata)
    return plain


def _line_of(key: str, text: str) -> str:
    """Where a key, or the table of that name, stands in a TOML file: ` line 3`; nothing if it is written strangely."""
    written = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    lines = (number for number, line in enumerate(text.splitlines(), 1) if written.match(line))
    number = next(lines, None)
    return "" if number is None else f" line {number}"


def nearest(name: str, names: Iterable[str]) -> str:
    """`did you mean learning_rate? ` for lerning_rate; nothing if no name is like it."""
    names = list(names)
    longer = [other for other in names if other.startswith(name) and len(name) > 3]
    like = longer if len(longer) == 1 else get_close_matches(name, names, 1, cutoff=0.7)
    return f"did you mean {like[0]}? " if like else ""


def _plain(name: str, value: Any, kind: Any) -> Any:
    """`value` as exactly the plain type its field declares (numpy scalars and Path become int, float, str)."""
    allowed = get_args(kind) or (kind,)
    if value is None and type(None) in allowed:
        return None
    target = next(t for t in allowed if t is not type(None))
    if isinstance(value, dict | list | tuple):
        raise ConfigError(name, f"holds several values, not {KINDS[target]}", f"give {KINDS[target]}")
    if target is bool or isinstance(value, bool):
        if target is not bool or not isinstance(value, bool):
            raise ConfigError(name, f"{value!r} is not {KINDS[target]}", f"give {KINDS[target]}")
        return value
    try:
        plain = target(value)
        if target is int and plain != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(name, f"{value!r} is not {KINDS[target]}", f"give {KINDS[target]}") from None
    return plain


KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _check(name: str, value: Any, checks: Any) -> None:
    if value is None:
        return
    if isinstance(value, float) and not isfinite(value):
        raise ConfigError(name, f"{value} is not a finite number", "give a finite one")
    if "choices" in checks and value not in checks["choices"]:
        raise ConfigError(name, f"{value!r} is not known", f"choose one of {', '.join(checks['choices'])}")
    if "low" in checks and value < checks["low"]:
        raise ConfigError(name, f"{value} is too small", f"use at least {checks['low']}")
    if "above" in checks and value <= checks["above"]:
        raise ConfigError(name, f"{value} is too small", f"use more than {checks['above']}")
    if "high" in checks and value > checks["high"]:
        raise ConfigError(name, f"{value} is too large", f"use at most {checks['high']}")
    if "multiple" in checks and value % checks["multiple"]:
        raise ConfigError(name, f"{value} does not fit the decoder", f"use a multiple of {checks['multiple']}")


def _toml(value: Any) -> str:
    """A plain value as TOML (JSON's strings and booleans are TOML's too)."""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else dumps(value)

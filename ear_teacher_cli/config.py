"""The options of training: name, default, range and help, each written once, here; and the presets.

TrainConfig is frozen and holds plain values only (str, int, float, bool, None), so that it
goes into a checkpoint and out again under `weights_only=True`. cli/options.py makes the options of the commands from
these fields; the Python API (`EarDataModule`, `EarTeacherLightningModule`) takes those of TrainConfig as keywords.
command_config.py has the options of the other commands; config_files.py reads configurations from files.
"""

from dataclasses import asdict, dataclass, fields, replace
from json import dumps
from pathlib import Path
from typing import Any

from . import metrics_catalogue
from .config_fields import AUTO as AUTO
from .config_fields import BOX_FORMATS as BOX_FORMATS
from .config_fields import BOX_UNITS as BOX_UNITS
from .config_fields import PRECISIONS as PRECISIONS
from .config_fields import ListOptions, flag, option, shared
from .config_fields import Reading as Reading
from .errors import ConfigError

PSEUDO_CLASSES = ("kmeans", "instance", "identity", "fixed", "batch", "none")
AUGMENTATIONS = ("mild", "strong")
STRATEGIES = ("auto", "ddp")
CACHES = ("auto", "ram", "disk", "off")
AUGMENT_ON = ("cpu", "gpu", "auto")
SIDE_POLICIES = ("as-is", "mirror", "separate")
DECODER_INPUTS = ("map", "embedding")
DECODER_STARTS = ("linear", "random")
# The metrics that may select the best checkpoint, and whether a lower or a higher value is better.
MONITORS = metrics_catalogue.monitors()
MATMUL_PRECISIONS = ("highest", "high", "medium")
LOGGERS = ("tensorboard", "wandb", "mlflow")
# The metric losses (training/losses.py), with the margins of their papers: ArcFace (Deng et al. 2019, sec. 3.1)
# 0.5 rad; CosFace (Wang et al. 2018, sec. 4.1) 0.35.
DEFAULT_MARGIN = {"arcface": 0.5, "cosface": 0.35, "none": 0.0}
METRIC_LOSSES = tuple(DEFAULT_MARGIN)
# (scale, margin): `paper` the original package's scale and the loss's own margin, for classes that are right; `gentle`
# those of speaker verification on pseudo-classes, which are often wrong.
MARGIN_PRESETS: dict[str, tuple[float, float | None]] = {"paper": (64.0, None), "gentle": (30.0, 0.2)}


@dataclass(frozen=True)
class TrainConfig(ListOptions):
    """Options of `train`. Raises ConfigError if values are out of range or contradict each other."""

    # fmt: off
    train_metadata: str = option("data/preprocessed/train_teacher.npy", "Data", "Manifest, or folder of cropped ears, to train on.", private=True, common=True)
    val_metadata: str = option("data/preprocessed/val_teacher.npy", "Data", "Manifest, or folder of cropped ears, to validate on.", private=True, common=True)
    allow_overlap: bool = option(False, "Data", "Train although images of the validation list are in the training list, too.")
    batch_size: int = shared("batch_size", panel="Data", help="Images per batch and device. auto: as many as fit into memory.", low=2, common=True, auto=True)
    num_workers: int = shared("num_workers", panel="Data", common=True, resumable=True)
    load_timeout: int = shared("load_timeout", panel="Data", resumable=True)
    cache: str = option("auto", "Data", "Where crops are kept after the first epoch, so that photos are decoded only once: ram, disk (folder .crops/ in --output-dir), off; auto: in memory if they fit into half of what is free, else on disk.", choices=CACHES, environment=True, common=True, resumable=True)
    cache_limit: float = option(20.0, "Data", "Most GB that cached crops may take; the rest is decoded in every epoch.", low=0.0, environment=True, resumable=True)
    image_size: int = shared("image_size", default=224, panel="Data", help="Side of the square input in pixels, a multiple of 32.", high=2048, multiple=32, common=True)
    bbox_buffer: float = option(0.10, "Data", "Margin around the box: this share of its width at the left and right, of its height above and below.", low=0.0, high=2.0)
    pad: bool = option(True, "Data", "Pad the crop to a square with the mean colour; --no-pad stretches it to a square, as the original package did.")
    augment: bool = option(True, "Data", "Augment the training images as --augmentation says.", common=True)
    augmentation: str = option("strong", "Data", "Augmentation of training images, and of the second view of validation images. Both: rotation (15 degrees), shift (5 %), scale (0.8-1.1). mild: brightness and contrast (0.3), noise, blur; strong: also colour casts, gamma, greyscale, lower resolution.", choices=AUGMENTATIONS)
    views: int = option(2, "Data", "Augmented views of each image in a step; 2 doubles its cost.", low=1, high=2)
    side_policy: str = option("as-is", "Data", "Use of the left/right column. as-is: none; mirror: flip every right ear to a left one; separate: no pseudo-class holds both sides.", choices=SIDE_POLICIES)
    hflip: float = option(0.0, "Data", "Probability of a horizontal flip. Default 0: a flipped left ear looks like a right ear, that is, like a different ear.", low=0.0, high=1.0)
    max_bad: float = option(0.01, "Data", "Stop with an error if more than this share of the images cannot be read. Each one that cannot is skipped and listed in bad_images.csv.", low=0.0, high=1.0)

    backbone: str = shared("backbone", default="convnext_tiny", panel="Model", help="Any timm model that pools to one vector per image.", common=True)
    pretrained: bool = option(True, "Model", "Start from pretrained weights; --no-pretrained starts from random ones.", common=True)
    pretrained_path: str = option("models/convnext_tiny_22k_224.pth", "Model", "Pretrained weights in the key names of Facebook, torchvision, timm or Lightning (.pth, .ckpt, .safetensors). If the default file does not exist, timm downloads its own.", private=True, environment=True, common=True)
    embedding_dim: int | None = option(None, "Model", "Expected size of the embedding (ConvNeXt-Tiny: 768); an error if the backbone's differs.", low=1)
    projection_dim: int = option(256, "Model", "Output size of the projection and prediction heads.", low=2)
    decoder_input: str = option("map", "Model", "What the decoder reconstructs the image from. map: the feature map of the last stage, before pooling; embedding: the pooled embedding.", choices=DECODER_INPUTS)
    decoder_start: str = option("linear", "Model", "Start of the decoder. linear: ridge regression from its initial input to principal components of the training images, plus convolutions that learn the rest; random: convolutions only.", choices=DECODER_STARTS)

    freeze_stride: int = option(0, "Model", "Freeze a pretrained backbone up to the stage of this stride (8: the first two stages of a ConvNeXt); 0: train all of it.", low=0, high=16)
    freeze_statistics: bool = option(True, "Model", "Freeze the batch-norm statistics of a pretrained backbone.")

    learning_rate: float = option(3e-4, "Training", "Peak learning rate (AdamW).", above=0.0, common=True)
    layer_decay: float = option(1.0, "Training", "Layer-wise learning-rate decay: a layer's learning rate as a share of the next one's; 1: off.", above=0.0, high=1.0)
    head_lr_mult: float = option(10.0, "Training", "Learning rate of heads, prototypes and decoder, as a multiple of --learning-rate.", above=0.0, high=1000.0, earlier="head_rate")
    weight_decay: float = option(1e-4, "Training", "AdamW's weight decay (not applied to biases and normalisation).", low=0.0)
    warmup_epochs: int = option(1, "Training", "Epochs of linear warm-up, then cosine decay. A warm-up as long as the run is shortened to a fifth of it.", low=0)
    max_epochs: int = option(10, "Training", "Epochs to train.", low=1, common=True, resumable=True)
    accumulate_grad_batches: int = option(1, "Training", "Batches whose mean gradient makes one optimizer step. Batch statistics, the contrastive loss and the anchor loss still see one batch at a time.", low=1)
    gradient_clip_val: float = option(0.0, "Training", "Largest norm of the gradient of all parameters together; a larger gradient is scaled down to it. 0: no limit.", low=0.0)
    reconstruction_weight: float = option(3.0, "Training", "Weight of the reconstruction loss (MSE on [-1, 1]).", low=0.0, common=True, loss_term=True)
    denoise: bool = option(True, "Training", "Reconstruct the image without its colour changes, noise and blur: the target gets the geometric augmentation only.")
    contrastive_weight: float = option(1.0, "Training", "Weight of the contrastive loss (NT-Xent of SimCLR): match an image's two views among those of the batch. Needs --views 2.", low=0.0, common=True, loss_term=True, compares_views=True)
    temperature: float = option(0.2, "Training", "Temperature of the contrastive loss.", above=0.0, high=10.0)
    anchor_weight: float = option(2.0, "Training", "Weight of the anchor loss: predict the feature maps of the frozen pretrained backbone at twice the input size. Without pretrained weights it is left out.", low=0.0, loss_term=True)
    consistency_weight: float = option(0.0, "Training", "Weight of the consistency loss (SimSiam, with stop-gradient): predict the projection of the other view. Needs --views 2.", low=0.0, loss_term=True, compares_views=True)
    metric_weight: float = option(0.5, "Training", "Weight of the metric loss.", low=0.0, common=True)
    metric_loss: str = option("arcface", "Training", "Margin softmax over the pseudo-classes.", choices=METRIC_LOSSES, common=True)
    pseudo_classes: str = option("kmeans", "Training", "Label of an image for the metric loss. kmeans: its cluster of embeddings; instance: each image its own; identity: the manifest's; none: no metric loss. Controls for comparison: fixed (a constant random label) and batch (its place in the batch, which collapses).", choices=PSEUDO_CLASSES, common=True)
    num_pseudo_classes: int = option(512, "Training", "Maximum number of pseudo-classes; kmeans uses fewer if there are not 4 images for each. 0: number of images / 4.", low=0)
    cluster_every: int = option(20, "Training", "Epochs between two clusterings (none in the last fifth of the run).", low=1)
    arcface_margin: float | None = option(None, "Training", "Margin (radians for arcface, cosine for cosface). Default: --margin-preset's.", low=0.0, high=1.5)
    arcface_scale: float | None = option(None, "Training", "Scale of the cosines before the softmax. Default: --margin-preset's.", above=0.0)
    margin_preset: str = option("gentle", "Training", "Scale and margin of the metric loss. paper: 64, and the margin of the loss's paper; gentle: 30 and 0.2, for labels that are often wrong.", choices=tuple(MARGIN_PRESETS))
    margin_warmup_epochs: int = option(0, "Training", "Epochs over which the margin grows from 0.", low=0)
    ema_decay: float = option(0.0, "Training", "EMA decay of the weights per step; the average is validated, exported and used by embed; 0: no average.", low=0.0, high=0.99999)
    baseline_weight: float = option(0.5, "Training", "Share of the pretrained weights in those that are validated, exported and used by embed (interpolation as in WiSE-FT): training alone loses part of what recognises ears of other cameras. 0: the trained weights alone.", low=0.0, high=1.0, earlier="keep_start")
    whiten: bool = option(True, "Training", "Fit a whitening to the training embeddings after every epoch. It is saved in checkpoint and export, and embed applies it.")
    early_stop: int = option(0, "Training", "Stop after this many epochs without improvement of --monitor; 0: off.", low=0, common=True)
    monitor: str = option("val/retrieval", "Training", "Metric that picks the best checkpoint. retrieval: share of validation images whose nearest neighbour is their own augmented view; rank1 and eer need identities in the validation list.", choices=tuple(MONITORS), common=True)
    fail_on_collapse: bool = option(False, "Training", "Stop with exit code 1 if the embeddings collapse, or retrieval falls below that of the initial weights.")
    images: bool = shared("images", panel="Training", help="Draw collages; --no-images keeps every image out of TensorBoard and the experiment folder.", common=True)
    num_collage_samples: int = shared("num_collage_samples", help="Validation images in the collage.")
    precision: str = shared("precision", default="16-mixed", panel="Training", help="Floating-point precision; without a GPU 16-mixed becomes 32-true. auto: bf16-mixed if the GPU has it.", choices=(*PRECISIONS, AUTO), environment=True, common=True)
    seed: int = shared("seed", panel="Training", common=True)

    accelerator: str = option("auto", "Machine", "Lightning's accelerator: auto, cpu, gpu, mps...", environment=True)
    devices: int = option(1, "Machine", "Number of devices on each node.", low=1, environment=True, common=True, resumable=True)
    num_nodes: int = option(1, "Machine", "Number of nodes (machines), each started by torchrun or SLURM.", low=1, resumable=True)
    strategy: str = option("auto", "Machine", "Lightning's strategy for several devices; auto: ddp if there are several.", choices=STRATEGIES)
    matmul_precision: str = option("highest", "Machine", "Precision of 32-bit matrix products, as in PyTorch: high and medium may use TF32 or bfloat16. Convolutions are not affected.", choices=MATMUL_PRECISIONS)
    augment_on: str = option("cpu", "Machine", "Where training images are augmented: cpu, by the processes that load them; gpu, in the training step, for machines with few CPU cores for each GPU; auto: gpu with fewer than 8 cores for each. The images are the same.", choices=AUGMENT_ON, environment=True, resumable=True)
    gradient_checkpointing: bool = option(False, "Machine", "Compute the backbone's activations again in the backward pass instead of keeping them: less memory, so that larger batches fit, for about a third more time.")
    deterministic: bool = option(False, "Machine", "Use deterministic algorithms only, so that a run on a GPU repeats exactly; slower. On a CPU runs repeat without it.")
    compile: bool = shared("compile", panel="Machine", help="Compile backbone and decoder (torch.compile): takes a minute or two at first, then speeds up steps on some machines. Try it with --dry-run.")

    checkpoint_every_n_epochs: int = option(5, "Output", "Keep the checkpoint of every so many epochs, besides the best three and the last; 0: none.", low=0)
    profile: bool = option(False, "Output", "Record five steps with torch.profiler: profile.txt has a table of operations, profile-trace.json a trace for Perfetto, both in the experiment folder.")
    logger: str = option("tensorboard", "Output", "Where metrics are logged besides metrics.csv and TensorBoard's event files, which are always written: wandb or mlflow (to be installed). Images go to TensorBoard only.", choices=LOGGERS, environment=True)
    projector: bool = option(False, "Output", "At the end, write the validation embeddings for TensorBoard's projector, with thumbnails unless --no-images.")
    report: bool = option(True, "Output", "At the end, write report.html (see earteach report).", environment=True)
    output_dir: str = option("ear_teacher/outputs/", "Output", "Folder of all experiments.", private=True, environment=True, common=True)
    experiment_name: str = option("ear_teacher", "Output", "Folder of this experiment inside --output-dir.", private=True, common=True)
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names()
        self._check_losses()
        self._check_views()
        if self.cache == "disk" and not self.images:
            raise ConfigError("cache", "disk keeps images, --no-images keeps none", "use --cache ram, or --images")
        if self.monitor == "val/metric_loss" and not self.learns_classes:
            raise ConfigError("monitor", "val/metric_loss is not part of this run", "choose another, or a metric loss")

    def _check_names(self) -> None:
        if Path(self.experiment_name).name != self.experiment_name or self.experiment_name in ("", ".", ".."):
            raise ConfigError(
                "experiment_name",
                f"{self.experiment_name!r} is not a plain folder name",
                "use one without slashes; --output-dir says where it goes",
            )

    def _check_losses(self) -> None:
        """Raise ConfigError if no loss is left, or one has nothing to work on."""
        left = [name for name in _marked("loss_term") if getattr(self, name)]
        if not self.learns_classes and (not left or left == ["anchor_weight"] and not self.is_anchored):
            raise ConfigError(
                "reconstruction_weight",
                "0 leaves nothing to learn without another loss",
                "raise it, or choose --metric-loss arcface and a --metric-weight above 0",
            )
        if self.num_pseudo_classes == 1:
            raise ConfigError(
                "num_pseudo_classes", "1 leaves nothing to tell apart", "use 2 or more, or 0 for no bound"
            )

    def _check_views(self) -> None:
        """Raise ConfigError if views are compared that are not made, or are all alike."""
        for name in _marked("compares_views"):
            if getattr(self, name) and self.views != 2:
                raise ConfigError(name, "compares two views, but there is one", f"add --views 2, or {flag(name)} 0")
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
        return any(getattr(self, name) > 0 for name in _marked("compares_views"))

    @property
    def distils(self) -> bool:
        """Whether the run distils a student from a teacher (distill_config.py)."""
        return False

    @property
    def decodes(self) -> bool:
        """Whether the model reconstructs images."""
        return True

    @property
    def map_strides(self) -> tuple[int, ...]:
        """Strides in pixels of the feature maps that a student learns to predict; empty for a teacher."""
        return ()

    @property
    def load_size(self) -> int:
        """Side in pixels at which crops are loaded; the model's input is `image_size`."""
        return self.image_size

    @property
    def reads_whole_images(self) -> bool:
        """Whether the boxes of the lists are ignored."""
        return False

    @property
    def processes(self) -> int:
        """The number of processes on all nodes together, one for each device."""
        return self.devices * self.num_nodes

    @property
    def kept_stride(self) -> int:
        """`freeze_stride` of a pretrained backbone; 0 of a random one, which all has to be trained."""
        return self.freeze_stride if self.pretrained else 0

    @property
    def kept_share(self) -> float:
        """`baseline_weight` of a pretrained backbone; 0 of a random one."""
        return self.baseline_weight if self.pretrained else 0.0

    @property
    def is_anchored(self) -> bool:
        """Whether the anchor loss is part of the run: it needs a pretrained backbone."""
        return self.anchor_weight > 0 and self.pretrained

    @property
    def needs_clean_view(self) -> bool:
        """Whether a loss needs the first view without its colour changes, noise and blur."""
        return self.denoise or self.is_anchored

    @property
    def keeps_statistics(self) -> bool:
        """Whether the batch-norm statistics are frozen; those of a random backbone never are."""
        return self.freeze_statistics and self.pretrained

    @property
    def experiment_dir(self) -> Path:
        """The folder of the experiment."""
        return Path(self.output_dir) / self.experiment_name

    @property
    def margin(self) -> float:
        """The margin in use: the one given, else the preset's, else the loss's own."""
        given = (self.arcface_margin, MARGIN_PRESETS[self.margin_preset][1], DEFAULT_MARGIN[self.metric_loss])
        return next(margin for margin in given if margin is not None)

    @property
    def scale(self) -> float:
        """The scale in use."""
        return MARGIN_PRESETS[self.margin_preset][0] if self.arcface_scale is None else self.arcface_scale

    @property
    def warmup(self) -> float:
        """The epochs of warm-up in use: a warm-up that would fill the run is cut to a fifth of it."""
        return self.warmup_epochs if self.warmup_epochs < self.max_epochs else self.max_epochs / 5

    def as_dict(self) -> dict[str, Any]:
        """Return all options by name."""
        return asdict(self)

    def as_toml(self) -> str:
        """Return the configuration as TOML that `--config` reads; options that are None are left out."""
        return "".join(f"{name} = {_toml(value)}\n" for name, value in self.as_dict().items() if value is not None)

    def loggable(self) -> dict[str, Any]:
        """Return the hyper-parameters that loggers may receive: no path or name, nothing of the machine, no None."""
        return {
            spec.name: value
            for spec in fields(self)
            if spec.metadata["panel"] not in ("Machine", "Output")
            and not spec.metadata.get("private")
            and not spec.metadata.get("environment")
            and (value := getattr(self, spec.name)) is not None
        }


# What a resumed run may change: how long it trains, and what belongs to the machine.
RESUMABLE = tuple(
    spec.name
    for panel in ("Training", "Machine", "Data")
    for spec in fields(TrainConfig)
    if spec.metadata.get("resumable") and spec.metadata["panel"] == panel
)
# Names of options in earlier versions -> the names here.
RENAMED = {spec.metadata["earlier"]: spec.name for spec in fields(TrainConfig) if "earlier" in spec.metadata}


# The values that the document of the original ear_teacher package gives, where the defaults here differ, and the option
# where its code did not do what the document says: pseudo_classes. The document describes labels from which "similar ears
# cluster together"; the code numbered the images of a batch (--pseudo-classes batch). The defaults are the recommended
# recipe (examples/study has the evidence).
ORIGINAL: dict[str, Any] = {
    "pad": False,
    "augment": False,
    "augmentation": "mild",
    "views": 1,
    "decoder_input": "embedding",
    "freeze_statistics": False,
    "learning_rate": 1e-4,
    "head_lr_mult": 1.0,
    "warmup_epochs": 10,
    "max_epochs": 100,
    "gradient_clip_val": 1.0,
    "reconstruction_weight": 1.0,
    "denoise": False,
    "contrastive_weight": 0.0,
    "anchor_weight": 0.0,
    "baseline_weight": 0.0,
    "pseudo_classes": "kmeans",
    "metric_weight": 0.1,
    "margin_preset": "paper",
    "whiten": False,
    "monitor": "val/loss",
}
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {name: getattr(TrainConfig, name) for name in ORIGINAL},
    "original": ORIGINAL,
}
EARLIER_PRESETS = {"seed": "original"}  # its name in version 0.1.0


def _marked(mark: str) -> list[str]:
    """Return the names of the options with a mark."""
    return [spec.name for spec in fields(TrainConfig) if spec.metadata.get(mark)]


def preset(name: str) -> dict[str, Any]:
    """Return the options that a preset sets, with their values. Raises ConfigError if there is no such preset."""
    found = PRESETS.get(EARLIER_PRESETS.get(name, name))
    if found is None:
        raise ConfigError("preset", f"{name!r} is not known", f"choose one of {', '.join(PRESETS)}")
    return dict(found)


# Options that loggers receive and no recipe consists of.
_NO_RECIPE = ("seed", "box_format", "box_units", "allow_overlap", "max_bad", "num_collage_samples")
_MOST_NAMED = 6  # options that `describe_recipe` lists


def describe_recipe(config: TrainConfig) -> str:
    """Return in one line which preset a configuration follows, and which options differ from it."""
    ours = config.loggable()
    changes: dict[str, list[str]] = {}
    for name, values in PRESETS.items():
        theirs = TrainConfig(**values).loggable()
        names = [each for each in {**theirs, **ours} if each not in _NO_RECIPE]
        changes[name] = [each for each in names if ours.get(each) != theirs.get(each)]
    nearest = min(changes, key=lambda name: len(changes[name]))
    differing = changes[nearest]
    if differing:
        named = ", ".join(flag(f"no_{each}" if ours.get(each) is False else each) for each in differing[:_MOST_NAMED])
        more = f" and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
        return f"{nearest} + {len(differing)} option{'s' * (len(differing) > 1)} changed: {named}{more}"
    if nearest == "original":
        return "original (the documented values of the original ear_teacher package)"
    return "recommended (defaults; the original package's documented values: --preset original)"


def with_changes(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Return a config with the given fields replaced, those that are not None."""
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def _toml(value: Any) -> str:
    """Return a plain value as TOML (JSON's strings and booleans are TOML's too)."""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else dumps(value)

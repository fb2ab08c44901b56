"""The options of distillation: those of training that apply to a student, with other defaults, and its own."""

from dataclasses import dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .config_fields import option
from .errors import ConfigError


def _changed(name: str, default: Any, **changes: Any) -> Any:
    """Return an option of TrainConfig with another default, and other metadata."""
    spec = next(each for each in fields(TrainConfig) if each.name == name)
    return field(default=default, metadata={**spec.metadata, **changes})


def _is_nested(first: Path, second: Path) -> bool:
    """Return whether one of two absolute paths is the other or lies below it."""
    return first == second or first in second.parents or second in first.parents


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Options of `distill`: `backbone` and `image_size` are the student's. Raises ConfigError as TrainConfig does.

    `distillation.config_for` fills in what depends on the teacher.
    """

    # fmt: off
    # The teacher; config_for reads all but the first from it.
    teacher: str = option("", "Distillation", "The teacher: a run, a checkpoint or an export.", private=True)
    teacher_fingerprint: str = option("", "Distillation", "Fingerprint of the teacher.")
    out: str = option("", "Distillation", "Where the student is exported to.", private=True)
    replace_out: bool = option(False, "Distillation", "Whether an export that exists there may be replaced.")

    strides: str = option("4,8,16", "Distillation", "Strides in pixels of the feature maps that the student learns to predict.", metavar="N,N", common=True)
    teacher_size: int | None = option(None, "Distillation", "Side of the teacher's input in pixels. Default: the one it was trained at. Ears in whole images are small: a larger one shows them to the teacher at the size that it knows.", low=32, high=2048, common=True)
    whole_images: bool = option(False, "Distillation", "Learn from whole images instead of the ears in them, as detectors see them: boxes are ignored, and an image of several ears is read once.", common=True)
    map_weight: float = option(1.0, "Distillation", "Weight of the map loss: predict the teacher's feature maps of --strides with a 1 x 1 convolution each (smooth L1 and cosine).", low=0.0, common=True)
    embedding_weight: float = option(1.0, "Distillation", "Weight of the embedding loss: predict the teacher's embedding with a linear layer (cosine).", low=0.0, common=True)
    relation_weight: float = option(1.0, "Distillation", "Weight of the relation loss: the squared difference between the cosines of the images of a batch, of the student's embeddings against the teacher's.", low=0.0, common=True)

    # Of training, with the student's defaults.
    augmentation: str = _changed("augmentation", "mild")
    freeze_statistics: bool = _changed("freeze_statistics", False)
    learning_rate: float = _changed("learning_rate", 1e-3)
    head_lr_mult: float = _changed("head_lr_mult", 1.0, help="Learning rate of the projections, as a multiple of --learning-rate.")
    monitor: str = _changed("monitor", "val/loss", help="Metric that picks the best checkpoint. retrieval: share of validation images whose nearest neighbour is their own augmented view; rank1 and eer need identities in the validation list.", choices=("val/loss", "val/retrieval", "val/rank1", "val/eer"))
    pretrained_path: str = _changed("pretrained_path", TrainConfig.pretrained_path, help="Pretrained weights of the student in the key names of Facebook, torchvision, timm or Lightning. By default timm downloads its own; of convnext_tiny they are read from this file, if it exists.")
    experiment_name: str = _changed("experiment_name", "student", help="Folder of this experiment inside --output-dir. Default: the name of OUT without its suffix.")
    images: bool = _changed("images", True, help="Keep images in the report; --no-images keeps every image out of the experiment folder.")
    compile: bool = _changed("compile", False, help="Compile the student's backbone (torch.compile): takes a minute or two at first, then speeds up steps on some machines. Try it with --dry-run.")
    accumulate_grad_batches: int = _changed("accumulate_grad_batches", 1, help="Batches whose mean gradient makes one optimizer step. Batch statistics and the relation loss still see one batch at a time.")
    # Of training, and no part of distillation.
    views: int = _changed("views", 1)
    decoder_input: str = _changed("decoder_input", "embedding")
    decoder_start: str = _changed("decoder_start", "random")
    reconstruction_weight: float = _changed("reconstruction_weight", 0.0)
    denoise: bool = _changed("denoise", False)
    contrastive_weight: float = _changed("contrastive_weight", 0.0)
    anchor_weight: float = _changed("anchor_weight", 0.0)
    metric_loss: str = _changed("metric_loss", "none")
    baseline_weight: float = _changed("baseline_weight", 0.0)
    # fmt: on

    def _check_names(self) -> None:
        super()._check_names()
        places = {"the run": self.experiment_dir}
        places |= {name: Path(path) for name, path in (("OUT", self.out), ("TEACHER", self.teacher)) if path}
        for (one, first), (other, second) in combinations(places.items(), 2):
            if _is_nested(first.resolve(), second.resolve()):
                raise ConfigError(
                    "experiment_name",
                    f"{one} ({first}) and {other} ({second}) would lie in one another",
                    "choose another --experiment-name, or another OUT",
                )

    def _check_losses(self) -> None:
        if not any((self.map_weight, self.embedding_weight, self.relation_weight)):
            raise ConfigError("map_weight", "0 leaves nothing to learn without another loss", "raise one of the three")
        if self.map_weight and not self.map_strides:
            raise ConfigError("strides", f"{self.strides!r} names no stride", "give, for example, 4,8,16")
        if self.map_weight and min(self.map_strides) < 2:
            raise ConfigError("strides", f"{min(self.map_strides)} is too small", "use strides of 2 or more")

    @property
    def map_strides(self) -> tuple[int, ...]:
        """`strides`, ascending; empty without the map loss."""
        if not self.map_weight:
            return ()
        try:
            return tuple(sorted({int(text) for text in self.strides.split(",") if text.strip()}))
        except ValueError:
            raise ConfigError(
                "strides", f"{self.strides!r} is no list of whole numbers", "give, for example, 4,8,16"
            ) from None

    def loggable(self) -> dict[str, Any]:
        """Return the hyper-parameters that loggers may receive: those of TrainConfig that belong to a distillation."""
        return {name: value for name, value in super().loggable().items() if name not in NOT_OF_DISTILLATION}

    @property
    def distils(self) -> bool:
        """Whether the run distils a student: it does."""
        return True

    @property
    def decodes(self) -> bool:
        """Whether the model reconstructs images: a student has no decoder."""
        return False

    @property
    def reads_whole_images(self) -> bool:
        """Whether the boxes of the lists are ignored."""
        return self.whole_images

    @property
    def load_size(self) -> int:
        """Side in pixels at which crops are loaded: the larger one of teacher and student."""
        return max(self.image_size, self.teacher_size or 0)


# The options of a DistillConfig that `earteach distill` sets itself, and those that are no part of distillation.
SET_BY_COMMAND = (
    "teacher", "teacher_fingerprint", "out", "replace_out", "backbone", "image_size", "pad", "bbox_buffer", "side_policy",
)  # fmt: skip
NOT_OF_DISTILLATION = (
    "embedding_dim", "projection_dim", "decoder_input", "decoder_start", "freeze_stride", "views", "reconstruction_weight",
    "denoise", "contrastive_weight", "temperature", "anchor_weight", "consistency_weight", "metric_weight", "metric_loss",
    "pseudo_classes", "num_pseudo_classes", "cluster_every", "arcface_margin", "arcface_scale", "margin_preset",
    "margin_warmup_epochs", "baseline_weight", "num_collage_samples", "fail_on_collapse",
)  # fmt: skip

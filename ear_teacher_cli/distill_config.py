"""The options of distillation: those of training that apply to a student, with other defaults, and its own."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .config_fields import option
from .errors import ConfigError


def _changed(name: str, default: Any) -> Any:
    """Return an option of TrainConfig with another default."""
    spec = next(each for each in fields(TrainConfig) if each.name == name)
    return field(default=default, metadata=spec.metadata)


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

    strides: str = option("4,8,16", "Distillation", "Strides in pixels of the feature maps that the student learns to predict.", metavar="N,N", common=True)
    teacher_size: int | None = option(None, "Distillation", "Side of the teacher's input in pixels. Default: the one it was trained at. Ears in whole images are small: a larger one shows them to the teacher at the size that it knows.", low=32, high=2048, common=True)
    whole_images: bool = option(False, "Distillation", "Learn from whole images instead of the ears in them, as detectors see them: boxes are ignored, and an image of several ears is read once.", common=True)
    map_weight: float = option(1.0, "Distillation", "Weight of the map loss: predict the teacher's feature maps of --strides with a 1 x 1 convolution each (smooth L1 and cosine).", low=0.0, common=True)
    embedding_weight: float = option(1.0, "Distillation", "Weight of the embedding loss: predict the teacher's embedding with a linear layer (cosine).", low=0.0, common=True)
    relation_weight: float = option(1.0, "Distillation", "Weight of the relation loss: the cosines between the images of a batch are those of the teacher's embeddings.", low=0.0, common=True)

    # Of training, with the student's defaults.
    augmentation: str = _changed("augmentation", "mild")
    freeze_statistics: bool = _changed("freeze_statistics", False)
    learning_rate: float = _changed("learning_rate", 1e-3)
    head_lr_mult: float = _changed("head_lr_mult", 1.0)
    monitor: str = _changed("monitor", "val/loss")
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
        if self.out and self.experiment_dir.resolve() == Path(self.out).resolve():
            found = f"{self.experiment_name} in --output-dir is OUT itself, and the run is a folder of its own"
            raise ConfigError("experiment_name", found, "choose another")

    def _check_losses(self) -> None:
        if not any((self.map_weight, self.embedding_weight, self.relation_weight)):
            raise ConfigError("map_weight", "0 leaves nothing to learn without another loss", "raise one of the three")
        if self.map_weight and not self.map_strides:
            raise ConfigError("strides", f"{self.strides!r} names no stride", "give, for example, 4,8,16")
        if self.map_weight and min(self.map_strides) < 2:
            raise ConfigError("strides", f"{self.strides!r} is no list of strides", "give, for example, 4,8,16")

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
    "teacher", "teacher_fingerprint", "out", "backbone", "image_size", "pad", "bbox_buffer", "side_policy",
)  # fmt: skip
NOT_OF_DISTILLATION = (
    "embedding_dim", "projection_dim", "decoder_input", "decoder_start", "freeze_stride", "views", "reconstruction_weight",
    "denoise", "contrastive_weight", "temperature", "anchor_weight", "consistency_weight", "metric_weight", "metric_loss",
    "pseudo_classes", "num_pseudo_classes", "cluster_every", "arcface_margin", "arcface_scale", "margin_preset",
    "margin_warmup_epochs", "baseline_weight", "num_collage_samples", "fail_on_collapse",
)  # fmt: skip

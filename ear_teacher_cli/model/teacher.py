"""The teacher: a timm backbone, the heads of the metric loss, and a decoder back to pixels.

B images, H = W = image_size pixels, D embedding, D' projection.
"""

from collections.abc import Collection

import timm
import torch
from torch import nn

from ..config import TrainConfig
from ..data.preprocessing import pretrained_cfg_of
from ..errors import ConfigError
from .decoder import Decoder
from .freezing import freeze_to_stride, keep_statistics


def build_backbone(name: str, image_size: int) -> nn.Module:
    """A timm model without classifier, random weights: B,3,H,W -> B,D. Raises ConfigError if timm has no such model."""
    sized = {"img_size": image_size} if pretrained_cfg_of(name).fixed_input_size else {}
    return timm.create_model(name, pretrained=False, num_classes=0, **sized)


@torch.no_grad()
def embedding_size(backbone: nn.Module, image_size: int) -> int:
    """D, from an image sent through (timm's attributes differ from model to model)."""
    was_training = backbone.training
    size = backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape
    backbone.train(was_training)
    if len(size) != 2:
        raise ConfigError("backbone", f"gives features of shape {tuple(size)}", "choose one that pools to a vector")
    return size[1]


class TeacherModel(nn.Module):
    """Backbone -> embedding -> projection -> prediction; and embedding -> decoder -> image.

    The metric loss is asked of the prediction head's output, at the end of the chain, so that projection and
    prediction both learn (DistributedDataParallel refuses parameters without a gradient) and the embedding
    itself is free of the pseudo-classes' last word. The contrastive loss is asked of the projection. `heads`: those that
    the losses of a run need (training/objectives.py), of "projection" and "prediction"; the others are None.
    """

    def __init__(self, config: TrainConfig, heads: Collection[str] = ("projection", "prediction")):
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.image_size)
        self.embedding_dim = embedding_size(self.backbone, config.image_size)
        if config.embedding_dim not in (None, self.embedding_dim):
            raise ConfigError(
                "embedding_dim",
                f"{config.embedding_dim} given, but {config.backbone} has {self.embedding_dim}",
                "leave the option out",
            )
        freeze_to_stride(self.backbone, config.kept_stride)
        self.keep_statistics = config.keeps_statistics
        projects, predicts = "projection" in heads, "prediction" in heads
        self.projection = projection_head(self.embedding_dim, config.projection_dim) if projects else None
        self.prediction = prediction_head(config.projection_dim) if predicts else None
        self.decoder = Decoder(self.embedding_dim, config.image_size)

    def train(self, mode: bool = True) -> "TeacherModel":
        super().train(mode)
        keep_statistics(self.backbone, self.keep_statistics)
        return self

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised B,3,H,W -> B,D: what is exported, and what `embed` writes."""
        return self.backbone(images)

    def predict(self, embedding: torch.Tensor) -> torch.Tensor:
        """B,D -> B,D': what the metric loss sees."""
        assert self.projection is not None and self.prediction is not None
        return self.prediction(self.projection(embedding))


def projection_head(embedding_dim: int, projection_dim: int) -> nn.Sequential:
    """B,D -> B,D' (SimSiam's projector, Chen and He 2021, sec. 3, with two layers; its end is centred by batch norm)."""
    return nn.Sequential(
        nn.Linear(embedding_dim, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim),
        nn.ReLU(inplace=True),
        nn.Linear(embedding_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
    )


def prediction_head(projection_dim: int) -> nn.Sequential:
    """B,D' -> B,D' through a bottleneck of a quarter (SimSiam's predictor)."""
    hidden = max(1, projection_dim // 4)
    return nn.Sequential(
        nn.Linear(projection_dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, projection_dim),
    )

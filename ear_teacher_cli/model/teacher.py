"""The teacher network: a timm backbone, the heads of the losses on embeddings, and a decoder back to pixels.

Shapes: B images, H = W = image_size pixels, D = embedding dimension, D' = projection dimension.
"""

import warnings
from collections.abc import Collection
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from ..config import TrainConfig
from ..data.preprocessing import preprocessing_for, pretrained_cfg_of
from ..errors import ConfigError
from .anchor import Anchor
from .decoder import build_decoder
from .freezing import freeze_to_stride, keep_statistics
from .map_reader import MapReader, Maps


def build_backbone(name: str, image_size: int) -> nn.Module:
    """Build a timm model without classifier and with random weights: normalised B,3,H,W -> B,D.

    Raises ConfigError if timm has no such model.
    """
    return timm.create_model(name, pretrained=False, num_classes=0, **input_size_argument(name, image_size))


def input_size_argument(name: str, image_size: int) -> dict[str, int]:
    """Return the keyword of `timm.create_model` for the input size in pixels: empty for models that take any size.

    Raises ConfigError if timm has no such model.
    """
    return {"img_size": image_size} if pretrained_cfg_of(name).fixed_input_size else {}


@torch.no_grad()
def embedding_size(backbone: nn.Module, image_size: int) -> int:
    """Return D, measured on one image (timm's attributes for it differ from model to model).

    Raises ConfigError if the backbone does not return a vector for each image.
    """
    was_training = backbone.training
    size = backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape
    backbone.train(was_training)
    if len(size) != 2:
        raise ConfigError("backbone", f"gives features of shape {tuple(size)}", "choose one that pools to a vector")
    return size[1]


def checkpoint_activations(backbone: Any) -> None:
    """Let a backbone compute its activations again in the backward pass (gradient checkpointing).

    Raises ConfigError if timm does not support it for this backbone.
    """
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        found = f"timm does not offer it for {type(backbone).__name__}"
        raise ConfigError(
            "gradient_checkpointing", found, "leave the option out, or choose another backbone"
        ) from error
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(partial(_keep_statistics_when_repeated, module.momentum))


def _keep_statistics_when_repeated(momentum: float | None, module: Any, given: Any) -> None:
    """Keep the running statistics of batch normalisation in the backward pass, where its input is seen again."""
    is_repeated = torch._C._current_graph_task_id() != -1
    module.momentum = 0.0 if is_repeated else momentum
    if is_repeated and module.training and module.num_batches_tracked is not None:
        module.num_batches_tracked.sub_(1)  # the layer adds 1


class TeacherModel(nn.Module):
    """Backbone -> embedding -> projection -> prediction, and embedding or last feature map -> decoder -> image.

    The metric loss takes the output of the prediction head, the end of the chain, so that both heads get a gradient
    (DistributedDataParallel does not accept parameters without one) and the pseudo-classes act on the embedding only
    through the heads. The contrastive loss takes the output of the projection head. `heads`: those of "projection" and
    "prediction" that the losses of a run use (training/objectives.py); the others are None.
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
        self.anchor = build_anchor(config, self.backbone) if config.is_anchored else None
        self.reader = self.anchor.reader if self.anchor is not None else None
        if config.map_strides:
            self.reader = student_reader(self.backbone, config)
        self.decodes_map = config.decodes and config.decoder_input == "map"
        if self.decodes_map and self.reader is None:
            self.reader = MapReader(self.backbone, config.image_size, None, "decoder_input", "embedding")
        self.decoder = build_decoder(config, self._decoder_shape()) if config.decodes else None
        if config.gradient_checkpointing:  # now that the anchor has its copy of the backbone
            checkpoint_activations(self.backbone)

    def _decoder_shape(self) -> tuple[int, ...]:
        """Return (D,) of an embedding, or (C, G, G) of the last feature map."""
        if not self.decodes_map:
            return (self.embedding_dim,)
        assert self.reader is not None
        return self.reader.shapes[self.reader.strides[-1]]

    def train(self, mode: bool = True) -> "TeacherModel":
        """Set training mode, except for batch normalisation whose statistics are kept."""
        super().train(mode)
        keep_statistics(self.backbone, self.keep_statistics)
        return self

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings B,D of normalised images B,3,H,W: the output that exports and `embed` use."""
        return self.backbone(images)

    def embed_with_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, Maps]:
        """Return the embeddings B,D of `embed`, and the feature maps that the anchor loss compares and the decoder reads;
        none without an anchor and a decoder of maps."""
        if self.reader is None:
            return self.embed(images), {}
        return self.reader(self.backbone, images)

    def decoder_input(self, embedding: torch.Tensor, maps: Maps) -> torch.Tensor:
        """Return what the decoder reads of the output of `embed_with_maps`: B,D, or the last map B,C,G,G."""
        return maps[max(maps)] if self.decodes_map else embedding

    def predict(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return predictions B,D' of embeddings B,D: the input of the metric loss."""
        assert self.projection is not None and self.prediction is not None
        return self.prediction(self.projection(embedding))

    def compile_parts(self) -> None:
        """Compile backbone, anchor and decoder with torch.compile, in place: names of tensors stay. The first step is
        slow."""
        torch._functorch.config.donated_buffer = False  # train/grad_ratio goes back through the graph a second time
        # dynamo looks at inputs' gradients, which those in mid-model do not have
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        self.backbone.compile()
        if self.decoder is not None:
            self.decoder.compile()
        if self.reader is not None:  # maps do not come from forward()
            self.backbone.forward_intermediates = torch.compile(self.backbone.forward_intermediates)
        if self.anchor is not None:
            self.anchor.backbone.forward_intermediates = torch.compile(self.anchor.backbone.forward_intermediates)


def student_reader(backbone: nn.Module, config: TrainConfig) -> MapReader:
    """Return the reader of the maps that a student learns. Raises ConfigError if it has no maps of these strides."""
    reader = MapReader(backbone, config.image_size, min(config.map_strides), "map_weight", "0")
    if missing := sorted(set(config.map_strides) - set(reader.strides)):
        known = ", ".join(map(str, reader.strides))
        raise ConfigError("strides", f"{config.backbone} has maps of {known}, not of {missing[0]}", "choose among them")
    return reader


def build_anchor(config: TrainConfig, backbone: nn.Module) -> Anchor:
    """Build the anchor of a teacher's `backbone`, with its weights.

    Raises ConfigError if timm gives no feature maps of the model, or if it has a fixed input size.
    """
    if pretrained_cfg_of(config.backbone).fixed_input_size:
        found = f"{config.backbone} takes images of one size only, not of twice the side"
        raise ConfigError("anchor_weight", found, "choose another backbone, or 0")
    return Anchor(backbone, preprocessing_for(config))


def projection_head(embedding_dim: int, projection_dim: int) -> nn.Sequential:
    """Build B,D -> B,D': SimSiam's projector (Chen and He 2021, sec. 3) with two layers. Its output is centred by batch
    normalisation."""
    return nn.Sequential(
        nn.Linear(embedding_dim, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim),
        nn.ReLU(inplace=True),
        nn.Linear(embedding_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
    )


def prediction_head(projection_dim: int) -> nn.Sequential:
    """Build B,D' -> B,D' through a bottleneck of D'/4 (SimSiam's predictor)."""
    hidden = max(1, projection_dim // 4)
    return nn.Sequential(
        nn.Linear(projection_dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, projection_dim),
    )

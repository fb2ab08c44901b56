"""Backbones of the study: how each starts, and how it is kept."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.core.embedder import export_header
from ear_teacher_cli.core.model import build_backbone, embedding_size
from ear_teacher_cli.core.weights import load_pretrained
from ear_teacher_cli.data.pixels import preprocessing_for


def start_of(config: TrainConfig) -> nn.Module:
    """The backbone every row starts from: pretrained as the configuration says, else seeded random weights."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone, config.image_size)
    if config.pretrained:
        load_pretrained(backbone, config)
    return backbone


def save_teacher(backbone: nn.Module, config: TrainConfig, path: Path) -> None:
    """Write a backbone as `earteach export-backbone` does, so that `earteach embed --weights` reads it."""
    preprocessing = preprocessing_for(config)
    dim = embedding_size(backbone.cpu(), config.image_size)
    state = {name: tensor.detach().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(state, path, metadata=export_header(config.backbone, dim, preprocessing, source_sha256=""))


def feature_maps(weights: nn.Module, name: str, image_size: int) -> nn.Module:
    """A timm `features_only` model with the weights of a whole backbone: B,3,H,W -> list of B,C,H',W'.

    timm drops keys it does not know without a word here, so every tensor is compared with where it came from.
    """
    sized = {"img_size": image_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    maps = timm.create_model(name, pretrained=False, features_only=True, **sized)
    state = {key.replace(".", "_"): tensor for key, tensor in weights.state_dict().items()}
    with torch.no_grad():
        for key, tensor in maps.state_dict().items():  # FeatureListNet calls stages.0.x stages_0.x
            plain = key.removeprefix("model.").replace(".", "_")
            assert plain in state, f"{name}: the map model's {key} is not in the backbone"
            tensor.copy_(state[plain])
    return maps.eval().requires_grad_(False)

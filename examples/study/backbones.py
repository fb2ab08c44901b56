"""Backbones of the study: how each starts, and how it is kept."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.data.preprocessing import preprocessing_for
from ear_teacher_cli.model.export_format import About, header_of
from ear_teacher_cli.model.teacher import build_backbone, embedding_size
from ear_teacher_cli.model.weights import load_pretrained


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
    save_file(state, path, metadata=header_of(About(config.backbone, dim, preprocessing), source_sha256=""))

"""Build the initial backbone of a row of the study, and save a trained one."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.data.preprocessing import preprocessing_for
from ear_teacher_cli.model.export_format import About, header_of
from ear_teacher_cli.model.teacher import build_backbone, embedding_size
from ear_teacher_cli.model.weights import load_pretrained


def initial_backbone(config: TrainConfig) -> nn.Module:
    """Return the backbone before training: pretrained if the configuration asks for it, else with seeded random weights."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone, config.image_size)
    if config.pretrained:
        load_pretrained(backbone, config)
    return backbone


def save_teacher(backbone: nn.Module, config: TrainConfig, path: Path) -> None:
    """Write a backbone in the format of `earteach export-backbone`, so that `earteach embed --weights` reads it."""
    preprocessing = preprocessing_for(config)
    dim = embedding_size(backbone.cpu(), config.image_size)
    state = {name: tensor.detach().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(state, path, metadata=header_of(About(config.backbone, dim, preprocessing), source_sha256=""))

"""Train SimCLR, SimSiam and DINO with the losses and heads of the package `lightly`.

Everything else is as in `earteach train`: data set, augmentation, initial weights, frozen layers, AdamW, learning rate,
batch size and, unless --rival-epochs says otherwise, number of steps.

B images, D embedding.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from backbones import initial_backbone, save_teacher
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    DINOProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import nn

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.data.augment import derive_seed
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.preprocessing import normalise
from ear_teacher_cli.model.freezing import freeze_to_stride, keep_statistics
from ear_teacher_cli.model.teacher import embedding_size
from ear_teacher_cli.training.optimisation import parameter_groups, rate_at


class SimCLR(nn.Module):
    """Chen et al. 2020; temperature 0.2, which gave better results than lightly's 0.5 in short runs from pretrained weights."""

    def __init__(self, backbone: nn.Module, dim: int, steps: int):
        super().__init__()
        self.backbone, self.head = backbone, SimCLRProjectionHead(dim, dim, 128)
        self.loss = NTXentLoss(temperature=0.2)

    def forward(self, first: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
        """Return the loss of two normalised views B,3,H,W."""
        return self.loss(self.head(self.backbone(first)), self.head(self.backbone(second)))


class SimSiam(nn.Module):
    """Chen and He 2021, with the layer sizes of the paper."""

    def __init__(self, backbone: nn.Module, dim: int, steps: int):
        super().__init__()
        self.backbone = backbone
        self.projection, self.prediction = (
            SimSiamProjectionHead(dim, 2048, 2048),
            SimSiamPredictionHead(2048, 512, 2048),
        )
        self.loss = NegativeCosineSimilarity()

    def forward(self, first: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
        a, b = self.projection(self.backbone(first)), self.projection(self.backbone(second))
        return (self.loss(self.prediction(a), b.detach()) + self.loss(self.prediction(b), a.detach())) / 2


class DINO(nn.Module):
    """Caron et al. 2021 on two views, without small crops, which would cut off the helix or lobule.

    1024 prototypes instead of 65,536, for thousands of images instead of a million. The resulting backbone is that of
    the momentum teacher, as in the paper.
    """

    def __init__(self, backbone: nn.Module, dim: int, steps: int):
        super().__init__()
        self.student, self.backbone, self.steps = backbone, copy.deepcopy(backbone), steps
        with warnings.catch_warnings():  # lightly 1.6 uses torch's older weight_norm
            warnings.simplefilter("ignore", FutureWarning)
            self.student_head, self.head = (DINOProjectionHead(dim, 2048, 256, 1024) for _ in range(2))
        self.head.load_state_dict(self.student_head.state_dict())
        for parameter in [*self.backbone.parameters(), *self.head.parameters()]:
            parameter.requires_grad_(False)
        self.loss = DINOLoss(output_dim=1024)

    def forward(self, first: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
        momentum = cosine_schedule(step, self.steps, 0.9, 1.0)
        update_momentum(self.student, self.backbone, momentum)
        update_momentum(self.student_head, self.head, momentum)
        with torch.no_grad():
            targets = [self.head(self.backbone(view)) for view in (first, second)]
        predictions = [self.student_head(self.student(view)) for view in (first, second)]
        return self.loss(targets, predictions, teacher_temp=0.04)


RIVALS = {"simclr": SimCLR, "simsiam": SimSiam, "dino": DINO}


def train_rival(name: str, config: TrainConfig, out: Path) -> list[float]:
    """Train one of RIVALS with the options of `config`, except its objective, and write its backbone to `out`.

    Return the loss of each step.
    """
    data = EarDataModule(config)
    data.setup()
    loader = data.train_dataloader()
    steps = len(loader) * config.max_epochs
    backbone = initial_backbone(config)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    freeze_to_stride(backbone, config.kept_stride)
    initial = [parameter.detach().to(device, copy=True) for parameter in backbone.parameters()]
    model = RIVALS[name](backbone, embedding_size(backbone, config.image_size), steps).to(device)
    groups = parameter_groups(model, backbone, config)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    warmup = int(steps * config.warmup / config.max_epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, warmup, steps))
    losses: list[float] = []
    for epoch in range(config.max_epochs):
        loader.sampler.set_epoch(epoch)
        model.train()
        for module in (backbone, model.backbone):
            keep_statistics(module, config.keeps_statistics)
        for batch in loader:
            if len(batch["index"]) < 2:  # too few readable images for batch statistics, as in earteach
                continue
            losses.append(_step(model, batch, data.train_set.preprocessing, optimizer, len(losses), device, config))
            schedule.step()
        print(f"epoch {epoch + 1}/{config.max_epochs}: {name} loss {losses[-1]:.4f}", flush=True)
    with torch.no_grad():
        for trained, start in zip(model.backbone.parameters(), initial, strict=True):
            trained.lerp_(start, config.kept_share)
    save_teacher(model.backbone, config, out)
    return losses


def _step(
    model: nn.Module,
    batch: dict[str, Any],
    preprocessing,
    optimizer: torch.optim.Optimizer,
    step: int,
    device: torch.device,
    config: TrainConfig,
) -> float:
    torch.manual_seed(derive_seed(config.seed, step))  # of stochastic depth, as in earteach
    views = [normalise(batch[name].to(device), preprocessing) for name in ("pixels", "view")]
    loss = model(*views, step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

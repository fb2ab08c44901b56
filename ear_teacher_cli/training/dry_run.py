"""`train --dry-run`: one step forward and back on the real data and device, and what a run would need."""

import time
from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..console import Console, clock, counted
from ..data.dataset import Batch
from ..errors import EarTeachError
from ..model.anchor import SCALE
from ..platform import usable_cores
from .callbacks import WHITEN_ON
from .launch import count_classes, new_module, prepare, uses_cuda
from .module import EarTeacherLightningModule
from .objectives import ClassTargets


@dataclass(frozen=True)
class Estimate:
    """What a run would need: `seconds` without data loading and the decoding of validation images, `bytes` of disk."""

    steps_per_epoch: int
    step_seconds: float
    seconds: float
    bytes: int
    loss: float


def estimate(config: TrainConfig, console: Console) -> tuple[TrainConfig, Estimate]:
    """Return the configuration as it would be used here, and what a run would need. Writes nothing.

    Raises EarTeachError.
    """
    config, data = prepare(config, console, new=True)
    train, val = data.train_set, data.val_set
    assert train is not None and val is not None
    module = new_module(config, console)
    device = torch.device("cuda" if uses_cuda(config) else "cpu")
    module.to(device).train()
    if config.compile:
        module.model.compile_parts()
    loader = data.train_dataloader()
    batch = next(iter(loader))
    if len(batch["index"]) < 2:
        raise EarTeachError("the first batch holds no two readable images; run earteach validate-data")
    count = max(2, count_classes(config, train.manifest))
    prototypes = torch.randn(count, config.projection_dim, device=device).requires_grad_()
    seconds = loss = 0.0
    for _ in range(2):  # the first step also pays for warming up
        start = time.perf_counter()
        loss = one_step(module, batch, prototypes)
        seconds = time.perf_counter() - start
    # in forward passes of an image: a view of a step takes about three, one of validation and of whitening (with its share
    # of k-means) one, the anchor as many as its image is larger
    anchor = SCALE**2 if config.is_anchored else 0
    forward = (2 + anchor) * len(val) + (min(len(train), WHITEN_ON) if config.whiten else 0)
    images = len(train) + forward / (3 * config.views + anchor)
    parallel = config.processes if uses_cuda(config) else min(config.processes, usable_cores())
    total = seconds * images / len(batch["index"]) * config.max_epochs / parallel
    return config, Estimate(len(loader), seconds, total, _bytes_of_checkpoints(config, module), loss)


def one_step(module: EarTeacherLightningModule, batch: Batch, prototypes: torch.Tensor) -> float:
    """Return the loss of a training step of the first epoch, forward and back.

    `prototypes` K,D': the labels are made up, too, which changes nothing of the cost.
    """
    batch = {name: value.to(module.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = torch.arange(len(batch["index"]), device=module.device) % len(prototypes)
    loss = module.objective.training(module.training_outputs(batch, ClassTargets(prototypes, labels))).total
    loss.backward()
    return float(loss.detach())


def _bytes_of_checkpoints(config: TrainConfig, module: EarTeacherLightningModule) -> int:
    frozen, trained = (
        4 * sum(p.numel() for p in module.parameters() if p.requires_grad is learns) for learns in (False, True)
    )
    every = config.checkpoint_every_n_epochs
    kept = 4 + (config.max_epochs // every if every else 0)
    copies = 3 + (config.kept_share > 0) + (config.ema_decay > 0) + bool(config.kept_share or config.ema_decay)
    return (copies * trained + frozen) * kept


def describe_estimate(estimate: Estimate) -> str:
    """Return the estimate as a sentence."""
    return (
        f"one training step: loss {estimate.loss:.4g}, {estimate.step_seconds:.2f} s; "
        f"{counted(estimate.steps_per_epoch, 'step')} an epoch; the run: about {clock(estimate.seconds)} of computing "
        "(full precision; loading, checkpoints and images not counted) and "
        f"{estimate.bytes / 2**20:.0f} MiB of disk"
    )

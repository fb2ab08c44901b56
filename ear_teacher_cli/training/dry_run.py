"""`train --dry-run`: one step forward and back on the real data and device, and what a run would need."""

import time
from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..console import Console, clock, counted
from ..errors import EarTeachError
from ..model.anchor import SCALE
from ..platform import peak_memory, usable_cores
from .callbacks import WHITEN_ON
from .device import uses_cuda
from .launch import new_module, prepare
from .module import EarTeacherLightningModule
from .step_trial import one_step

TIMED = 4  # batches of each worker whose loading is timed: more than are loaded ahead


@dataclass(frozen=True)
class Estimate:
    """What a run would need: `seconds` without data loading and the decoding of validation images, `bytes` of disk for
    checkpoints and cached crops, `memory` in bytes (None: not known). `precision` of the step; `load_seconds` to load a
    batch by all workers together, uncached."""

    steps_per_epoch: int
    step_seconds: float
    load_seconds: float
    seconds: float
    bytes: int
    loss: float
    precision: str
    memory: float | None


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
    batches = iter(loader)
    batch = next(batches)
    if len(batch["index"]) < 2:
        raise EarTeachError("the first batch holds no two readable images; run earteach validate-data")
    start = time.perf_counter()
    loaded = sum(1 for _, _ in zip(range(TIMED * max(1, loader.num_workers)), batches, strict=False))
    load_seconds = (time.perf_counter() - start) / max(1, loaded)
    data.stop_workers()  # they would take time from the step
    batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)
    seconds = loss = 0.0
    for _ in range(2):  # the first step also pays for warming up
        start = time.perf_counter()
        loss = one_step(module, batch)
        seconds = time.perf_counter() - start
    # in forward passes of an image: a view of a step takes about three, one of validation and of whitening (with its share
    # of k-means) one, the anchor as many as its image is larger
    anchor = SCALE**2 if config.is_anchored else 0
    forward = (2 + anchor) * len(val) + (min(len(train), WHITEN_ON) if config.whiten else 0)
    images = len(train) + forward / (3 * config.views + anchor)
    parallel = config.processes if uses_cuda(config) else min(config.processes, usable_cores())
    total = seconds * images / len(batch["index"]) * config.max_epochs / parallel
    disk = int(_bytes_of_checkpoints(config, module) + data.cache_bytes_on_disk())
    precision = config.precision
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    found = Estimate(len(loader), seconds, load_seconds, total, disk, loss, precision, memory or None)
    return config, found


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
    loading, step = estimate.load_seconds, estimate.step_seconds
    waiting = (
        f"loading is slower: it would wait for data {100 * (1 - step / loading):.0f} % of the time until crops are cached"
        if loading > step
        else "loading keeps up"
    )
    memory = f", {estimate.memory / 1e9:.1f} GB of memory" if estimate.memory else ""
    return (
        f"one training step ({estimate.precision}): loss {estimate.loss:.4g}, {step:.2f} s{memory}; loading a batch "
        f"{loading:.2f} s ({waiting}); {counted(estimate.steps_per_epoch, 'step')} an epoch; the run: about "
        f"{clock(estimate.seconds)} of computing (loading, checkpoints and images not counted) and "
        f"{estimate.bytes / 2**20:.0f} MiB of disk"
    )

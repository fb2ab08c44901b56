"""`train --dry-run`: one step forward and back on the real data and device, and what a run would need."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..config import TrainConfig
from ..console import Console, clock, counted
from ..errors import EarTeachError
from ..model.anchor import SCALE
from ..platform import peak_memory, usable_cores
from .callbacks import WHITEN_ON
from .device import arithmetic_of, uses_cuda
from .launch import count_classes, new_module, prepare
from .module import EarTeacherLightningModule
from .step_trial import bytes_besides_a_step, one_step

AHEAD, TIMED = 2, 2  # batches of each worker: those it loads ahead, and those whose loading is timed


@dataclass(frozen=True)
class Estimate:
    """What a run would need: `seconds` without data loading and the decoding of validation images, `bytes` of disk for
    checkpoints and cached crops, `memory` in bytes (None: not known). `precision` of the step; `load_seconds` to load a
    batch by all workers together, uncached (None: too few batches to tell)."""

    steps_per_epoch: int
    step_seconds: float
    load_seconds: float | None
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
    workers = max(1, loader.num_workers)
    _count(islice(batches, AHEAD * workers))
    start = time.perf_counter()
    timed = _count(islice(batches, TIMED * workers))
    load_seconds = (time.perf_counter() - start) / timed if timed else None
    data.stop_workers()  # they would take time from the step
    batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)
    seconds, loss, classes = 0.0, 0.0, count_classes(config, train.manifest)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of --batch-size auto
    for _ in range(2):  # the first step also pays for warming up
        start = time.perf_counter()
        with arithmetic_of(config):
            loss = one_step(module, batch, classes)
        seconds = time.perf_counter() - start
    # in forward passes of an image: a view of a step takes about three, one of validation and of whitening (with its share
    # of k-means) one, the anchor as many as its image is larger
    anchor = SCALE**2 if config.is_anchored else 0
    forward = (2 + anchor) * len(val) + (min(len(train), WHITEN_ON) if config.whiten else 0)
    images = len(train) + forward / (3 * config.views + anchor)
    parallel = config.processes if uses_cuda(config) else min(config.processes, usable_cores())
    total = seconds * images / len(batch["index"]) * config.max_epochs / parallel
    disk = int(_bytes_of_checkpoints(config, module) + data.cache_bytes()["disk"])
    precision = config.precision
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    if memory:
        memory += bytes_besides_a_step(module)
    found = Estimate(len(loader), seconds, load_seconds, total, disk, loss, precision, memory or None)
    return config, found


def _count(batches: Iterator[Any]) -> int:
    return sum(1 for _ in batches)


def _bytes_of_checkpoints(config: TrainConfig, module: EarTeacherLightningModule) -> int:
    frozen, trained = (
        4 * sum(p.numel() for p in module.parameters() if p.requires_grad is learns) for learns in (False, True)
    )
    every = config.checkpoint_every_n_epochs
    kept = 3 + (config.max_epochs // every if every else 0)  # the last is a name of one of the others, or one more
    kept += not (every and config.max_epochs % every == 0)
    copies = 3 + (config.kept_share > 0) + (config.ema_decay > 0) + bool(config.kept_share or config.ema_decay)
    return (copies * trained + frozen) * kept


def describe_estimate(estimate: Estimate) -> str:
    """Return the estimate as a sentence."""
    loading, step = estimate.load_seconds, estimate.step_seconds
    if loading is None:
        about_loading = ""
    elif loading > step:
        share = 100 * (1 - step / loading)
        about_loading = (
            f"; loading a batch {loading:.2f} s: until crops are cached, {share:.0f} % of the time is waiting"
        )
    else:
        about_loading = f"; loading a batch {loading:.2f} s, which keeps up"
    memory = f", {estimate.memory / 1e9:.1f} GB of memory" if estimate.memory else ""
    return (
        f"one training step ({estimate.precision}): loss {estimate.loss:.4g}, {step:.2f} s{memory}{about_loading}; "
        f"{counted(estimate.steps_per_epoch, 'batch', 'batches')} an epoch; the run: about {clock(estimate.seconds)} of "
        f"computing (loading, checkpoints and images not counted) and {estimate.bytes / 2**20:.0f} MiB of disk"
    )

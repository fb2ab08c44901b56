"""What `train`, `resume` and `--dry-run` do first: check the machine, read the data, build the model."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from .. import library_messages
from ..config import TrainConfig
from ..config_fields import AUTO_NUMBER
from ..console import Console, counted
from ..data.datamodule import EarDataModule
from ..data.manifest import Manifest
from ..distributed import is_first_process, started_processes
from ..errors import ConfigError
from ..files import printable
from ..platform import usable_cores
from . import loggers
from .batch_size import find_batch_size
from .describe import describe, describe_data
from .device import best_precision, uses_cuda
from .module import EarTeacherLightningModule
from .pseudo_labels import class_count

# Lightning's own output, which the console replaces.
SILENT = {"enable_progress_bar": False, "enable_model_summary": False}


# Fewer CPU cores than these for each GPU augment more slowly than it trains a small backbone.
CORES_FOR_AUGMENTING = 8


def prepare(config: TrainConfig, console: Console, new: bool = False) -> tuple[TrainConfig, EarDataModule]:
    """Fit the configuration to the machine and read the data; print what was settled. Writes nothing.

    `new`: a run that begins, whose options may be refused; one that is resumed has them already. Raises EarTeachError.
    """
    settled = []
    if config.deterministic:  # read once, when a GPU is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.precision == "auto":
        config = replace(config, precision=best_precision(config))
    if config.precision == "16-mixed" and not uses_cuda(config):
        settled.append("precision: 16-mixed needs a GPU; training in full precision (32-true)")
        config = replace(config, precision="32-true")
    if config.augment_on != "cpu" and not uses_cuda(config):
        if config.augment_on == "gpu":
            settled.append("augmentation: there is no GPU for it; augmenting on the CPU")
        config = replace(config, augment_on="cpu")
    elif config.augment_on == "auto":
        few = usable_cores() < CORES_FOR_AUGMENTING * config.devices
        config = replace(config, augment_on="gpu" if few else "cpu")
    if config.warmup != config.warmup_epochs:
        settled.append(
            f"warm-up: of {counted(config.warmup_epochs, 'epoch')} does not fit into {config.max_epochs}; "
            f"using {config.warmup:g}"
        )
    _check_machine(config, console)
    data = EarDataModule(config)
    data.console = console
    data.setup("fit")
    assert data.train_set is not None and data.val_set is not None
    train, val = data.train_set.manifest, data.val_set.manifest
    if config.batch_size * config.processes > len(train):
        settled.append(_about_large_batch(config, len(train), new))
    for line in settled:
        console.info(line)
    if config.batch_size == AUTO_NUMBER:
        classes, kept = count_classes(config, train), data.cache_bytes()["ram"]
        data.config = config = find_batch_size(config, len(train), classes, kept, console)
    about_data = describe_data(config, train, val, count_classes(config, train))
    console.summary([*describe(config), ("data", about_data)])
    return config, data


def count_classes(config: TrainConfig, train: Manifest) -> int:
    """Return the number of pseudo-classes of the training list; 0 without a metric loss."""
    return class_count(config.pseudo_classes, train, config.num_pseudo_classes) if config.learns_classes else 0


def _about_large_batch(config: TrainConfig, images: int, new: bool) -> str:
    """Return what a batch larger than the `images` of the training list means.

    Raises ConfigError for a new run if it is larger than the default, too: most likely a typing error.
    """
    processes = config.processes
    share = "" if processes == 1 else f" for each of {processes} processes"
    if new and config.batch_size > TrainConfig.batch_size:
        where = printable(config.train_metadata)
        found = f"{config.batch_size}{share} is more than the {counted(images, 'image')} of {where}"
        raise ConfigError("batch_size", found, f"use at most {images // processes}")
    return (
        f"batch size: {config.batch_size}{share} is more than the {counted(images, 'image')} there are; every step "
        "takes all of them"
    )


def _check_machine(config: TrainConfig, console: Console) -> None:
    """Let Lightning refuse an accelerator or a number of devices before anything is read or written."""
    loggers.require(config)
    started = started_processes()
    if started not in (None, config.processes):
        found = (
            f"{config.devices} on {config.num_nodes} node(s) are {config.processes} process(es), "
            f"but {started} were started"
        )
        raise ConfigError(
            "devices", found, "make --devices (of a node) times --num-nodes as many as the launcher starts"
        )
    if config.num_nodes > 1 and started is None and "MASTER_ADDR" not in os.environ:
        raise ConfigError("num_nodes", "several nodes were not started", "start with torchrun or srun on all of them")
    try:
        with quiet_lightning():
            trainer = pl.Trainer(
                **machine_of(config), strategy=config.strategy, logger=False, enable_checkpointing=False, **SILENT
            )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        found = (
            f"{config.accelerator!r} with {config.processes} device(s) is not available on this machine "
            f"({' '.join(str(error).split())[:160]})"
        )
        raise ConfigError("accelerator", found, "choose another --accelerator or --devices") from error
    cores = usable_cores()
    if isinstance(trainer.accelerator, CPUAccelerator) and config.devices > cores and is_first_process():
        console.warn(
            f"--devices: {config.devices} processes are to share {counted(cores, 'CPU core')}, without a GPU, and will "
            f"be slower than {cores}; use --devices {cores} or less"
        )


def machine_of(config: TrainConfig) -> dict[str, Any]:
    """Return the Trainer's arguments about the machine, without the strategy."""
    return {name: getattr(config, name) for name in ("accelerator", "devices", "num_nodes", "precision")}


def strategy_of(config: TrainConfig) -> Strategy | str:
    """Return the Trainer's strategy."""
    if config.processes == 1:
        return config.strategy
    # while rank 0 clusters, possibly millions of images, the others wait longer than torch's half hour
    return DDPStrategy(timeout=timedelta(hours=6))


def new_module(config: TrainConfig, console: Console) -> EarTeacherLightningModule:
    """Return a seeded model with its pretrained weights, and print their receipt."""
    pl.seed_everything(config.seed, verbose=False)
    with quiet_lightning():
        module = EarTeacherLightningModule(config)
    if config.pretrained:
        console.summary([("weights", str(module.load_pretrained()))])
    return module


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's tips, banners and hints: they are about choices that are made here, not by the user."""
    if library_messages.are_shown():
        yield
        return
    found = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\.")
            # DistributedDataParallel on depthwise convolutions: a remark on speed, not a fault
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)

"""`train` and `resume`: from two manifests to an experiment folder.

config -> data -> model (with the receipt of its weights) -> fit -> {output_dir}/{experiment_name}/
"""

import errno
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from .. import run_folder
from ..config import TrainConfig, from_dict, read_toml, with_changes
from ..console import Console, clock, counted
from ..data.datamodule import EarDataModule
from ..data.preprocessing import to_unit
from ..distributed import is_first_process, started_processes
from ..errors import ConfigError, EarTeachError, ManifestError, UsageError, WeightsError
from ..files import only_writer, printable, remove_stale_temporaries, shell_word, short_message, whole_file
from ..model.checkpoint import Checkpoint, read_checkpoint, require_fit
from ..platform import usable_cores
from ..system_errors import explain_system_error
from . import callbacks, loggers
from .describe import describe, describe_data, why_best
from .epoch_metrics import ValidationRows
from .interruption import SaveOnStop
from .losses import consistency_loss, contrastive_loss, metric_loss
from .module import WHITEN_ON, EarTeacherLightningModule
from .progress import Reporter
from .pseudo_labels import class_count


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    experiment: Path
    epochs: int
    best: Path | None
    interrupted: int = 0  # the exit code of the signal that stopped it
    saved: bool = False  # in the middle of an epoch, when interrupted
    why: str = ""  # the best is the best
    seconds: float = 0.0  # of this call
    # what the outputs at the end of a run are made of; None where nothing was trained
    config: TrainConfig | None = None
    logger: loggers.Events | None = None
    module: EarTeacherLightningModule | None = None
    data: EarDataModule | None = None
    best_embeddings: ValidationRows | None = None  # of the best epoch of this call


@dataclass(frozen=True)
class Estimate:
    """What a run would need: `seconds` without data loading and validation images' decoding, `bytes` of disk."""

    steps_per_epoch: int
    step_seconds: float
    seconds: float
    bytes: int
    loss: float


# What a resumed run may change: how long it goes on, and what belongs to the machine.
RESUMABLE = ("max_epochs", "devices", "num_nodes", "num_workers", "load_timeout", "cache", "cache_limit")


def train(config: TrainConfig, console: Console, overwrite: bool = False) -> Outcome:
    """Start an experiment. Raises UsageError if it exists and `overwrite` is not given."""
    folder = config.experiment_dir
    _refuse_begun(folder, overwrite)
    config, data = _prepare(config, console, new=True)
    module = _new_module(config, console)
    with _owned(folder):
        _refuse_begun(folder, overwrite)  # by another process, in the meantime
        if is_first_process():
            _remove_run(folder)
            _open_folder(folder, config)
        return _fit(config, data, module, console, None)


def resume(run: str | Path, console: Console, **changes: Any) -> Outcome:
    """Go on with an experiment folder or a checkpoint. A finished run is told so, and nothing is done.

    Of a folder the newest whole checkpoint is taken: one that is damaged is said, and passed over. `changes`: of
    RESUMABLE, what is to be other than it was (None: as it was).
    """
    if unknown := set(changes) - set(RESUMABLE):
        raise TypeError(f"resume() has no {', '.join(sorted(unknown))}; it takes {', '.join(RESUMABLE)}")
    run = Path(run)
    folder = run if run.is_dir() else _experiment_of(run_folder.checkpoint_of(run, best=False))
    with _owned(folder) if (folder / run_folder.CONFIG).is_file() else nullcontext():
        if run_folder.last_checkpoint(folder) is None:
            return _start_again(run, changes, console)
        if run.is_dir():
            checkpoint = _newest_whole(folder, console)
            _experiment_of(checkpoint.path)
        else:
            checkpoint = _require_newest(read_checkpoint(run), folder)
        return _resume_from(checkpoint, folder, changes, console)


def _resume_from(checkpoint: Checkpoint, folder: Path, changes: dict, console: Console) -> Outcome:
    where, max_epochs = printable(folder), changes.get("max_epochs")
    config = with_changes(_located(checkpoint.config, folder), **changes)
    if max_epochs is not None and max_epochs < checkpoint.epoch:
        raise UsageError(f"--max-epochs {max_epochs}: {checkpoint.epoch} epochs are done already; give more")
    if checkpoint.steps_done and config.processes != checkpoint.config.processes:
        console.info(
            f"{printable(checkpoint.path)} was saved within an epoch by {checkpoint.config.processes} process(es); the rest "
            f"of the epoch is divided among {config.processes}, with other batches than it would have had"
        )
    if checkpoint.epoch >= config.max_epochs:
        console.info(f"{where}: finished, all {checkpoint.epoch} epochs are done; give a larger --max-epochs to go on")
        return _already_done(folder, checkpoint)
    waited = [v["wait_count"] for k, v in checkpoint.content["callbacks"].items() if k.startswith("EarlyStopping")]
    if waited and waited[0] >= config.early_stop and max_epochs is None:
        console.info(
            f"{where}: finished, {config.monitor} had not improved for {config.early_stop} epochs; give --max-epochs to go on"
        )
        return _already_done(folder, checkpoint)
    try:
        config, data = _prepare(config, console)
    except ManifestError as error:
        raise ManifestError(f"{error} (the run's paths start from the folder where it was trained)") from error
    module = EarTeacherLightningModule(config)
    require_fit(checkpoint, module.model.state_dict())
    run_folder.read_metrics(folder / run_folder.METRICS)  # damage is said now, not when an epoch is to be added to it
    console.summary([("restored", _restored(checkpoint))])
    if max_epochs not in (None, checkpoint.config.max_epochs):
        console.info(f"the learning rate now follows the cosine of {max_epochs} epochs")
    if is_first_process():
        _open_folder(folder, config)
    return _fit(config, data, module, console, checkpoint.path, checkpoint.content["global_step"])


def _already_done(folder: Path, checkpoint: Checkpoint) -> Outcome:
    best = run_folder.best_checkpoint(folder)
    return Outcome(folder, checkpoint.epoch, best, why=why_best(folder, best, checkpoint.config.monitor))


def dry_run(config: TrainConfig, console: Console) -> tuple[TrainConfig, Estimate]:
    """Everything up to one step forward and back on the real data and device; writes nothing."""
    config, data = _prepare(config, console, new=True)
    module = _new_module(config, console)
    device = torch.device("cuda" if _uses_cuda(config) else "cpu")
    module.to(device).train()
    if config.compile:
        module.compile_model()
    loader = data.train_dataloader()
    batch = next(iter(loader))
    if len(batch["index"]) < 2:
        raise EarTeachError("the first batch holds no two readable images; run earteach validate-data")
    prototypes = torch.randn(max(2, _classes(config, data)), config.projection_dim, device=device)
    seconds = loss = 0.0
    for _ in range(2):  # the first step also pays for warming up
        start = time.perf_counter()
        loss = _one_step(module, batch, prototypes.requires_grad_())
        seconds = time.perf_counter() - start
    # a forward pass is about a third of a step; validation takes two, whitening and its share of k-means one
    forward = 2 * len(data.val_set) + (min(len(data.train_set), WHITEN_ON) if config.whiten else 0)
    images = len(data.train_set) + forward / 3 / config.views
    parallel = config.processes if _uses_cuda(config) else min(config.processes, usable_cores())
    total = seconds * images / len(batch["index"]) * config.max_epochs / parallel
    weights = 4 * sum(p.numel() for p in module.parameters())
    kept = 4 + config.max_epochs // 5
    copies = 3 + (config.kept_share > 0) + (config.ema_decay > 0) + bool(config.kept_share or config.ema_decay)
    return config, Estimate(len(loader), seconds, total, copies * weights * kept, loss)


def _prepare(config: TrainConfig, console: Console, new: bool = False) -> tuple[TrainConfig, EarDataModule]:
    """Fit the configuration to the machine and read the data; say what was settled. Nothing is written.

    `new`: a run that begins, whose options may be refused; one that is resumed has them already.
    """
    settled = []
    if config.precision == "16-mixed" and not _uses_cuda(config):
        settled.append("precision: 16-mixed needs a GPU; training in full precision (32-true)")
        config = replace(config, precision="32-true")
    if config.warmup != config.warmup_epochs:
        settled.append(
            f"warm-up: of {counted(config.warmup_epochs, 'epoch')} does not fit into {config.max_epochs}; using {config.warmup:g}"
        )
    _check_machine(config, console)
    data = EarDataModule(config)
    data.console = console
    data.setup("fit")
    if config.batch_size * config.processes > len(data.train_set):
        settled.append(_about_large_batch(config, data, new))
    for line in settled:
        console.info(line)
    console.summary([*describe(config), ("data", _describe_data(config, data))])
    return config, data


def _about_large_batch(config: TrainConfig, data: EarDataModule, new: bool) -> str:
    """What a batch larger than the training list means. Raises ConfigError for a new run if it is larger than the
    default, too: it was typed, and is most likely a typing error."""
    images, processes = len(data.train_set), config.processes
    share = "" if processes == 1 else f" for each of {processes} processes"
    if new and config.batch_size > TrainConfig.batch_size:
        found = f"{config.batch_size}{share} is more than the {counted(images, 'image')} of {printable(config.train_metadata)}"
        raise ConfigError("batch_size", found, f"use at most {images // processes}")
    return (
        f"batch size: {config.batch_size}{share} is more than the {counted(images, 'image')} there are; every step takes all "
        "of them"
    )


def _check_machine(config: TrainConfig, console: Console) -> None:
    """Let Lightning refuse an accelerator or a number of devices before anything is read or written."""
    loggers.require(config)
    started = started_processes()
    if started not in (None, config.processes):
        found = f"{config.devices} on {config.num_nodes} node(s) are {config.processes} process(es), but {started} were started"
        raise ConfigError(
            "devices", found, "make --devices (of a node) times --num-nodes as many as the launcher starts"
        )
    if config.num_nodes > 1 and started is None and "MASTER_ADDR" not in os.environ:
        raise ConfigError("num_nodes", "several nodes were not started", "start with torchrun or srun on all of them")
    try:
        with _quiet_lightning():
            trainer = pl.Trainer(
                accelerator=config.accelerator,
                devices=config.devices,
                num_nodes=config.num_nodes,
                strategy=config.strategy,
                precision=config.precision,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        found = f"{config.accelerator!r} with {config.processes} device(s) is not to be had here ({' '.join(str(error).split())[:160]})"
        raise ConfigError("accelerator", found, "choose another --accelerator or --devices") from error
    cores = usable_cores()
    if isinstance(trainer.accelerator, CPUAccelerator) and config.devices > cores and is_first_process():
        console.warn(
            f"--devices: {config.devices} processes are to share {counted(cores, 'CPU core')}, without a GPU, and will be "
            f"slower than {cores}; use --devices {cores} or less"
        )


def _strategy(config: TrainConfig) -> Strategy | str:
    if config.processes == 1:
        return config.strategy
    # the others wait while the first clusters what may be millions of images: torch's half hour is too short
    return DDPStrategy(timeout=timedelta(hours=6))


def _new_module(config: TrainConfig, console: Console) -> EarTeacherLightningModule:
    """A seeded model with its pretrained weights, and their receipt said."""
    pl.seed_everything(config.seed, verbose=False)
    with _quiet_lightning():
        module = EarTeacherLightningModule(config)
    if config.pretrained:
        console.summary([("weights", str(module.load_pretrained()))])
    return module


def _fit(
    config: TrainConfig,
    data: EarDataModule,
    module: EarTeacherLightningModule,
    console: Console,
    checkpoint: Path | None,
    step: int | None = None,
) -> Outcome:
    """Train, from a checkpoint at `step` if one is given; events of later steps are taken out of TensorBoard's view."""
    folder, began = config.experiment_dir, time.monotonic()
    found = run_folder.versions(folder)
    logger = loggers.events(config, found[-1].name if found and checkpoint else None, step)
    module.console = data.console = console
    save_on_stop = SaveOnStop(folder / run_folder.CHECKPOINTS / run_folder.LAST)
    kept = callbacks.KeepBestEmbeddings(config.monitor)
    steps = max(1, len(data.train_set) // (config.batch_size * config.processes))
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=_strategy(config),
            precision=config.precision,
            max_epochs=config.max_epochs,
            logger=[logger, *loggers.others(config, Path(logger.log_dir))],
            log_every_n_steps=min(10, steps),
            callbacks=[
                callbacks.StopOnNaN(console),
                *([callbacks.Collages(config.num_collage_samples, config.seed)] if config.images else []),
                callbacks.MetricsFile(folder / run_folder.METRICS),
                callbacks.ClassSizes(),
                callbacks.UnreadableImageList(folder / run_folder.BAD, console),
                Reporter(config, console),
                kept,
                *callbacks.checkpoint_callbacks(folder / run_folder.CHECKPOINTS, config.monitor),
                save_on_stop,
            ],
            plugins=[callbacks.WholeFileCheckpointIO()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        stopped = False
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and save_on_stop.is_stop(trainer, error):
                stopped = True
            elif checkpoint is None or save_on_stop.begun or explain_system_error(error):
                raise
            else:
                raise WeightsError(
                    f"{printable(checkpoint)}: cannot resume from it ({short_message(error)}); use another checkpoint"
                ) from error
        except SystemExit:  # how Lightning ends a run after Ctrl-C
            if trainer.state.status is not TrainerStatus.INTERRUPTED:
                raise
    interrupted = stopped or trainer.state.status is TrainerStatus.INTERRUPTED
    code = save_on_stop.exit_code if interrupted else 0
    best = run_folder.best_checkpoint(folder)
    why = why_best(folder, best, config.monitor)
    took = time.monotonic() - began
    return Outcome(
        folder,
        trainer.current_epoch,
        best,
        code,
        save_on_stop.saved,
        why,
        took,
        config,
        logger,
        module,
        data,
        kept.best,
    )


def _start_again(folder: Path, changes: dict, console: Console) -> Outcome:
    """A run that was stopped before its first checkpoint: everything is seeded, so it starts over and loses nothing."""
    if not (folder / run_folder.CONFIG).is_file():
        raise EarTeachError(
            f"{printable(folder)}: holds neither a checkpoint nor {run_folder.CONFIG}; give a folder that earteach train made"
        )
    config = from_dict(read_toml(folder / run_folder.CONFIG), printable(folder / run_folder.CONFIG))
    if config.experiment_name != folder.resolve().name:
        raise EarTeachError(
            f"{printable(folder)}: its {run_folder.CONFIG} is of {config.experiment_name!r}; start it with `earteach train --config`"
        )
    config = with_changes(_located(config, folder), **changes)
    console.info(f"{printable(folder)}: no epoch was finished; starting from its configuration")
    config, data = _prepare(config, console)
    module = _new_module(config, console)
    if is_first_process():
        _remove_run(folder)
        _open_folder(folder, config)
    return _fit(config, data, module, console, None)


def _experiment_of(path: Path) -> Path:
    """The experiment folder a checkpoint lies in. Raises UsageError if it lies elsewhere: resume would write there."""
    folder = path.resolve().parent.parent
    if path.resolve().parent.name != run_folder.CHECKPOINTS or not (folder / run_folder.CONFIG).is_file():
        raise UsageError(
            f"{printable(path)}: does not lie in the {run_folder.CHECKPOINTS}/ of an experiment, which resume would go on writing; "
            "give the experiment folder"
        )
    return folder


def _newest_whole(folder: Path, console: Console) -> Checkpoint:
    """Raises the newest one's WeightsError if none is whole."""
    for path, following in pairwise([*run_folder.checkpoints(folder), None]):
        try:
            return read_checkpoint(path)
        except WeightsError as error:
            passing = isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING
            if passing or following is None:
                raise
            console.warn(f"{error}. Trying {printable(following.name)}")
    raise AssertionError("a folder with a checkpoint has one")


# Errors of reading that say nothing of the file: it may be whole, and must not be passed over.
_PASSING = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE)


def _require_newest(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Raises UsageError if the experiment has later epochs: two branches would mix."""
    newest = _newest_whole(folder, Console(quiet=True))
    if not newest.path.samefile(checkpoint.path):
        done = newest.epoch
        if done > checkpoint.epoch:
            raise UsageError(
                f"{printable(checkpoint.path)}: is of epoch {checkpoint.epoch}, but this experiment has gone on to {done}; to "
                "branch off, copy the experiment folder without its later checkpoints and resume the copy"
            )
    return checkpoint


def _refuse_begun(folder: Path, overwrite: bool) -> None:
    if overwrite or not is_first_process() or not run_folder.is_begun(folder):
        return
    raise UsageError(
        f"{printable(folder)}: this experiment exists; go on with `earteach resume {shell_word(folder)}`, "
        "choose another --experiment-name, or pass --overwrite"
    )


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Make the experiment folder, be the only run in it, and take away what a killed one left half-written."""
    if not is_first_process():
        yield
        return
    _make(folder)
    with only_writer(folder):
        for below in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            remove_stale_temporaries(below)
        yield


def _open_folder(folder: Path, config: TrainConfig) -> None:
    _make(folder / run_folder.CHECKPOINTS)
    with whole_file(folder / run_folder.CONFIG) as temporary:
        temporary.write_text(config.as_toml(), encoding="utf-8")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EarTeachError(
            f"{printable(folder)}: cannot be made ({error.strerror}); choose another --output-dir"
        ) from error


def _remove_run(folder: Path) -> None:
    """Remove what a run writes, and nothing else that may lie in the folder."""
    for path in [folder / run_folder.CHECKPOINTS, *run_folder.versions(folder)]:
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    for name in (run_folder.CONFIG, run_folder.METRICS, run_folder.BAD, run_folder.REPORT, "mlflow.db"):
        (folder / name).unlink(missing_ok=True)


def _located(config: TrainConfig, folder: Path) -> TrainConfig:
    """The configuration as it was; of an experiment that has been moved, where it lies now."""
    folder = folder.resolve()
    if config.experiment_dir.resolve() == folder:
        return config
    here = Path.cwd()
    parent = folder.parent.relative_to(here) if folder.parent.is_relative_to(here) else folder.parent
    return replace(config, output_dir=str(parent), experiment_name=folder.name)


def _restored(checkpoint: Checkpoint) -> str:
    content, parts = checkpoint.content, ["weights", "optimiser", "schedule"]
    if "pseudo_classes" in content:
        state = content["pseudo_classes"]
        parts.append(f"{state['count']} pseudo-classes (round {state['round']})")
    under_way = f" and {checkpoint.steps_done} steps" if checkpoint.steps_done else ""
    return (
        f"{printable(checkpoint.path.name)}: epoch {checkpoint.epoch} of {checkpoint.config.max_epochs}{under_way}, "
        f"step {content['global_step']}, {', '.join(parts)}"
    )


def _describe_data(config: TrainConfig, data: EarDataModule) -> str:
    manifests = data.train_set.manifest, data.val_set.manifest
    return describe_data(config, *manifests, _classes(config, data))


def _classes(config: TrainConfig, data: EarDataModule) -> int:
    return (
        class_count(config.pseudo_classes, data.train_set.manifest, config.num_pseudo_classes)
        if config.learns_classes
        else 0
    )


def _one_step(module: EarTeacherLightningModule, batch: dict, prototypes: torch.Tensor) -> float:
    """Forward and back, with made-up classes: their names do not change the cost."""
    config = module.config
    pixels = torch.cat([batch[name] for name in ("pixels", "view") if name in batch]).to(module.device)
    embedding = module(pixels)
    remade = module.model.decoder(embedding[: len(batch["pixels"])])
    loss = config.reconstruction_weight * F.mse_loss(remade, to_unit(pixels[: len(remade)]))
    if config.learns_classes:
        labels = torch.arange(len(pixels), device=module.device) % len(prototypes)
        features = module.model.predict(embedding)
        loss = loss + config.metric_weight * metric_loss(
            config.metric_loss, features, prototypes, labels, config.margin, config.scale
        )
    if config.compares_views:
        projection = module.model.projection(embedding)
        loss = loss + config.contrastive_weight * contrastive_loss(projection, config.temperature)
        if config.consistency_weight:
            loss = loss + config.consistency_weight * consistency_loss(module.model.prediction(projection), projection)
    loss.backward()
    return float(loss.detach())


def describe_estimate(estimate: Estimate) -> str:
    return (
        f"one step forward and back: loss {estimate.loss:.4g}, {estimate.step_seconds:.2f} s; {counted(estimate.steps_per_epoch, 'step')} "
        f"an epoch; the run: about {clock(estimate.seconds)} of computing (full precision; loading, checkpoints and images not counted) and "
        f"{estimate.bytes / 2**20:.0f} MiB of disk"
    )


def _uses_cuda(config: TrainConfig) -> bool:
    return config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's tips, banners and hints on this stack's choices are not for the user of this tool."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\.")
            # DistributedDataParallel on depthwise convolutions: a remark on speed, not a fault
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

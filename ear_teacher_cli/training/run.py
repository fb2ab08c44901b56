"""`train` and `resume`: from two manifests to an experiment folder.

config -> data -> model (with the receipt of its weights) -> fit -> {output_dir}/{experiment_name}/
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerStatus

from .. import run_folder
from ..config import RESUMABLE, TrainConfig, with_changes
from ..config_files import read_config
from ..console import Console
from ..data.datamodule import EarDataModule
from ..distributed import is_first_process
from ..errors import EarTeachError, ManifestError, UsageError, WeightsError
from ..files import printable, shell_word, short_message
from ..model.checkpoint import Checkpoint, read_checkpoint, require_fit
from ..system_errors import explain_system_error
from . import callbacks, guards, loggers
from .checkpoints import WholeFileCheckpointIO, checkpoint_callbacks, newest_intact, require_newest
from .describe import reconstruction_in_words, why_best
from .device import arithmetic_of
from .epoch_metrics import ValidationRows
from .interruption import SaveOnStop
from .launch import SILENT, machine_of, new_module, prepare, quiet_lightning, strategy_of
from .module import EarTeacherLightningModule
from .profiling import Profile
from .progress import Reporter
from .resources import Resources


@dataclass(frozen=True)
class Outcome:
    """What a run left behind; from `logger` on None where nothing was trained."""

    experiment: Path
    epochs: int
    best: Path | None
    interrupted: int = 0  # the exit code of the signal that stopped it
    saved: bool = False  # in the middle of an epoch, when interrupted
    why: str = ""  # the best is the best
    reconstruction: tuple[str, ...] = ()  # sentences on the PSNR of the best
    seconds: float = 0.0  # of this call
    report: Path | None = None
    config: TrainConfig | None = None
    logger: loggers.Events | None = None
    module: EarTeacherLightningModule | None = None
    data: EarDataModule | None = None
    best_embeddings: ValidationRows | None = None  # of the checkpoint `best`; None if it is of an earlier call


def train(config: TrainConfig, console: Console, overwrite: bool = False) -> Outcome:
    """Start an experiment. Raises UsageError if it exists and `overwrite` is not given."""
    folder = config.experiment_dir
    _refuse_existing(folder, overwrite)
    config, data = prepare(config, console, new=True)
    module = new_module(config, console)
    with _only_run_in(folder):
        _refuse_existing(folder, overwrite)  # made by another process, in the meantime
        if is_first_process():
            run_folder.remove_run(folder)
            run_folder.write_config(folder, config)
        return _fit(config, data, module, console)


def resume(run: str | Path, console: Console, **changes: Any) -> Outcome:
    """Continue an experiment folder or a checkpoint. Nothing is done for a finished run.

    Of a folder the newest intact checkpoint is used; a damaged one is reported. `changes`: of RESUMABLE, what is to be
    different (None: unchanged).
    """
    if unknown := set(changes) - set(RESUMABLE):
        raise TypeError(f"resume() has no {', '.join(sorted(unknown))}; it takes {', '.join(RESUMABLE)}")
    run = Path(run)
    folder = run if run.is_dir() else _experiment_of(run_folder.checkpoint_of(run, best=False))
    with _only_run_in(folder) if (folder / run_folder.CONFIG).is_file() else nullcontext():
        if run_folder.last_checkpoint(folder) is None:
            return _start_again(run, changes, console)
        if run.is_dir():
            checkpoint = newest_intact(folder, console)
            _experiment_of(checkpoint.path)
        else:
            checkpoint = require_newest(read_checkpoint(run), folder)
        return _resume_from(checkpoint, folder, changes, console)


def _resume_from(checkpoint: Checkpoint, folder: Path, changes: dict[str, Any], console: Console) -> Outcome:
    max_epochs = changes.get("max_epochs")
    config = with_changes(_located(checkpoint.config, folder), **changes)
    if max_epochs is not None and max_epochs < checkpoint.epoch:
        raise UsageError(f"--max-epochs {max_epochs}: {checkpoint.epoch} epochs are done already; give more")
    if checkpoint.steps_done and config.processes != checkpoint.config.processes:
        console.info(
            f"{printable(checkpoint.path)} was saved within an epoch by {checkpoint.config.processes} process(es); the "
            f"rest of the epoch is divided among {config.processes}, with other batches than it would have had"
        )
    if finished := _why_finished(checkpoint, config, max_epochs):
        console.info(f"{printable(folder)}: finished, {finished}")
        return _already_done(folder, checkpoint)
    try:
        config, data = prepare(config, console)
    except ManifestError as error:
        raise ManifestError(f"{error} (the run's paths start from the folder where it was trained)") from error
    module = EarTeacherLightningModule(config)
    require_fit(checkpoint, module.model.state_dict())
    run_folder.read_metrics(folder / run_folder.METRICS)  # a damaged file is an error now, not after an epoch
    console.summary([("restored", _restored(checkpoint))])
    if max_epochs not in (None, checkpoint.config.max_epochs):
        console.info(f"the learning rate now follows the cosine of {max_epochs} epochs")
    if is_first_process():
        run_folder.write_config(folder, config)
    return _fit(config, data, module, console, checkpoint)


def _why_finished(checkpoint: Checkpoint, config: TrainConfig, max_epochs: int | None) -> str:
    """Return why there is nothing to resume, and what to do; '' if there is."""
    if checkpoint.epoch >= config.max_epochs:
        return f"all {checkpoint.epoch} epochs are done; give a larger --max-epochs to continue"
    waited = [v["wait_count"] for k, v in checkpoint.content["callbacks"].items() if k.startswith("EarlyStopping")]
    if waited and waited[0] >= config.early_stop and max_epochs is None:
        return f"{config.monitor} had not improved for {config.early_stop} epochs; give --max-epochs to continue"
    return ""


def _already_done(folder: Path, checkpoint: Checkpoint) -> Outcome:
    best = run_folder.best_checkpoint(folder)
    report = folder / run_folder.REPORT
    return Outcome(
        folder,
        checkpoint.epoch,
        best,
        why=why_best(folder, best, checkpoint.config.monitor),
        reconstruction=reconstruction_in_words(folder, best, checkpoint.config),
        report=report if report.is_file() else None,
        config=checkpoint.config,
    )


def _start_again(folder: Path, changes: dict[str, Any], console: Console) -> Outcome:
    """Start a run over that was stopped before its first checkpoint: everything is seeded, so nothing is lost."""
    if not (folder / run_folder.CONFIG).is_file():
        raise EarTeachError(
            f"{printable(folder)}: holds neither a checkpoint nor {run_folder.CONFIG}; give a folder that earteach "
            "train made"
        )
    config = read_config(folder / run_folder.CONFIG)
    if config.experiment_name != folder.resolve().name:
        raise EarTeachError(
            f"{printable(folder)}: its {run_folder.CONFIG} is of {config.experiment_name!r}; start it with "
            "`earteach train --config`"
        )
    config = with_changes(_located(config, folder), **changes)
    console.info(f"{printable(folder)}: no epoch was finished; starting from its configuration")
    config, data = prepare(config, console)
    module = new_module(config, console)
    if is_first_process():
        run_folder.remove_run(folder)
        run_folder.write_config(folder, config)
    return _fit(config, data, module, console)


def _fit(
    config: TrainConfig,
    data: EarDataModule,
    module: EarTeacherLightningModule,
    console: Console,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Train, from a checkpoint if one is given; TensorBoard then hides the events of later steps."""
    folder, began = config.experiment_dir, time.monotonic()
    found = run_folder.versions(folder)
    version = found[-1].name if found and checkpoint else None
    logger = loggers.events(config, version, checkpoint.content["global_step"] if checkpoint else None)
    module.console = data.console = console
    save_on_stop = SaveOnStop(folder / run_folder.CHECKPOINTS / run_folder.LAST)
    keep_best = callbacks.KeepBestEmbeddings(config.monitor)
    assert data.train_set is not None
    steps = max(1, len(data.train_set) // (config.batch_size * config.processes * config.accumulate_grad_batches))
    with quiet_lightning(), arithmetic_of(config):
        trainer = pl.Trainer(
            **machine_of(config),
            strategy=strategy_of(config),
            max_epochs=config.max_epochs,
            accumulate_grad_batches=config.accumulate_grad_batches,
            deterministic=config.deterministic,
            logger=[logger, *loggers.extra_loggers(config, Path(logger.log_dir))],
            log_every_n_steps=min(10, steps),
            callbacks=[*_callbacks(config, console), keep_best, save_on_stop],
            plugins=[WholeFileCheckpointIO()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **SILENT,
        )
        stopped = _run(trainer, module, data, checkpoint.path if checkpoint else None, save_on_stop)
    best = run_folder.best_checkpoint(folder)
    embeddings = keep_best.best
    if embeddings is not None and (best is None or run_folder.epoch_of(best) != embeddings.epoch):
        embeddings = None
    return Outcome(
        folder,
        trainer.current_epoch,
        best,
        interrupted=save_on_stop.exit_code if stopped else 0,
        saved=save_on_stop.saved,
        why=why_best(folder, best, config.monitor),
        reconstruction=reconstruction_in_words(folder, best, config),
        seconds=time.monotonic() - began,
        config=config,
        logger=logger,
        module=module,
        data=data,
        best_embeddings=embeddings,
    )


def _callbacks(config: TrainConfig, console: Console) -> list[pl.Callback]:
    """Return what writes files and prints; what belongs to the training itself the module configures."""
    folder = config.experiment_dir
    return [
        Resources(),
        *([callbacks.Collages(config.num_collage_samples, config.seed)] if config.images and config.decodes else []),
        callbacks.MetricsFile(folder / run_folder.METRICS),
        callbacks.ClassSizes(),
        guards.UnreadableImageList(folder / run_folder.BAD, console),
        Reporter(config, console),
        *([Profile(folder, console)] if config.profile else []),
        *checkpoint_callbacks(folder / run_folder.CHECKPOINTS, config.monitor, config.checkpoint_every_n_epochs),
    ]


def _run(
    trainer: pl.Trainer,
    module: EarTeacherLightningModule,
    data: EarDataModule,
    checkpoint: Path | None,
    save_on_stop: SaveOnStop,
) -> bool:
    """Fit, and return whether a signal stopped it. Raises WeightsError if the checkpoint cannot be restored."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and save_on_stop.is_stop(trainer, error):
            return True
        if checkpoint is None or save_on_stop.begun or explain_system_error(error):
            raise
        raise WeightsError(
            f"{printable(checkpoint)}: cannot resume from it ({short_message(error)}); use another checkpoint"
        ) from error
    except SystemExit:  # how Lightning ends a run after Ctrl-C
        if trainer.state.status is not TrainerStatus.INTERRUPTED:
            raise
    return trainer.state.status is TrainerStatus.INTERRUPTED


def _experiment_of(path: Path) -> Path:
    """Return the experiment folder of a checkpoint. Raises UsageError if it is elsewhere: resume writes there."""
    folder = path.resolve().parent.parent
    if path.resolve().parent.name != run_folder.CHECKPOINTS or not (folder / run_folder.CONFIG).is_file():
        raise UsageError(
            f"{printable(path)}: does not lie in the {run_folder.CHECKPOINTS}/ of an experiment, where resume would "
            "write; give the experiment folder"
        )
    return folder


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if overwrite or not is_first_process() or not run_folder.is_begun(folder):
        return
    raise UsageError(
        f"{printable(folder)}: this experiment exists; continue it with `earteach resume {shell_word(folder)}`, "
        "choose another --experiment-name, or pass --overwrite"
    )


@contextmanager
def _only_run_in(folder: Path) -> Iterator[None]:
    """Hold the experiment folder's lock on the first process."""
    with run_folder.only_run(folder) if is_first_process() else nullcontext():
        yield


def _located(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the configuration with the experiment's present place, where it has been moved."""
    folder = folder.resolve()
    if config.experiment_dir.resolve() == folder:
        return config
    here = Path.cwd()
    parent = folder.parent.relative_to(here) if folder.parent.is_relative_to(here) else folder.parent
    return replace(config, output_dir=str(parent), experiment_name=folder.name)


def _restored(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint restores, in words."""
    content, parts = checkpoint.content, ["weights", "optimiser", "schedule"]
    if "pseudo_classes" in content:
        state = content["pseudo_classes"]
        parts.append(f"{state['count']} pseudo-classes (round {state['round']})")
    under_way = f" and {checkpoint.steps_done} steps" if checkpoint.steps_done else ""
    return (
        f"{printable(checkpoint.path.name)}: epoch {checkpoint.epoch} of {checkpoint.config.max_epochs}{under_way}, "
        f"step {content['global_step']}, {', '.join(parts)}"
    )

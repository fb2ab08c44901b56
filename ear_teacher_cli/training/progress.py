"""Report a run while it trains: one row per epoch, with a verdict on the embeddings, and progress in between."""

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from .. import metrics_catalogue
from ..config import TrainConfig
from ..console import Cell, Console, Steps, clock
from .objectives import Objective


class Reporter(Callback):
    """Print a row of metrics before training and after each epoch, and progress in between.

    Rates count from an epoch's first batch: making pseudo-classes before it has its own progress. The baseline has a row
    of its own if this process measured it.
    """

    def __init__(self, config: TrainConfig, console: Console):
        self.config, self.console = config, console
        self.stack = ExitStack()
        self.steps: Steps | None = None
        self.epochs, self.seconds, self.epoch = 0, 0.0, -1  # epochs of this process and their time; the one under way
        self.images, self.epoch_start, self.train_seconds = 0, 0.0, 0.0  # of the epoch under way
        self.baseline_due = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_due = not pl_module.baseline  # a resumed run has it from its checkpoint

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print_baseline(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._print_baseline(trainer, pl_module)  # of a run that is resumed within an epoch
        if self.steps is None:
            total = trainer.num_training_batches * trainer.max_epochs
            done = trainer.num_training_batches * trainer.current_epoch + batch_idx
            self.steps = self.stack.enter_context(self.console.progress("training", total, "steps", done))
        if self.epoch != trainer.current_epoch:
            self.epoch = trainer.current_epoch
            self.epoch_start, self.images = time.monotonic(), 0
            self.steps.describe(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.steps is not None
        self.images += len(batch["index"]) * trainer.world_size
        self.train_seconds = time.monotonic() - self.epoch_start
        self.steps.advance()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self.epochs, self.seconds = self.epochs + 1, self.seconds + time.monotonic() - self.epoch_start
        left = clock(self.seconds / self.epochs * (trainer.max_epochs - epoch)) if epoch < trainer.max_epochs else ""
        rate = f"{self.images / self.train_seconds:.1f}"
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        state, why = pl_module.verdict
        verdict = f"embeddings {state}{': ' + why if why else ''}" if state else ""
        of = f"{epoch}/{trainer.max_epochs}"
        measured = {f"val/{name}" for name in pl_module.baseline}
        self.console.row(
            cells(self.config, of, metrics, measured, state, rate, left),
            f"epoch {of}: {sentence(metrics, verdict, rate, left)}",
        )
        if why and (self.console.quiet or self.console.in_terminal):  # a log has it in its line
            self.console.warn(f"embeddings {state}: {why}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stack.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stack.close()

    def _print_baseline(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.baseline_due or not pl_module.baseline:
            return
        self.baseline_due = False
        when = "resuming" if trainer.global_step else "training"
        metrics = {f"val/{name}": value for name, value in pl_module.baseline.items()}
        self.console.row(
            cells(self.config, "start", metrics),
            f"before {when}: {', '.join([*phrases(metrics), *references(metrics)])}",
        )


def cells(
    config: TrainConfig,
    epoch: str,
    metrics: Mapping[str, float],
    measured: Collection[str] = (),
    state: str = "",
    rate: str = "",
    left: str = "",
) -> list[Cell]:
    """Return a row of the terminal's table: the metrics of the catalogue that have a rank.

    Every row has the columns of what `config` makes each epoch log; others are there if they are in `metrics` or in
    `measured`, the keys of what was measured before training.
    """
    shown = logged_each_epoch(config).union(metrics, measured)
    found = [Cell("epoch", epoch, 2 * len(str(config.max_epochs)) + 1, -2)]
    for metric in metrics_catalogue.METRICS:
        if metric.rank is not None and metric.key in shown:
            text = metric.column_text(metrics[metric.key]) if metric.key in metrics else ""
            found.append(Cell(metric.column_head, text, metric.width, metric.rank))
    colour = {"in order": "green", "": ""}.get(state, "bold red")
    return [
        *found,
        Cell("embeddings", state, rank=-1, style=colour),
        Cell("images/s", rate, rank=1),
        Cell("left", left, 11, rank=1),
    ]


def logged_each_epoch(config: TrainConfig) -> set[str]:
    """Return the keys of what every epoch logs: losses of the configuration, PSNR, memory and waiting."""
    names = ["loss", *(term.loss_name for term in Objective(config).terms)]
    found = {f"{split}/{name}" for split in ("train", "val") for name in names}
    return found | {"machine/data_wait", "machine/peak_memory"} | ({"val/psnr"} if config.decodes else set())


def sentence(metrics: Mapping[str, float], verdict: str, rate: str, left: str) -> str:
    """Return what a log has in place of a row: `train 3.21 (recon 0.12, metric 31), val ..., retrieval 41.9 %, ...`."""
    classes = phrases(metrics, "classes/")
    parts = [
        *losses(metrics),
        *phrases(metrics),
        verdict,
        f"classes {', '.join(classes)}" if classes else "",
        f"{rate} images/s",
        *phrases(metrics, "machine/"),
        f"{left} left" if left else "",
    ]
    return ", ".join(part for part in parts if part)


def losses(metrics: Mapping[str, float]) -> list[str]:
    """Return `train 3.21 (recon 0.120, metric 30.9)` and the same for val, of those that are there."""
    catalogue = metrics_catalogue.METRICS
    parts = []
    for total in (metric for metric in catalogue if metric.key in ("train/loss", "val/loss") and metric.key in metrics):
        terms = [
            f"{term.head} {term.number(metrics[term.key])}"
            for term in catalogue
            if term.term_of == total.key and term.key in metrics
        ]
        parts.append(f"{total.head} {total.number(metrics[total.key])} ({', '.join(terms)})")
    return parts


def phrases(metrics: Mapping[str, float], prefix: str = "val/") -> list[str]:
    """Return `rank-1 41.9 %`, `EER 44.4 %`, ...: the metrics of a log's sentence but the losses, under `prefix`."""
    return [
        metric.phrase(metrics[metric.key])
        for metric in metrics_catalogue.METRICS
        if metric.key.startswith(prefix) and metric.key in metrics and metric.in_sentence
    ]


def references(metrics: Mapping[str, float]) -> list[str]:
    """Return `PSNR of the mean training image 13.8 dB`, ...: the constants that other metrics are compared with."""
    return [
        metric.phrase(metrics[metric.key])
        for metric in metrics_catalogue.METRICS
        if metric.reference and metric.key in metrics
    ]

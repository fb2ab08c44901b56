"""What is said of a run: before it, what it is about to do; one row per epoch, with a verdict on the embeddings; after
it, which epoch was best."""

import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from .. import run_folder
from ..config import MONITORS, TrainConfig
from ..console import Cell, Console, Steps, clock, counted
from ..data.manifest import Manifest
from ..files import printable
from .kmeans import IMAGES_PER_CLASS
from .objectives import TERMS, Objective

# figure: (its head in a table, its words in a line, the rank at which it goes where a terminal is narrow)
_QUALITY = {
    "retrieval": ("retrieval %", "retrieval {:.1f} %", 0),
    "rank1": ("rank-1 %", "rank-1 {:.1f} %", 3),
    "eer": ("EER %", "EER {:.1f} %", 4),
    "spread": ("spread", "spread {:.2f}", 5),
    "effective_rank": ("eff. rank", "effective rank {:.0f}", 5),
}
UNITS = {"val/retrieval": " %", "val/rank1": " %", "val/eer": " %", "val/psnr": " dB"}  # losses have none
_CLASSES = {"in_use": "in use {:.2f}", "entropy": "entropy {:.2f}", "nmi": "NMI {:.2f}"}


class Reporter(Callback):
    """One row per epoch, and progress in between. Rates count from an epoch's first batch: making pseudo-classes
    before it has its own progress.

    The baseline has a row of its own, where this process measured it.
    """

    def __init__(self, config: TrainConfig, console: Console):
        self.config, self.console = config, console
        self.stack = ExitStack()
        self.steps: Steps | None = None
        self.epochs, self.seconds, self.epoch = 0, 0.0, -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_due = not pl_module.baseline  # a resumed run has it from its checkpoint

    def _baseline_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.baseline_due or not pl_module.baseline:
            return
        self.baseline_due = False
        when = "resuming" if trainer.global_step else "training"
        figures = {f"val/{name}": value for name, value in pl_module.baseline.items()}
        self.console.row(
            self._cells("start", figures, figures), f"before {when}: {', '.join(_words(figures, _QUALITY, 'val/'))}"
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._baseline_row(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._baseline_row(trainer, pl_module)  # of a run that is resumed within an epoch
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
        self.images += len(batch["index"]) * trainer.world_size
        self.train_seconds = time.monotonic() - self.epoch_start
        self.steps.advance()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self.epochs, self.seconds = self.epochs + 1, self.seconds + time.monotonic() - self.epoch_start
        left = clock(self.seconds / self.epochs * (trainer.max_epochs - epoch)) if epoch < trainer.max_epochs else ""
        rate = f"{self.images / self.train_seconds:.1f}"
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        state, why = pl_module.verdict
        words = [
            *_losses_in_words(figures),
            *(["PSNR {:.1f} dB".format(figures["val/psnr"])] if "val/psnr" in figures else []),
            *_words(figures, _QUALITY, "val/"),
            *([f"embeddings {state}{': ' + why if why else ''}"] if state else []),
            *([f"classes {', '.join(classes)}"] if (classes := _words(figures, _CLASSES, "classes/")) else []),
            f"{rate} images/s",
            *([f"{left} left"] if left else []),
        ]
        of = f"{epoch}/{trainer.max_epochs}"
        known = figures | {f"val/{name}": value for name, value in pl_module.baseline.items()}
        self.console.row(
            self._cells(of, figures, known, state, rate, left),
            f"epoch {of}: {', '.join(words)}",
        )
        if why and (self.console.quiet or self.console.in_terminal):  # a log has it in its line
            self.console.warn(f"embeddings {state}: {why}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stack.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stack.close()

    def _cells(
        self,
        epoch: str,
        figures: dict[str, float],
        known: dict[str, float],
        state: str = "",
        rate: str = "",
        left: str = "",
    ) -> list[Cell]:
        """A row of a table; figures that are `known` at some time of the run have their column in every row."""

        def number(key: str, form: str) -> str:
            return form.format(figures[key]) if key in figures else ""

        config, cells = self.config, [Cell("epoch", epoch, 2 * len(str(self.config.max_epochs)) + 1, -2)]
        terms = Objective(config).terms
        for split, rank in (("train", 6), ("val", 7)):
            cells.append(Cell(split, _short(figures.get(f"{split}/loss")), 6))
            cells += [Cell(term.name, _short(figures.get(f"{split}/{term.loss_name}")), 6, rank) for term in terms]
        cells.append(Cell("PSNR dB", number("val/psnr", "{:.1f}"), rank=2))
        for name, (head, words, rank) in _QUALITY.items():
            if f"val/{name}" in known:
                form = words[words.index("{") : words.index("}") + 1]
                cells.append(Cell(head, number(f"val/{name}", form), rank=rank))
        colour = {"in order": "green", "": ""}.get(state, "bold red")
        return [
            *cells,
            Cell("embeddings", state, rank=-1, style=colour),
            Cell("images/s", rate, rank=1),
            Cell("left", left, 11, rank=1),
        ]


def _short(value: float | None) -> str:
    """As many digits as six characters hold: `11.44`, `0.0947`, `1e-05`."""
    if value is None:
        return ""
    return next(text for digits in (4, 3, 2, 1) if len(text := f"{value:.{digits}g}") <= 6 or digits == 1)


def _words(figures: dict[str, float], named: dict[str, Any], prefix: str) -> list[str]:
    """`rank-1 41.9 %`, `EER 44.4 %`, ...: those that there are."""
    texts = {name: words if isinstance(words, str) else words[1] for name, words in named.items()}
    return [text.format(figures[prefix + name]) for name, text in texts.items() if prefix + name in figures]


def _losses_in_words(figures: dict[str, float]) -> list[str]:
    """`train 3.21 (recon 0.120, metric 30.9)`, `val 3.40 (recon 0.13, metric 32.7)`."""
    parts = []
    for split in ("train", "val"):
        terms = [f"{term.name} {figures[key]:.4g}" for term in TERMS if (key := f"{split}/{term.name}_loss") in figures]
        if f"{split}/loss" in figures:
            parts.append(f"{split} {figures[f'{split}/loss']:.4g} ({', '.join(terms)})")
    return parts


def describe(config: TrainConfig) -> list[tuple[str, str]]:
    """A configuration at a glance: names and what they are."""
    start = "pretrained" if config.pretrained else "random weights"
    kept = f", kept to stride {config.kept_stride}" if config.kept_stride else ""
    losses = [term.describe() for term in Objective(config).terms if term.weight]
    views = f"{counted(config.views, config.augmentation + ' view')}" if config.augment else "images as they are"
    changed = [
        f"--{'' if value is not False else 'no-'}{spec.name.replace('_', '-')}{'' if isinstance(value, bool) else f' {printable(value)}'}"
        for spec in fields(config)
        if (value := getattr(config, spec.name)) != spec.default and spec.name not in _SHOWN
    ]
    return [
        ("experiment", printable(config.experiment_dir)),
        ("teacher", f"{config.backbone} at {config.image_size} px, {start}{kept}"),
        ("learns by", ", ".join(losses)),
        (
            "schedule",
            f"{counted(config.max_epochs, 'epoch')}, batches of {config.batch_size}, {views}; learning rate "
            f"{config.learning_rate:g} (heads x {config.head_lr_mult:g}), warm-up {config.warmup:g}; "
            f"{config.precision}; best by {config.monitor}",
        ),
        *([("note", note)] if (note := of_other_weights(config)) else []),
        ("options", f"set otherwise: {' '.join(changed)}" if changed else "all others as by default"),
    ]


# What `describe` says in other words.
_SHOWN = {
    "train_metadata", "val_metadata", "output_dir", "experiment_name", "backbone", "image_size", "pretrained",
    "max_epochs", "batch_size", "learning_rate", "precision",
}  # fmt: skip


def of_other_weights(config: TrainConfig) -> str:
    """Why validation reconstructs worse than training, where it does for a known reason; else ''."""
    if not config.kept_share or not config.reconstruction_weight:
        return ""
    return (
        f"val recon and PSNR are computed with the backbone that is kept, moved back by --baseline-weight {config.baseline_weight:g}, "
        "to which the decoder is not trained: they are worse than train recon"
    )


def why_best(folder: Path, best: Path | None, monitor: str) -> str:
    """Of the checkpoint that was chosen: `val/retrieval 87.5, the highest so far (epoch 7 of 10; 61.2 before training)`;
    '' where metrics.csv does not have it."""
    scored = {
        int(row["epoch"]): float(row[monitor])
        for row in run_folder.read_metrics(folder / run_folder.METRICS)
        if row.get(monitor)
    }
    start, epoch = scored.pop(0, None), run_folder.epoch_of(best) if best else -1
    if epoch not in scored:
        return ""
    choose, word = (max, "highest") if MONITORS[monitor] == "max" else (min, "lowest")
    rank = f"the {word} so far" if scored[epoch] == choose(scored.values()) else f"the {word} of those that are kept"
    unit = UNITS.get(monitor, "")
    before = ""
    if start is not None:
        better = scored[epoch] > start if MONITORS[monitor] == "max" else scored[epoch] < start
        before = f"; {'' if better else 'no better than the '}{start:.4g}{unit} before training"
    return f"{monitor} {scored[epoch]:.4g}{unit}, {rank} (epoch {epoch} of {max(scored)}{before})"


def describe_data(config: TrainConfig, train: Manifest, val: Manifest, classes: int) -> str:
    """How much there is to learn from, and over how many classes."""
    text = f"{len(train)} training images ({printable(train.source)}), {len(val)} validation ({printable(val.source)}), from {train.root}/"
    if not config.learns_classes:
        return text
    by_folder = config.pseudo_classes == "identity" and Path(train.source).is_dir()
    text += f"; {classes} pseudo-classes ({config.pseudo_classes}{': the names of the folders' if by_folder else ''})"
    if config.pseudo_classes == "kmeans" and len(train) > 10 * IMAGES_PER_CLASS * classes:
        text += f", {len(train) / classes:.0f} images each: many for one class, --num-pseudo-classes 0 takes one per {IMAGES_PER_CLASS}"
    return text

"""What happens besides the training itself: the baseline, whitening, collages, metrics.csv, class sizes."""

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger

from .. import run_folder
from ..config import MONITORS
from ..data.dataset import EarDataset, UnreadableImage, collate
from ..drawing import collage, save_gif, save_image
from ..errors import EarTeachError
from ..files import whole_file
from ..model import whitening
from .epoch_metrics import ValidationRows
from .passes import embed_train_set, measure_initial_weights

# Images, evenly spaced, that a whitening is fitted on. On held-out people, 2,048 gave 0.2 points of rank-1 more and 512
# gave 0.9 less. Validation images, whose embeddings are there already, are not used: the report scores them.
WHITEN_ON = 1024


class MeasureBaseline(Callback):
    """Measure, before the first step, what later epochs are compared with: the embeddings of the initial weights, and the
    references of the PSNR (quality/reconstruction.py).

    A resumed run has both from its checkpoint.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.baseline or not trainer.enable_validation:
            return
        pl_module.baseline_embeddings, pl_module.baseline = measure_initial_weights(pl_module)
        metrics = {f"val/{name}": value for name, value in pl_module.baseline.items()}
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=0)


class FitWhitening(Callback):
    """Fit a whitening after each validation, to the weights that were validated (the averaged ones, if any)."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero:
            self.fit(pl_module)

    def fit(self, module: pl.LightningModule) -> None:
        """Fit `module.whitening` to the clean training images, at most WHITEN_ON of them, evenly spaced."""
        images = len(module.train_set)
        rows = range(0, images, -(-images // WHITEN_ON))
        try:
            fitted = whitening.fit(embed_train_set(module, rows)[0].numpy(), shrink=whitening.SHRINK)
        except EarTeachError as error:
            module.console.warn(f"{error}; this epoch has none")
            return
        module.whitening = {name: torch.from_numpy(value).float() for name, value in asdict(fitted).items()}


class KeepBestEmbeddings(Callback):
    """Keep the validation embeddings of the best epoch so far by `monitor`, for what is written at the end of a run.

    `best`: None before the first epoch of this process.
    """

    def __init__(self, monitor: str):
        self.monitor = monitor
        self.best: ValidationRows | None = None
        self._value = 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor not in trainer.callback_metrics or pl_module.validation_embeddings is None:
            return
        value = float(trainer.callback_metrics[self.monitor])
        sign = {"min": 1, "max": -1}[MONITORS[self.monitor]]
        if self.best is None or sign * value < sign * self._value:  # the first of several equal ones
            self.best, self._value = pl_module.validation_embeddings, value


class Collages(Callback):
    """Draw `epoch_XXXX.png` of the same seeded validation images: before training (0000), then after each epoch."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self.pixels: torch.Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.pixels = sample_pixels(trainer.datamodule.val_set, self.samples, self.seed)
            if trainer.global_step == 0:
                self._draw(trainer, pl_module, 0)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._draw(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.logger:
            folder = _collages(trainer)
            save_gif(run_folder.collages(folder.parent), folder / "progress.gif")

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        if self.pixels is None:
            return
        folder = _collages(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        reconstructions = module.reconstruct(self.pixels.to(module.device)).cpu()
        image = collage(self.pixels, reconstructions, f"epoch {epoch}" if epoch else "before training")
        save_image(image, folder / f"epoch_{epoch:04d}.png")
        for logger in _tensorboard(trainer):
            logger.experiment.add_image("reconstruction_collage", np.asarray(image), epoch, dataformats="HWC")


def _collages(trainer: pl.Trainer) -> Path:
    # the logger's own folder: asking `trainer.log_dir` is a broadcast, and this is rank 0 alone
    return Path(trainer.logger.log_dir) / run_folder.COLLAGES


def _tensorboard(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def sample_pixels(dataset: EarDataset, count: int, seed: int) -> torch.Tensor | None:
    """Return uint8 B,3,H,W of `count` readable images, drawn by seed, in manifest order; None if there is none."""
    order = np.random.default_rng([seed, 3]).permutation(len(dataset)).tolist()
    items: dict[int, dict[str, Any]] = {}
    for index in order:
        if len(items) == min(count, len(dataset)):
            break
        item = dataset[index]
        if not isinstance(item, UnreadableImage):
            items[index] = item
    return collate([items[i] for i in sorted(items)]).get("pixels")


class ClassSizes(Callback):
    """Log the number of images in each pseudo-class, as a histogram in TensorBoard."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        classes = pl_module.pseudo_labels.classes
        if classes is None or not trainer.is_global_zero or pl_module.config.pseudo_classes in ("batch", "instance"):
            return
        labels = classes.labels[classes.labels >= 0].cpu()
        sizes = torch.bincount(labels, minlength=classes.count)
        for logger in _tensorboard(trainer):
            logger.experiment.add_histogram("classes/pictures", sizes, trainer.global_step)


class MetricsFile(Callback):
    """Write `metrics.csv`: a row per epoch (0: before training).

    The file is written anew each time, so that a resumed run continues it without double rows.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 and pl_module.baseline:
            self._add(trainer, 0, {f"val/{name}": value for name, value in pl_module.baseline.items()})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(trainer, trainer.current_epoch + 1, trainer.callback_metrics)

    def _add(self, trainer: pl.Trainer, epoch: int, metrics: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        rows = [row for row in run_folder.read_metrics(self.path) if int(row["epoch"]) < epoch]
        values = {k: f"{float(v):.8g}" for k, v in sorted(metrics.items())}
        rows.append({"epoch": str(epoch), "step": str(trainer.global_step), **values})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with whole_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)

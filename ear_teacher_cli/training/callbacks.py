"""What happens beside the learning: checkpoints, collages, metrics.csv, the list of bad images."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from .. import run_folder
from ..config import MONITORS
from ..console import Console
from ..data.dataset import EarDataset, UnreadableImage, collate
from ..drawing import collage, save_gif, save_image
from ..errors import EarTeachError, ImageError
from ..files import escape_csv, printable, whole_file
from ..model.checkpoint import read_torch, write_checkpoint
from .epoch_metrics import ValidationRows


class PortableCheckpoint(ModelCheckpoint):
    """Lightning's, with its memory of files kept as names (an experiment folder may be moved and resumed), and
    with epochs counted from 1, as in the collages and in metrics.csv."""

    def format_checkpoint_name(self, metrics: dict[str, torch.Tensor], *args: Any, **options: Any) -> str:
        return super().format_checkpoint_name({**metrics, "epoch": metrics["epoch"] + 1}, *args, **options)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state |= {k: _name(state[k]) for k in ("best_model_path", "kth_best_model_path", "last_model_path")}
        return {**state, "dirpath": "", "best_k_models": {_name(k): v for k, v in state["best_k_models"].items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def full(name: str) -> str:
            return str(Path(self.dirpath) / name) if name else ""

        state = {**state, "dirpath": self.dirpath}
        state |= {k: full(state[k]) for k in ("best_model_path", "kth_best_model_path", "last_model_path")}
        state["best_k_models"] = {full(k): v for k, v in state["best_k_models"].items()}
        super().load_state_dict(state)


def checkpoint_callbacks(folder: Path, monitor: str) -> list[PortableCheckpoint]:
    """The seed's policy: the best three by `monitor` (of config.MONITORS), the last, and one every five epochs."""
    common: dict[str, Any] = dict(
        dirpath=str(folder), save_on_train_epoch_end=True, enable_version_counter=False, auto_insert_metric_name=False
    )
    return [
        PortableCheckpoint(
            filename=f"best-epoch_{{epoch:04d}}-{monitor.replace('/', '_')}_{{{monitor}:.4f}}",
            monitor=monitor,
            mode=MONITORS[monitor],
            save_top_k=3,
            **common,
        ),
        PortableCheckpoint(filename="epoch_{epoch:04d}", every_n_epochs=5, save_top_k=-1, **common),
        PortableCheckpoint(filename="last", every_n_epochs=1, save_top_k=1, **common),
    ]


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all, read with `weights_only` whatever it asks for."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_torch(Path(path))


class Averages(Callback):
    """The weights that are validated, saved, exported and embedded with, where they are not those that learn.

    `ema_decay`: a moving average of all weights and batch-norm statistics, updated each step; 0 takes them as they
    are. `baseline_weight`: of the backbone, this share of its weights before training and the rest of the average (WiSE-FT,
    Wortsman et al. 2022, eq. 1). A checkpoint's `state_dict` has the result; what training goes on with is beside it.
    """

    def __init__(self, ema_decay: float, baseline_weight: float):
        self.ema_decay, self.baseline_weight = ema_decay, baseline_weight
        self.start: dict[str, torch.Tensor] = {}  # the backbone's tensors before training
        self.average: dict[str, torch.Tensor] = {}
        self.learning: dict[str, torch.Tensor] = {}  # set aside while the result is in their place
        self.step = 0

    def forget(self, name: str) -> None:
        """Begin the average of this tensor anew, at what it is after the next step."""
        self.average.pop(name, None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 and self.baseline_weight:
            self.start = {k: v for k, v in _floats(pl_module).items() if k.startswith("model.backbone.")}
        for tensors in (self.start, self.average):  # a checkpoint's were loaded before the module moved
            tensors.update({k: v.to(pl_module.device) for k, v in tensors.items()})

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ema_decay and trainer.global_step > self.step:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))  # young, it follows closely
            for name, tensor in pl_module.state_dict().items():
                if name in self.average:
                    self.average[name].lerp_(tensor, 1 - decay)
                elif tensor.is_floating_point():
                    self.average[name] = tensor.clone()
        self.step = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.learning = _floats(pl_module)
            _put(pl_module, self._result(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.learning:
            _put(pl_module, self.learning)
            self.learning = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _put(pl_module, self._result(pl_module))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["learning_state"] = checkpoint["state_dict"]
        checkpoint["averages"] = {"start": self.start, "average": self.average}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._result(pl_module)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        pl_module.load_state_dict(checkpoint["learning_state"])
        for name in ("start", "average"):
            tensors = checkpoint["averages"][name]
            setattr(self, name, {k: v.to(pl_module.device, copy=True) for k, v in tensors.items()})
        self.step = checkpoint["global_step"]

    @torch.no_grad()
    def _result(self, module: pl.LightningModule) -> dict[str, torch.Tensor]:
        result = _floats(module) | {k: v.clone() for k, v in self.average.items()}
        for name, start in self.start.items():
            result[name].lerp_(start.to(result[name]), self.baseline_weight)
        return result


def _floats(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """Copies of all that has decimals: weights and batch-norm statistics, not counters."""
    return {k: v.detach().clone() for k, v in module.state_dict().items() if v.is_floating_point()}


@torch.no_grad()
def _put(module: pl.LightningModule, tensors: dict[str, torch.Tensor]) -> None:
    state = module.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


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
    """`epoch_XXXX.png` of the same seeded validation images: before training (0000), then after each epoch."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self.pixels: torch.Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.pixels = sample_pixels(trainer.datamodule.val_set, self.samples, self.seed)
            if trainer.global_step == 0:
                self._make(trainer, pl_module, 0)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._make(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._gif(trainer)

    def _make(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        if self.pixels is None:
            return
        folder = _collages(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        remade = module.reconstruct(self.pixels.to(module.device)).cpu()
        image = collage(self.pixels, remade, f"epoch {epoch}" if epoch else "before training")
        save_image(image, folder / f"epoch_{epoch:04d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("reconstruction_collage", np.asarray(image), epoch, dataformats="HWC")

    def _gif(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and trainer.logger:
            folder = _collages(trainer)
            save_gif(run_folder.collages(folder.parent), folder / "progress.gif")


def _collages(trainer: pl.Trainer) -> Path:
    # the logger's own folder: asking `trainer.log_dir` is a broadcast, and this is rank 0 alone
    return Path(trainer.logger.log_dir) / run_folder.COLLAGES


def sample_pixels(dataset: EarDataset, count: int, seed: int) -> torch.Tensor | None:
    """uint8 B,3,H,W of `count` readable images, drawn by seed, in manifest order; None if there is none."""
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
    """How many images the pseudo-classes have, as a histogram in TensorBoard."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        classes = pl_module.classes
        if classes is None or not trainer.is_global_zero or pl_module.config.pseudo_classes in ("batch", "instance"):
            return
        labels = classes.labels[classes.labels >= 0].cpu()
        sizes = torch.bincount(labels, minlength=classes.count)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram("classes/pictures", sizes, trainer.global_step)


class MetricsFile(Callback):
    """`metrics.csv`: a row per epoch (0: before training), rewritten whole, so that a resumed run continues it without double rows."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 and pl_module.start:
            self._add(trainer, 0, {f"val/{name}": value for name, value in pl_module.start.items()})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(trainer, trainer.current_epoch + 1, trainer.callback_metrics)

    def _add(self, trainer: pl.Trainer, epoch: int, figures: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        rows = [row for row in run_folder.read_metrics(self.path) if int(row["epoch"]) < epoch]
        values = {k: f"{float(v):.8g}" for k, v in sorted(figures.items())}
        rows.append({"epoch": str(epoch), "step": str(trainer.global_step), **values})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with whole_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


class UnreadableImageList(Callback):
    """`bad_images.csv`: every image that was skipped, with its reason."""

    def __init__(self, path: Path, console: Console):
        self.path, self.console, self.said = path, console, 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bad = pl_module.all_unreadable()
        self._write(trainer, bad)
        if len(bad) > self.said:
            self.said = len(bad)
            self.console.warn(
                f"{len(bad)} ears are left out (image unreadable or box impossible); bad_images.csv lists them"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write(trainer, pl_module.bad)  # of this process: others may be gone

    def _write(self, trainer: pl.Trainer, bad: dict[tuple[str, int], ImageError]) -> None:
        if not bad or not trainer.is_global_zero:
            return
        sets = {"train": trainer.datamodule.train_set, "val": trainer.datamodule.val_set}
        with whole_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["split", "row", "image_path", "reason", "detail"])
            for (split, index), error in sorted(bad.items(), key=lambda entry: entry[0]):
                manifest = sets[split].manifest
                writer.writerow(
                    [
                        split,
                        manifest.rows[index],
                        escape_csv(manifest.paths[index]),
                        error.reason,
                        escape_csv(error.detail),
                    ]
                )


class FitWhitening(Callback):
    """After each validation, with the weights that were validated (the moving average, if there is one)."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            pl_module.fit_whitening()


class StopOnNaN(Callback):
    """Steps without a finite loss are left out, and said; REFUSED_STEPS in a row end the run, as does an epoch
    without a finite loss, before it is saved."""

    REFUSED_STEPS = 3

    def __init__(self, console: Console):
        self.console = console
        self.told_of = -1  # the last step that was said

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.refused or pl_module.refused[-1][0] == self.told_of:
            return
        step, loss, rows = pl_module.refused[-1]
        self.told_of = step
        manifest = trainer.datamodule.train_set.manifest
        images = ", ".join(manifest.where(row) for row in rows[:8])
        images += f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        found = f"epoch {trainer.current_epoch + 1}, step {step}: the loss is {loss} for {images}"
        if len(pl_module.refused) < self.REFUSED_STEPS:
            self.console.warn(f"{found}; the step is left out")
            return
        raise EarTeachError.on_all_ranks(
            f"{found}, the {self.REFUSED_STEPS}rd such step in a row; {_last_good(trainer)}. Start again with a lower "
            "--learning-rate or --precision 32-true"
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        for name, images in (("train/loss", "training"), ("val/loss", "validation")):
            loss = trainer.callback_metrics.get(name)
            if loss is None:
                raise EarTeachError.on_all_ranks(
                    f"epoch {epoch}: too few {images} images could be read for a loss; run earteach validate-data"
                )
            if not torch.isfinite(loss):
                raise EarTeachError.on_all_ranks(
                    f"epoch {epoch}: {name} is {float(loss)}; {_last_good(trainer)}. Start again with a lower "
                    "--learning-rate or --precision 32-true"
                )


def _last_good(trainer: pl.Trainer) -> str:
    saved = [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    newest = max(
        (Path(path) for path in saved if path and Path(path).exists()),
        key=lambda path: path.stat().st_mtime,
        default=None,
    )
    return f"the last good checkpoint is {printable(newest)}" if newest else "no checkpoint was saved before"


def _name(path: str) -> str:
    return Path(path).name if path else ""

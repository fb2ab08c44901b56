"""What stops a run that goes wrong, or skips what would spoil it: data that do not match the model, losses that are not
finite, embeddings that collapse, unreadable images.

`StepGuard` and `UnreadableImages` are parts of the module. `StopOnNonFinite` and `StopOnCollapse` are callbacks that
the module configures itself, so that they work with any Trainer. `UnreadableImageList` needs the path of its file.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from ..config import TrainConfig
from ..console import Console
from ..data.dataset import Batch
from ..data.preprocessing import Preprocessing
from ..errors import EarTeachError, ImageError
from ..files import escape_csv, printable, whole_file

# Steps in a row without a finite loss that end a run.
NONFINITE_STEPS = 3


@dataclass(frozen=True)
class NonFiniteStep:
    """A training step that was skipped: its number, its loss as text, and the rows of its images."""

    step: int
    loss: str
    rows: list[int]


class StepGuard:
    """Skips training steps that must not change the weights, on all ranks together.

    Whether a loss is finite is asked for after the backward pass: a GPU that is asked at once stands still until the
    answer has arrived and the host has queued the backward pass. Batches of --accumulate-grad-batches are asked at once,
    because the gradient of one that is skipped cannot be taken out of a sum. With float16 a loss that is not finite also
    halves the scale of the gradients, as an overflow does.

    `nonfinite_steps`: those without a finite loss since the last finite one.
    """

    def __init__(self) -> None:
        self.nonfinite_steps: list[NonFiniteStep] = []
        self._changing: list[torch.Tensor] = []  # buffers that the step may change: batch-norm statistics
        self._buffers: list[torch.Tensor] = []  # copies of them from before the step
        # of the batch that is watched: whether its loss is finite, the loss, the rows of its images
        self._unchecked: tuple[_HostCopy, torch.Tensor, torch.Tensor] | None = None
        self._learns = False  # whether a batch of the optimizer step under way was not skipped

    def begin(self, module: pl.LightningModule) -> None:
        """Copy, before the forward pass of a step, the buffers that it may change: of parts in training mode."""
        changing = [buffer for part in module.modules() if part.training for buffer in part.buffers(recurse=False)]
        if [id(buffer) for buffer in changing] != [id(buffer) for buffer in self._changing]:
            self._changing, self._buffers = changing, [torch.empty_like(buffer) for buffer in changing]
        if changing:
            torch._foreach_copy_(self._buffers, changing)

    def watch(self, module: pl.LightningModule, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """Begin to ask whether the loss of a batch is finite on all ranks: `is_finite` has the answer. `rows`: of its
        images."""
        finite = torch.isfinite(loss.detach()).float()
        self._unchecked = _HostCopy(module.trainer.strategy.reduce(finite, reduce_op="min")), loss.detach(), rows

    def is_finite(self, module: pl.LightningModule) -> bool:
        """Return whether the loss of the batch that is watched is finite on all ranks. If not, note the step and restore
        the buffers: batch normalisation has seen what made the loss infinite."""
        assert self._unchecked is not None
        (finite, loss, rows), self._unchecked = self._unchecked, None
        if finite.value():
            self.nonfinite_steps = []
            self._learns = True
            return True
        self.nonfinite_steps.append(NonFiniteStep(module.global_step, f"{loss.item():g}", rows.tolist()))
        for buffer, before in zip(self._changing, self._buffers, strict=True):
            buffer.copy_(before)
        return False

    @property
    def is_watching(self) -> bool:
        """Whether a batch has not been asked about."""
        return self._unchecked is not None

    def skip(self, module: pl.LightningModule) -> torch.Tensor:
        """Return a loss whose gradient is zero, for a step that is skipped: Lightning accepts no None on several
        devices."""
        return sum((p * 0).sum() for p in module.parameters() if p.requires_grad)

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove the gradients of an optimizer step all of whose batches were skipped: then momentum and weight decay
        change nothing either."""
        if not self._learns:
            optimizer.zero_grad(set_to_none=True)
        self._learns = False


class _HostCopy:
    """A number of a GPU that is copied to the host: `value` waits for the copy, and not for what was queued after it."""

    def __init__(self, number: torch.Tensor):
        self._number, self._event = number, None
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> float:
        """Return the number."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._number)


def is_on_all_ranks(module: pl.LightningModule, mine: bool) -> bool:
    """Return whether the condition holds on every rank: all must skip the same steps, or they wait for each other forever."""
    return module.trainer.strategy.reduce_boolean_decision(mine, all=True)


def require_data(config: TrainConfig, preprocessing: Preprocessing, datamodule: Any) -> None:
    """Raise EarTeachError unless an EarDataModule gives the crops and views that the module's configuration needs."""
    dataset = getattr(datamodule, "val_set", None)
    if dataset is not None and dataset.preprocessing != preprocessing:
        raise EarTeachError(
            f"data: its crops ({dataset.preprocessing}) are not the model's ({preprocessing}); give EarDataModule "
            "and EarTeacherLightningModule the same backbone, image_size, bbox_buffer and pad"
        )
    given = getattr(datamodule, "config", config)
    if config.compares_views and (given.views, given.augment) != (2, True):
        raise EarTeachError("data: gives one view of each image; give EarDataModule views=2 and augment=True, too")
    if config.needs_clean_view and given.augment and not given.needs_clean_view:
        raise EarTeachError(
            "data: gives no image without changes of colour; give EarDataModule the same anchor_weight, pretrained and "
            "denoise"
        )


class StopOnNonFinite(Callback):
    """Warn of each step that is skipped because its loss is not finite. End the run after NONFINITE_STEPS in a row, or
    after an epoch whose loss is not finite, before it is saved."""

    def __init__(self) -> None:
        self._reported = -1  # the last step that was warned of

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = pl_module.guard.nonfinite_steps
        if not steps or steps[-1].step == self._reported:
            return
        last = steps[-1]
        self._reported = last.step
        manifest = trainer.datamodule.train_set.manifest
        images = ", ".join(manifest.where(row) for row in last.rows[:8])
        images += f" and {len(last.rows) - 8} more" if len(last.rows) > 8 else ""
        found = f"epoch {trainer.current_epoch + 1}, step {last.step}: the loss is {last.loss} for {images}"
        if len(steps) < NONFINITE_STEPS:
            pl_module.console.warn(f"{found}; the step is skipped")
            return
        raise EarTeachError.on_all_ranks(
            f"{found}, the {NONFINITE_STEPS}rd such step in a row; {_last_good(trainer)}. Start again with a lower "
            "--learning-rate or --precision 32-true"
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:  # before anything is written of the epoch
            _require_finite(trainer)


def _require_finite(trainer: pl.Trainer) -> None:
    """Raise EarTeachError, on all ranks, unless the losses of the epoch are there and finite."""
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
    """Return which checkpoint to continue from, in words."""
    saved = [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    newest = max(
        (Path(path) for path in saved if path and Path(path).exists()),
        key=lambda path: path.stat().st_mtime,
        default=None,
    )
    return f"the last good checkpoint is {printable(newest)}" if newest else "no checkpoint was saved before"


class StopOnCollapse(Callback):
    """End the run, before the epoch is saved, when the embeddings collapse or degrade (`module.verdict`)."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state, why = pl_module.verdict
        if why:
            verb = "collapse" if state == "COLLAPSED" else "degrade"
            raise EarTeachError.on_all_ranks(
                f"epoch {trainer.current_epoch + 1}: the embeddings {verb}: {why}; earlier checkpoints are "
                "kept. Lower --metric-weight or --learning-rate, or choose other --pseudo-classes"
            )


class UnreadableImages:
    """The images of a run that could not be read: (`train` or `val`, row) -> why. Each is skipped and counted."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.errors: dict[tuple[str, int], ImageError] = {}  # of this rank

    def record(self, split: str, batch: Batch, trainer: pl.Trainer, *, this_rank_only: bool = False) -> None:
        """Count the unreadable images of a batch. `this_rank_only`: the other ranks do not call this.

        Raises EarTeachError, on all ranks that call it, if more than `max_bad` of the split are unreadable.
        """
        for index, reason, detail in batch["bad"]:
            self.errors[split, index] = ImageError(reason, detail)
        count = sum(which == split for which, _ in self.errors)
        if trainer.world_size > 1 and not this_rank_only:
            mine = torch.tensor(float(count), device=trainer.strategy.root_device)
            count = int(trainer.strategy.reduce(mine, reduce_op="sum"))
        datamodule = trainer.datamodule
        dataset = datamodule.train_set if split == "train" else datamodule.val_set
        most = self.config.max_bad * len(dataset)
        if count <= most:
            return
        errors = self.errors if this_rank_only else self.on_all_ranks(trainer)
        found = {index: error for (which, index), error in sorted(errors.items()) if which == split}
        if len(found) > most:  # an image that two ranks share was counted twice
            index, error = next(iter(found.items()))
            raise (EarTeachError if this_rank_only else EarTeachError.on_all_ranks)(
                f"{dataset.manifest.where(index)}: {error}; {len(found)} of {len(dataset)} images are unreadable, more "
                f"than --max-bad {self.config.max_bad:g}: bad_images.csv lists them. Run earteach validate-data "
                "--write-clean, or raise --max-bad"
            )

    def on_all_ranks(self, trainer: pl.Trainer) -> dict[tuple[str, int], ImageError]:
        """Return `errors` of all ranks, which must all call this."""
        if trainer.world_size == 1:
            return self.errors
        everything: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everything, self.errors)
        return {place: error for found in everything for place, error in found.items()}


class UnreadableImageList(Callback):
    """Write `bad_images.csv`: every image that was skipped, with its reason."""

    def __init__(self, path: Path, console: Console):
        self.path, self.console = path, console
        self._warned_of = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        errors = pl_module.unreadable.on_all_ranks(trainer)
        self._write(trainer, errors)
        if len(errors) > self._warned_of:
            self._warned_of = len(errors)
            self.console.warn(
                f"{len(errors)} ears are skipped (image unreadable or box impossible); bad_images.csv lists them"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write(trainer, pl_module.unreadable.errors)  # of this process: others may be gone

    def _write(self, trainer: pl.Trainer, errors: dict[tuple[str, int], ImageError]) -> None:
        if not errors or not trainer.is_global_zero:
            return
        sets = {"train": trainer.datamodule.train_set, "val": trainer.datamodule.val_set}
        with whole_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["split", "row", "image_path", "reason", "detail"])
            for (split, index), error in sorted(errors.items(), key=lambda entry: entry[0]):
                manifest = sets[split].manifest
                path, detail = escape_csv(manifest.paths[index]), escape_csv(error.detail)
                writer.writerow([split, manifest.rows[index], path, error.reason, detail])

"""Ctrl-C and SIGTERM in a training run: save in the middle of the epoch, then stop.

A checkpoint can be taken after any optimizer step but the epoch's last: Lightning takes one after the last step for the
end of the epoch, and would leave the validation out. So the state after the second to last step is kept in memory until
the epoch is over, for a signal that comes later. Between the batches of one optimizer step (--accumulate-grad-batches)
there is none: the gradients so far would be lost. While pseudo-labels are made, or before the first step, there is nothing
new to save, and the run stops at once.
"""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from ..errors import Stopped
from ..platform import handle_stop_signals


class SaveOnStop(Checkpoint):
    """Write `path` after a signal to stop, and raise Stopped. A second signal stops at once, without saving.

    `begun`: whether training has begun; `saved`: whether the file was written; `exit_code`: of what stopped the run. It
    is a Checkpoint because Lightning calls those after all other callbacks.
    """

    def __init__(self, path: Path):
        self.path, self.begun, self.saved, self.exit_code = path, False, False, 0
        self._signal: int | None = None  # that came while stepping or saving
        self._busy = False  # whether a signal has to wait for the end of a step or of saving
        self._before_last: dict[str, Any] | None = None  # the checkpoint of this epoch's second to last step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun = True
        # after Lightning's own, which reacts to SIGTERM at an epoch's end only, and which restores the old handlers
        self._trainer, self._process = trainer, os.getpid()
        handle_stop_signals(self._on_signal)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._busy, self._before_last = False, None
        self._stop_if_signalled(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._busy = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps_left = trainer.num_training_batches - batch_idx - 1
        stop, batches = self._signalled_anywhere(trainer), trainer.accumulate_grad_batches
        complete = (batch_idx + 1) % batches == 0
        # of this epoch, after which a checkpoint can be taken
        last = (trainer.num_training_batches - 1) // batches * batches
        if complete and (0 < steps_left <= batches or (stop and steps_left)) and not pl_module.guard.nonfinite_steps:
            self._before_last = _copied(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
        if stop and (complete or batch_idx + 1 > last):
            self._save_and_stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._busy = False
        self._stop_if_signalled(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._busy = True  # the epoch's checkpoints come next

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.exit_code = getattr(exception, "exit_code", 130)

    def is_stop(self, trainer: pl.Trainer, error: RuntimeError) -> bool:
        """Return whether an error was caused by a signal to stop; if so, save what there is to save.

        A signal to the whole process group also kills a data loader's worker that was just started: torch lets it die
        of SIGTERM until it begins to work. The error that torch raises then takes the place of Stopped.
        """
        number = self._signal
        cause: BaseException | None = error
        while number is None and cause is not None and (cause := cause.__context__) is not None:
            number = cause.exit_code - 128 if isinstance(cause, Stopped) else None
        if number is None or "DataLoader worker" not in str(error):
            return False
        if not self.saved:
            self._save(trainer)
        self.exit_code = 128 + number
        return True

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker just forked, which does not yet leave this to its parent
            return
        again, self._signal = self._signal is not None, number
        if again:
            raise Stopped(number)
        if not self._busy:
            self._save_and_stop(self._trainer)

    def _signalled_anywhere(self, trainer: pl.Trainer) -> bool:
        """Return whether a signal reached any rank: all stop after the same step."""
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _stop_if_signalled(self, trainer: pl.Trainer) -> None:
        if self._signalled_anywhere(trainer):
            self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: pl.Trainer) -> None:
        self._save(trainer)
        raise Stopped(self._signal or signal.SIGTERM)

    def _save(self, trainer: pl.Trainer) -> None:
        if self._before_last is not None and _finite(self._before_last["state_dict"]):
            trainer.strategy.save_checkpoint(self._before_last, str(self.path))
            self.saved = True


def divide_epoch(checkpoint: dict[str, Any], processes: int, datamodule: str) -> None:
    """Count the steps of an interrupted epoch as `processes` processes would have done them.

    Each step of P processes takes P batches of the epoch's one order, so S steps of P are S P / P' of P'. Rounded
    down to whole optimizer steps: less than one is done again. Changes the loaded checkpoint, from which Lightning then restores its loops.
    `datamodule`: the key of the data module's state.
    """
    options, about = checkpoint["hyper_parameters"], checkpoint["earteach"]
    before = options["devices"] * options.get("num_nodes", 1)
    if before == processes:
        return
    accumulate = options.get("accumulate_grad_batches", 1)
    steps = about["steps_done"] * before // (processes * accumulate) * accumulate
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    for name in progress:
        progress[name] += steps - about["steps_done"]
    about["steps_done"] = steps
    checkpoint[datamodule]["steps_done"] = steps  # restored after the model
    for total in checkpoint.get("training_sums", {}).values():
        total *= before / processes  # each process has an equal part of what all have


def _finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _copied(value: Any, known: dict[Any, torch.Tensor] | None = None) -> Any:
    """Return a checkpoint with tensors of its own, on the CPU: training changes the others. Tensors with the same memory
    are copied once, and so are written once."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        where = value.device, value.untyped_storage().data_ptr(), value.storage_offset()
        place = *where, value.shape, value.stride(), value.dtype
        if place not in known:
            known[place] = value.detach().to("cpu", copy=True)
        return known[place]
    if isinstance(value, dict):
        made = copy.copy(value)  # of its own class, with its attributes: a state_dict has versions
        made.update((name, _copied(part, known)) for name, part in value.items())
        return made
    if isinstance(value, list | tuple):
        return type(value)(_copied(part, known) for part in value)
    return value

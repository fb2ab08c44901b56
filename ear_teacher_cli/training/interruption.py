"""Ctrl-C and SIGTERM in a training run: save in the middle of the epoch, then stop.

A checkpoint can be taken after any step but the epoch's last: Lightning takes one after the last step for the end of
the epoch, and would leave the validation out. So the state after the last step but one is kept in memory until the
epoch is over, for a signal that comes later. While classes are made, or before the first step, nothing new is to be
saved, and the run stops at once.
"""

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
    """Writes `path` when told to stop, and raises Stopped. A second signal stops at once, without saving.

    `begun`: whether training was; `saved`: whether the file was written; `exit_code` of what stopped the run. It is a
    Checkpoint because Lightning calls those after all other callbacks.
    """

    def __init__(self, path: Path):
        self.path, self.begun, self.saved, self.exit_code = path, False, False, 0
        self.told: int | None = None  # the signal, if one came while stepping or saving
        self.waits = False  # whether a signal has to wait for the end of what is being done
        self.before_last: dict[str, Any] | None = None  # the checkpoint of the last step but one of this epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun = True
        # after Lightning's own, which notes a SIGTERM and looks at it at the epoch's end; it puts the old ones back
        self.trainer, self.process = trainer, os.getpid()
        handle_stop_signals(self._tell)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.waits, self.before_last = False, None
        self._stop_if_told(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.waits = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps_left = trainer.num_training_batches - batch_idx - 1
        told = trainer.strategy.reduce_boolean_decision(self.told is not None, all=False)
        if (steps_left == 1 or (told and steps_left)) and not pl_module.refused:
            self.before_last = _copied(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
        if told:
            self._save(trainer)
            raise Stopped(self.told or signal.SIGTERM)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.waits = False
        self._stop_if_told(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.waits = True  # the epoch's checkpoints come next

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.exit_code = getattr(exception, "exit_code", 130)

    def is_stop(self, trainer: pl.Trainer, error: RuntimeError) -> bool:
        """Whether an error stands for a stop; if so, save what there is to save.

        A signal to the whole process group also kills a loader that was just started, which torch lets die of SIGTERM
        until it begins to work. torch's explain_system_error about it then takes the place of Stopped.
        """
        number = self.told
        stop: BaseException | None = error
        while number is None and (stop := stop.__context__) is not None:
            number = stop.exit_code - 128 if isinstance(stop, Stopped) else None
        if number is None or "DataLoader worker" not in str(error):
            return False
        if not self.saved:
            self._save(trainer)
        self.exit_code = 128 + number
        return True

    def _tell(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a loader just forked, which has not yet learned to leave this to its parent
            return
        again, self.told = self.told is not None, number
        if again or not self.waits:
            if not again:
                self._save(self.trainer)
            raise Stopped(number)

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self.told is not None, all=False):
            self._save(trainer)
            raise Stopped(self.told or signal.SIGTERM)

    def _save(self, trainer: pl.Trainer) -> None:
        if self.before_last is not None and _finite(self.before_last["state_dict"]):
            trainer.strategy.save_checkpoint(self.before_last, str(self.path))
            self.saved = True


def _finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _copied(value: Any) -> Any:
    """A checkpoint with tensors of its own, on the CPU: training goes on with the others."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part) for part in value)
    return value

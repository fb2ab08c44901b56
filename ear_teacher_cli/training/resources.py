"""What an epoch takes of the machine: memory, and time spent waiting for data."""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ..platform import peak_memory


class Resources(Callback):
    """Log `machine/data_wait` and `machine/peak_memory` of each epoch, of the first process.

    data_wait: share in percent of the time from the epoch's first batch to its last in which training waited for the
    loader. Before the first batch the processes that load images start: not counted.
    peak_memory, in GB: of a GPU what torch has allocated in the epoch; on a CPU the process's own since its start,
    without the processes that load images.
    """

    def __init__(self) -> None:
        self._begun, self._ended = 0.0, 0.0  # of the epoch's first batch, of its last
        self._before, self._waited = 0.0, 0.0  # what the loader had waited by then

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = 0.0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited = getattr(trainer.train_dataloader, "waited", 0.0)
        if not self._begun:
            self._begun, self._before = time.monotonic(), self._waited

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ended = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cuda = pl_module.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(pl_module.device) if cuda else peak_memory()
        found = {"machine/data_wait": 100 * (self._waited - self._before) / max(self._ended - self._begun, 1e-9)}
        if peak:
            found["machine/peak_memory"] = peak / 1e9
        pl_module.log_dict(found)

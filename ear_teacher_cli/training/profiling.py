"""`train --profile`: which operations the time of a training step goes to."""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import profiler

from .. import run_folder
from ..console import Console
from ..files import printable, whole_file

SKIPPED, RECORDED = 2, 5  # steps: the first ones allocate memory and choose algorithms
ROWS = 40  # of the table


class Profile(Callback):
    """Record steps 3 to 7 of this process with torch.profiler, on the first rank. Write a table of operations,
    `profile.txt`, and a trace for chrome://tracing or Perfetto, `profile-trace.json`; print the longest operations.

    With fewer steps, what was recorded until the end of training.
    """

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console = folder, console
        self._profiler: profiler.profile | None = None
        self._steps = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._steps == SKIPPED and trainer.is_global_zero:
            activities = [profiler.ProfilerActivity.CPU]
            if pl_module.device.type != "cuda":
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports as an error that there is no GPU
            else:
                activities.append(profiler.ProfilerActivity.CUDA)
            self._profiler = profiler.profile(activities=activities)
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        if self._steps == SKIPPED + RECORDED:
            self._finish(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _finish(self, module: pl.LightningModule) -> None:
        found, self._profiler = self._profiler, None
        if found is None:
            return
        found.stop()
        device = "cuda" if module.device.type == "cuda" else "cpu"
        operations = found.key_averages()
        with whole_file(self.folder / run_folder.PROFILE) as temporary:
            table = operations.table(sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=60)
            temporary.write_text(table, encoding="utf-8")
        with whole_file(self.folder / run_folder.TRACE) as temporary:
            found.export_chrome_trace(str(temporary))
        own = {
            each.key: each.self_device_time_total if device == "cuda" else each.self_cpu_time_total
            for each in operations
        }
        total = sum(own.values()) or 1
        longest = sorted(own, key=lambda key: -own[key])[:5]
        self.console.info(
            f"profile of {self._steps - SKIPPED} steps: "
            + ", ".join(f"{name} {100 * own[name] / total:.0f} %" for name in longest)
            + f"; {printable(self.folder / run_folder.PROFILE)} and {run_folder.TRACE} have all operations"
        )

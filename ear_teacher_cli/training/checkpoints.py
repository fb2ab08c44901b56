"""Which checkpoints a run keeps, how their files are written, and which one a run is resumed from."""

import errno
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from .. import run_folder
from ..config import MONITORS
from ..console import Console
from ..errors import UsageError, WeightsError
from ..files import link_file, printable
from ..model.checkpoint import Checkpoint, read_checkpoint, read_torch, write_checkpoint


class PortableCheckpoint(ModelCheckpoint):
    """Lightning's, with the names of files in its state instead of their paths (an experiment folder may be moved and
    resumed), and with epochs counted from 1, as in collages and metrics.csv."""

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


class PeriodicCheckpoint(PortableCheckpoint):
    """A separate class, so that its state key differs from that of `last` even with a period of 1."""


def checkpoint_callbacks(folder: Path, monitor: str, every: int) -> list[PortableCheckpoint]:
    """Return the original package's policy: the best three by `monitor` (of config.MONITORS), one every `every` epochs
    (0: none), and the last."""
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
        *(
            [PeriodicCheckpoint(filename="epoch_{epoch:04d}", every_n_epochs=every, save_top_k=-1, **common)]
            if every
            else []
        ),
        PortableCheckpoint(filename="last", every_n_epochs=1, save_top_k=1, **common),
    ]


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, complete or not there at all, and always read with `weights_only`.

    Checkpoints saved at the same step are hard links to one file, where the file system has them. Separate files would
    differ only in the state of the checkpoint callbacks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: tuple[Any, Path] | None = None  # the moment of the newest file, and its path

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        moment = (checkpoint["global_step"], checkpoint["epoch"], checkpoint["earteach"].get("steps_done"))
        if self._written is not None and self._written[0] == moment and link_file(self._written[1], Path(path)):
            return
        write_checkpoint(checkpoint, path)
        self._written = moment, Path(path)

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_torch(Path(path))


def newest_intact(folder: Path, console: Console) -> Checkpoint:
    """Read the newest checkpoint of an experiment that is not damaged; those that are get a warning.

    Raises the newest one's WeightsError if none is intact.
    """
    for path, following in pairwise([*run_folder.checkpoints(folder), None]):
        assert path is not None
        try:
            return read_checkpoint(path)
        except WeightsError as error:
            transient = isinstance(error.__cause__, OSError) and error.__cause__.errno in _TRANSIENT
            if transient or following is None:
                raise
            console.warn(f"{error}. Trying {printable(following.name)}")
    raise AssertionError("a folder with a checkpoint has one")


# Errors of reading that say nothing of the file: it may be intact, and must not be passed over.
_TRANSIENT = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE)


def require_newest(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return the checkpoint. Raises UsageError if the experiment has later epochs: two branches would mix."""
    newest, where = newest_intact(folder, Console(quiet=True)), printable(checkpoint.path)
    if newest.epoch > checkpoint.epoch and not newest.path.samefile(checkpoint.path):
        raise UsageError(
            f"{where}: is of epoch {checkpoint.epoch}, but this experiment has reached {newest.epoch}; "
            "to branch off, copy the experiment folder without its later checkpoints and resume the copy"
        )
    return checkpoint


def _name(path: str) -> str:
    return Path(path).name if path else ""

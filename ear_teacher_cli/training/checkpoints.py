"""Which checkpoints a run keeps, how their files are written, and which one a run is resumed from."""

import copy
import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from .. import run_folder
from ..config import MONITORS
from ..console import Console
from ..errors import EarTeachError, UsageError, WeightsError
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


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, complete or not there at all, always read with `weights_only`, and written by a thread
    of their own while training goes on.

    Checkpoints saved at the same step are hard links to one file, where the file system has them. Separate files would
    differ only in the state of the checkpoint callbacks. Files are written and removed in the order of the calls. After
    one that cannot be written nothing more is written or removed: the older checkpoints stay. `raise_error` and `finish`
    raise the error, as saving at the next step does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []  # done in this order
        self._copy: tuple[Any, dict[str, Any]] | None = None  # the moment of the newest checkpoint, and its content
        self._written: tuple[Any, Path] | None = None  # the moment of the newest file, and its path
        self._failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        """Copy the checkpoint to the host's memory, when the one before is written, and begin to write it."""
        moment = (checkpoint["global_step"], checkpoint["epoch"], checkpoint["earteach"].get("steps_done"))
        if self._copy is None or self._copy[0] != moment:
            self.finish()
            self._copy = None  # before the next one is made: there is memory for one
            self._copy = moment, copied(checkpoint)
        self._begin(self._write, *self._copy, Path(path))

    def remove_checkpoint(self, path: str) -> None:
        """Remove a checkpoint, when those before it are written."""
        self._begin(self._remove, path)

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        self.finish()
        return read_torch(Path(path))

    def raise_error(self) -> None:
        """Raise the EarTeachError of a file that could not be written or removed, once. Do not wait for what is under
        way; forget the copy of what is written."""
        while self._jobs and self._jobs[0].done():
            self._jobs.pop(0).result()
        if not self._jobs:
            self._copy = None

    def wait(self) -> None:
        """Wait until all files are written."""
        wait(self._jobs)

    def finish(self) -> None:
        """Wait until all files are written. Raises EarTeachError if one could not be."""
        self.wait()
        self.raise_error()

    def teardown(self) -> None:
        """Wait until all files are written, and end the thread. Errors are left to `finish`."""
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = self._copy = None

    def _begin(self, job: Callable[..., None], *arguments: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._jobs.append(self._thread.submit(self._do, job, *arguments))

    def _do(self, job: Callable[..., None], *arguments: Any) -> None:
        """Do a job in the thread, unless one before has failed."""
        if self._failed:
            return
        try:
            job(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _write(self, moment: Any, checkpoint: dict[str, Any], path: Path) -> None:
        if self._written is not None and self._written[0] == moment and link_file(self._written[1], path):
            return
        write_checkpoint(checkpoint, path)
        self._written = moment, path

    def _remove(self, path: str) -> None:
        # not Lightning's, which logs: where a signal ended the main thread's work, it may hold the lock of logging for ever
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise EarTeachError(f"{printable(path)}: cannot be removed ({error.strerror}); close it") from error


def wait_for_files(trainer: pl.Trainer) -> None:
    """Wait until the checkpoints so far are written: before processes are forked, which would inherit the open file, and
    before a file is looked for."""
    files = trainer.strategy.checkpoint_io
    if isinstance(files, BackgroundCheckpointIO):
        files.wait()


def copied(value: Any, known: dict[Any, torch.Tensor] | None = None) -> Any:
    """Return a checkpoint with tensors of its own, on the CPU: training changes the others. Tensors with the same memory
    are copied once, and so are written once."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        place = value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype
        if place not in known:
            known[place] = value.detach().to("cpu", copy=True)
        return known[place]
    if isinstance(value, dict):
        made = copy.copy(value)  # of its own class, with its attributes: a state_dict has versions
        made.update((name, copied(part, known)) for name, part in value.items())
        return made
    if isinstance(value, list | tuple):
        return type(value)(copied(part, known) for part in value)
    return value


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

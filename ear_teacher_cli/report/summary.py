"""Collect what the report of a run needs: configuration, metrics, the best checkpoint, validation embeddings."""

import csv
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from .. import run_folder
from ..config import TrainConfig
from ..config_files import read_config
from ..console import Console
from ..data.manifest import Manifest
from ..errors import EarTeachError, WeightsError
from ..files import printable, shell_word
from ..model.checkpoint import Checkpoint, read_checkpoint
from ..training.epoch_metrics import ValidationRows
from .validation_embeddings import ValidationEmbeddings, embed_validation_set, validation_embeddings_of


@dataclass(frozen=True)
class RunSummary:
    """A run, as its report shows it.

    `rows`: of metrics.csv. `checkpoint`: the best that can be read. `embeddings`: of its epoch; None if the images
    cannot be read (`missing` says why). `running`: whether another process is training it.
    """

    folder: Path
    config: TrainConfig
    rows: list[dict[str, str]]
    checkpoint: Checkpoint
    embeddings: ValidationEmbeddings | None
    missing: str = ""
    running: bool = False

    @property
    def model(self) -> str:
        """What was trained: a teacher, or a student."""
        return "student" if self.config.distils else "teacher"

    @property
    def epoch(self) -> int:
        """The epoch of the checkpoint."""
        return self.checkpoint.epoch

    @property
    def last(self) -> int:
        """The last finished epoch."""
        return int(self.rows[-1]["epoch"])

    @property
    def is_best(self) -> bool:
        """Whether the checkpoint was kept as one of the best, and is not merely one that can still be read."""
        return self.checkpoint.path.name.startswith("best-")

    def row(self, epoch: int) -> dict[str, str]:
        """Return the row of metrics.csv of an epoch (0: before training), or an empty one."""
        return next((row for row in self.rows if int(row["epoch"]) == epoch), {})

    def class_sizes(self) -> np.ndarray | None:
        """Return how many images each pseudo-class has, int [K]; None where classes say nothing of the embeddings."""
        state = self.checkpoint.content.get("pseudo_classes")
        if not isinstance(state, dict) or self.config.pseudo_classes in ("batch", "instance"):
            return None
        labels = state["labels"].numpy()
        return np.bincount(labels[labels >= 0], minlength=state["count"])

    def unreadable(self) -> Counter[str]:
        """Return how many images could not be used, by reason, as bad_images.csv lists them."""
        path = self.folder / run_folder.BAD
        if not path.is_file():
            return Counter()
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            return Counter(row.get("reason") or "" for row in csv.DictReader(file))


@dataclass(frozen=True)
class Kept:
    """What a run that has just ended kept in memory, rows of its validation `manifest`."""

    manifest: Manifest
    best: ValidationRows
    baseline: ValidationRows


def summarise_run(
    folder: Path,
    console: Console,
    root_dir: str | None = None,
    running: bool = False,
    config: TrainConfig | None = None,
    kept: Kept | None = None,
) -> RunSummary:
    """Return the summary of an experiment folder.

    With `config` and `kept` of a run that has just ended its configuration is not read and its images are not embedded
    again; `kept` is used if it is of the best epoch. Raises EarTeachError if the folder is no run, or has no finished epoch.
    """
    where = printable(folder)
    if config is None:
        if not (folder / run_folder.CONFIG).is_file():
            raise EarTeachError(f"{where}: holds no {run_folder.CONFIG}; give a folder that earteach train made")
        config = read_config(folder / run_folder.CONFIG)
    rows = run_folder.read_metrics(folder / run_folder.METRICS)
    if not any(int(row["epoch"]) for row in rows):
        raise EarTeachError(
            f"{where}: its {run_folder.METRICS} has no finished epoch; continue with "
            f"`earteach resume {shell_word(folder)}`"
        )
    checkpoint = _best_intact(folder, console)
    try:
        if kept and kept.best.epoch == checkpoint.epoch and not checkpoint.steps_done:
            found = validation_embeddings_of(kept.manifest, kept.best, kept.baseline, checkpoint)
        else:
            found = embed_validation_set(checkpoint, console, root_dir)
    except EarTeachError as error:
        missing = (
            f"{error} (paths start from the folder where the run was trained; --root-dir is where the images are now)"
        )
        console.warn(f"the validation images cannot be read, so comparison and neighbours are missing: {missing}")
        return RunSummary(folder, config, rows, checkpoint, None, missing, running)
    return RunSummary(folder, config, rows, checkpoint, found, "", running)


def _best_intact(folder: Path, console: Console) -> Checkpoint:
    """Return the best checkpoint that is not damaged, with a warning for each that is. Raises the first WeightsError if
    there is none."""
    errors: list[WeightsError] = []
    best = run_folder.checkpoint_of(folder, best=True)
    for path in dict.fromkeys(chain([best], run_folder.checkpoints(folder))):
        try:
            return read_checkpoint(path)
        except WeightsError as error:
            errors.append(error)
            console.warn(f"{error}. Trying another")
    raise errors[0]

"""The files of an experiment folder: where they are, which checkpoint to use, and how a run takes the folder."""

import csv
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .config import MONITORS, TrainConfig
from .errors import EarTeachError
from .files import only_writer, printable, remove_stale_temporaries, short_message, whole_file

CONFIG, METRICS, BAD, CHECKPOINTS, LAST = "config.toml", "metrics.csv", "bad_images.csv", "checkpoints", "last.ckpt"
REPORT, COLLAGES = "report.html", "reconstruction_collages"
PROFILE, TRACE = "profile.txt", "profile-trace.json"
EXPORTED = "exported.txt"  # sha256 of the weights that a distillation exported


def versions(experiment: Path) -> list[Path]:
    """Return `version_0`, `version_1`, ... of an experiment, oldest first."""
    found = [p for p in experiment.glob("version_*") if p.name.removeprefix("version_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("version_")))


def collages(version: Path) -> list[Path]:
    """Return the collages of a `version_N` folder, first to last."""
    return sorted((version / COLLAGES).glob("epoch_*.png"))


def is_begun(experiment: Path) -> bool:
    """Return whether the folder holds anything, a run or not; locks and other hidden files do not count."""
    return experiment.is_dir() and any(not path.name.startswith(".") for path in experiment.iterdir())


def checkpoints(experiment: Path) -> list[Path]:
    """Return all checkpoints, newest first: `last.ckpt`, then by the epoch in the name (copies lose their times)."""

    def age(path: Path) -> tuple:
        return path.name == LAST, epoch_of(path), path.stat().st_mtime

    return sorted((experiment / CHECKPOINTS).glob("*.ckpt"), key=age, reverse=True)


def last_checkpoint(experiment: Path) -> Path | None:
    """Return `last.ckpt`, else the newest; None if there is none."""
    return next(iter(checkpoints(experiment)), None)


def best_checkpoint(experiment: Path) -> Path | None:
    """Return the checkpoint with the best value of the metric in its name, the earliest of several; else the last.

    Values are those of metrics.csv: the name rounds them.
    """
    rows: dict[int, dict[str, str]] = {}
    with suppress(EarTeachError):
        rows = {int(row["epoch"]): row for row in read_metrics(experiment / METRICS)}
    scored = []
    for path in (experiment / CHECKPOINTS).glob("best-*.ckpt"):
        if match := re.search(r"-(val_\w+?)_(-?[\d.]+)\.ckpt$", path.name):
            monitor, epoch = match[1].replace("_", "/", 1), epoch_of(path)
            sign = {"min": 1, "max": -1}[MONITORS.get(monitor, "min")]
            scored.append((sign * float(rows.get(epoch, {}).get(monitor) or match[2]), epoch, path))
    return min(scored)[2] if scored else last_checkpoint(experiment)


def epoch_of(checkpoint: Path) -> int:
    """Return the epoch in the name, counted from 1; -1 where there is none."""
    found = re.search(r"epoch_(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def newest_run(output_dir: Path) -> Path | None:
    """Return the experiment below `output_dir` that was trained last."""
    runs = [(p.stat().st_mtime, p.parent.parent) for p in output_dir.glob(f"*/{CHECKPOINTS}/*.ckpt")]
    return max(runs)[1] if runs else None


def checkpoint_of(path: Path, *, best: bool) -> Path:
    """Return the checkpoint of a file or an experiment folder. Raises EarTeachError if there is none."""
    if not path.exists():
        raise EarTeachError(f"{printable(path)}: no such file or folder; give an experiment folder or a .ckpt file")
    if path.is_file():
        return path
    found = best_checkpoint(path) if best else last_checkpoint(path)
    if found is None:
        raise EarTeachError(
            f"{printable(path)}: holds no checkpoint; give an experiment folder that earteach train made"
        )
    return found


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the rows of a metrics.csv: `epoch` is a whole number, the others are numbers or ''. Without a
    file there are none.

    Raises EarTeachError naming the line that is different.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restkey="more", restval="")
            rows = []
            for row in reader:
                int(row["epoch"])
                for value in row.values():
                    float(value or 0)
                rows.append(row)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        line = f" line {reader.line_num}" if not isinstance(error, UnicodeDecodeError) else ""
        raise EarTeachError(
            f"{printable(path)}{line}: is not what earteach wrote ({short_message(error)}); correct or remove the line"
        ) from error
    return rows


@contextmanager
def only_run(experiment: Path) -> Iterator[None]:
    """Make the experiment folder, hold its lock, and remove incomplete files that a killed run left.

    Raises EarTeachError if the folder cannot be made, or another process writes there.
    """
    _make(experiment)
    with only_writer(experiment):
        for folder in [experiment, *(path for path in experiment.rglob("*") if path.is_dir())]:
            remove_stale_temporaries(folder)
        yield


def write_config(experiment: Path, config: TrainConfig) -> None:
    """Write config.toml, and make the folder for checkpoints. Raises EarTeachError."""
    _make(experiment / CHECKPOINTS)
    with whole_file(experiment / CONFIG) as temporary:
        temporary.write_text(config.as_toml(), encoding="utf-8")


def remove_run(experiment: Path) -> None:
    """Remove the files that a run writes, and nothing else in the folder."""
    for path in [experiment / CHECKPOINTS, *versions(experiment), experiment / "wandb"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (CONFIG, METRICS, BAD, REPORT, PROFILE, TRACE, EXPORTED, "mlflow.db"):
        (experiment / name).unlink(missing_ok=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EarTeachError(
            f"{printable(folder)}: cannot be made ({error.strerror}); choose another --output-dir"
        ) from error

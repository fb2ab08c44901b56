"""Where things lie in an experiment folder, and how to find the right checkpoint."""

import csv
import re
from contextlib import suppress
from pathlib import Path

from .config import MONITORS
from .errors import EarTeachError
from .files import printable, short_message

CONFIG, METRICS, BAD, CHECKPOINTS, LAST = "config.toml", "metrics.csv", "bad_images.csv", "checkpoints", "last.ckpt"
REPORT, COLLAGES = "report.html", "reconstruction_collages"


def versions(experiment: Path) -> list[Path]:
    """`version_0`, `version_1`, ... of an experiment, oldest first."""
    found = [p for p in experiment.glob("version_*") if p.name.removeprefix("version_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("version_")))


def collages(version: Path) -> list[Path]:
    """The collages of a `version_N` folder, first to last."""
    return sorted((version / COLLAGES).glob("epoch_*.png"))


def is_begun(experiment: Path) -> bool:
    """Whether something lies in the folder, be it a run or not; locks and other hidden files do not count."""
    return experiment.is_dir() and any(not path.name.startswith(".") for path in experiment.iterdir())


def checkpoints(experiment: Path) -> list[Path]:
    """All checkpoints, newest first: `last.ckpt`, then by the epoch in the name (a copied folder has lost its times)."""

    def age(path: Path) -> tuple:
        return path.name == LAST, epoch_of(path), path.stat().st_mtime

    return sorted((experiment / CHECKPOINTS).glob("*.ckpt"), key=age, reverse=True)


def last_checkpoint(experiment: Path) -> Path | None:
    """`last.ckpt`, else the newest there is."""
    return next(iter(checkpoints(experiment)), None)


def best_checkpoint(experiment: Path) -> Path | None:
    """The checkpoint with the best figure of whatever `monitor` is in its name, as metrics.csv has it (the name rounds),
    the earliest of several; else the last."""
    known: dict[int, dict[str, str]] = {}
    with suppress(EarTeachError):
        known = {int(row["epoch"]): row for row in read_metrics(experiment / METRICS)}
    scored = []
    for path in (experiment / CHECKPOINTS).glob("best-*.ckpt"):
        if match := re.search(r"-(val_\w+?)_(-?[\d.]+)\.ckpt$", path.name):
            monitor, epoch = match[1].replace("_", "/", 1), epoch_of(path)
            sign = {"min": 1, "max": -1}[MONITORS.get(monitor, "min")]
            scored.append((sign * float(known.get(epoch, {}).get(monitor) or match[2]), epoch, path))
    return min(scored)[2] if scored else last_checkpoint(experiment)


def epoch_of(checkpoint: Path) -> int:
    """The epoch in its name, counted from 1; -1 where there is none."""
    found = re.search(r"epoch_(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def newest_run(output_dir: Path) -> Path | None:
    """The experiment below `output_dir` that was trained last."""
    runs = [(p.stat().st_mtime, p.parent.parent) for p in output_dir.glob(f"*/{CHECKPOINTS}/*.ckpt")]
    return max(runs)[1] if runs else None


def checkpoint_of(path: Path, *, best: bool) -> Path:
    """A checkpoint file from a file or an experiment folder. Raises EarTeachError if there is none."""
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
    """Rows of a metrics.csv, whose `epoch` is a whole number and whose others are numbers or ''; none if there is no such
    file yet. Raises EarTeachError naming the line that is not so."""
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
            f"{printable(path)}{line}: is not as earteach wrote it ({short_message(error)}); mend or remove the line"
        ) from error
    return rows

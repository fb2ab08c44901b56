"""Where things lie in an experiment folder, and how to find the right checkpoint."""

import re
from pathlib import Path

from ..config import MONITORS
from ..errors import EarTeachError
from ..files import printable

CONFIG, METRICS, BAD, CHECKPOINTS = "config.toml", "metrics.csv", "bad_images.csv", "checkpoints"


def versions(experiment: Path) -> list[Path]:
    """`version_0`, `version_1`, ... of an experiment, oldest first."""
    found = [p for p in experiment.glob("version_*") if p.name.removeprefix("version_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("version_")))


def last_checkpoint(experiment: Path) -> Path | None:
    """`last.ckpt`, else the newest there is."""
    last = experiment / CHECKPOINTS / "last.ckpt"
    if last.exists():
        return last
    return max((experiment / CHECKPOINTS).glob("*.ckpt"), key=lambda p: p.stat().st_mtime, default=None)


def best_checkpoint(experiment: Path) -> Path | None:
    """The checkpoint with the best figure in its name (of whatever `monitor` it is), else the last."""
    scored = []
    for path in (experiment / CHECKPOINTS).glob("best-*.ckpt"):
        if match := re.search(r"-(val_\w+?)_(-?[\d.]+)\.ckpt$", path.name):
            sign = {"min": 1, "max": -1}[MONITORS.get(match[1].replace("_", "/", 1), "min")]
            scored.append((sign * float(match[2]), path))
    return min(scored)[1] if scored else last_checkpoint(experiment)


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

"""Describe a run in words: its configuration and data before it starts, its best checkpoint when it ends."""

from dataclasses import fields
from pathlib import Path

from .. import run_folder
from ..config import MONITORS, TrainConfig
from ..console import counted
from ..data.manifest import Manifest
from ..distill_config import DistillConfig
from ..files import printable
from ..metrics_catalogue import metric_of
from ..quality import reconstruction
from .kmeans import IMAGES_PER_CLASS
from .objectives import Objective


def describe(config: TrainConfig) -> list[tuple[str, str]]:
    """Return a summary of a configuration: names and texts."""
    start = "pretrained" if config.pretrained else "random weights"
    kept = f", kept to stride {config.kept_stride}" if config.kept_stride else ""
    views = counted(config.views, f"{config.augmentation} view") if config.augment else "no augmentation"
    note, changed = of_other_weights(config), _changed(config)
    return [
        ("experiment", printable(config.experiment_dir)),
        ("student" if config.distils else "teacher", f"{config.backbone} at {config.image_size} px, {start}{kept}"),
        *_about_teacher(config),
        ("learns by", ", ".join(term.describe() for term in Objective(config).terms if term.weight)),
        (
            "schedule",
            f"{counted(config.max_epochs, 'epoch')}, batches of {config.batch_size}, {views}; learning rate "
            f"{config.learning_rate:g} (heads x {config.head_lr_mult:g}), warm-up {config.warmup:g}; "
            f"{config.precision}; best by {config.monitor}",
        ),
        *([("note", note)] if note else []),
        ("options", f"also set: {' '.join(changed)}" if changed else "all others have their defaults"),
    ]


def _about_teacher(config: TrainConfig) -> list[tuple[str, str]]:
    """Return what a student is distilled from; nothing of a teacher."""
    if not isinstance(config, DistillConfig):
        return []
    seen = "; both see whole images" if config.whole_images else ""
    return [("teacher", f"{printable(config.teacher)} at {config.teacher_size} px{seen}")]


# The options that `describe` has in other words.
_SHOWN = {
    "train_metadata", "val_metadata", "output_dir", "experiment_name", "backbone", "image_size", "pretrained",
    "max_epochs", "batch_size", "learning_rate", "precision", "teacher", "teacher_size", "teacher_fingerprint", "out",
}  # fmt: skip


def _changed(config: TrainConfig) -> list[str]:
    """Return the options that differ from their defaults, as on the command line."""
    found = []
    for spec in fields(config):
        value = getattr(config, spec.name)
        if value != spec.default and spec.name not in _SHOWN:
            name = spec.name.replace("_", "-")
            found.append(
                f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {printable(value)}"
            )
    return found


def of_other_weights(config: TrainConfig) -> str:
    """Return why validation reconstructs worse than training, where there is a known reason; else ''."""
    if not config.kept_share or not config.reconstruction_weight:
        return ""
    return (
        f"val recon and PSNR are computed with the exported backbone, moved back by --baseline-weight "
        f"{config.baseline_weight:g}, for which the decoder is not trained: they can be worse than train recon"
    )


def why_best(folder: Path, best: Path | None, monitor: str) -> str:
    """Return why a checkpoint is the best: `val/retrieval 87.5 %, the highest so far (epoch 7 of 10; 61.2 % before
    training)`; '' if metrics.csv does not have its value."""
    scored = {
        int(row["epoch"]): float(row[monitor])
        for row in run_folder.read_metrics(folder / run_folder.METRICS)
        if row.get(monitor)
    }
    start, epoch = scored.pop(0, None), run_folder.epoch_of(best) if best else -1
    if epoch not in scored:
        return ""
    metric, value, higher = metric_of(monitor), scored[epoch], MONITORS[monitor] == "max"
    word = "highest" if higher else "lowest"
    is_best = value == (max if higher else min)(scored.values())
    rank = f"the {word} so far" if is_best else f"the {word} of those that are kept"
    before = ""
    if start is not None:
        better = value > start if higher else value < start
        word = "" if better else "the same as the " if value == start else "worse than the "
        before = f"; {word}{metric.with_unit(f'{start:.4g}')} before training"
    return f"{monitor} {metric.with_unit(f'{value:.4g}')}, {rank} (epoch {epoch} of {max(scored)}{before})"


def reconstruction_in_words(folder: Path, best: Path | None, config: TrainConfig) -> tuple[str, ...]:
    """Return the PSNR of a checkpoint beside its references and, where the decoder was trained, what is wrong with the
    reconstructions; empty if metrics.csv does not have the PSNR."""
    epoch = run_folder.epoch_of(best) if best else -1
    for row in run_folder.read_metrics(folder / run_folder.METRICS):
        if int(row["epoch"]) == epoch and config.reconstruction_weight:
            metrics = {
                name.removeprefix("val/"): float(row[name]) for name in row if name.startswith("val/") and row[name]
            }
            verdict = reconstruction.judge(metrics)
            found = [
                reconstruction.in_words(metrics, f" at epoch {epoch}"),
                f"reconstructions: {verdict}" if verdict else "",
            ]
            return tuple(text for text in found if text)
    return ()


def describe_data(config: TrainConfig, train: Manifest, val: Manifest, classes: int) -> str:
    """Return how many images there are to train on and to validate on, and over how many pseudo-classes."""
    text = (
        f"{len(train)} training images ({printable(train.source)}), {len(val)} validation ({printable(val.source)}), "
        f"from {train.root}/"
    )
    if not config.learns_classes:
        return text
    by_folder = config.pseudo_classes == "identity" and Path(train.source).is_dir()
    text += f"; {classes} pseudo-classes ({config.pseudo_classes}{': the names of the folders' if by_folder else ''})"
    if config.pseudo_classes == "kmeans" and len(train) > 10 * IMAGES_PER_CLASS * classes:
        text += (
            f", {len(train) / classes:.0f} images each: many for one class, --num-pseudo-classes 0 makes one per "
            f"{IMAGES_PER_CLASS}"
        )
    return text

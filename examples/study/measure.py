"""Do one run of the study in a process of its own: train it, then measure it.

    python measure.py FOLDER

FOLDER contains the `job.json` that study.py wrote. `train` writes `teacher.safetensors` and `cost.json`, `measure` writes
`metrics.json` and what the paired differences need: for each evaluation manifest a bootstrap (`NAME.npz`), and the IoU of
each window of the mask probe (`mask-windows.npz`).

N images, D embedding.
"""

import csv
import json
import resource
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import landmark_probe
import mask_probe
import numpy as np
import torch
from backbones import initial_backbone, save_teacher
from crops import EAR, NOTHING, SURROUNDINGS, Crops, Images, evenly_spaced
from tables import EAR_ONLY, MASK_WINDOWS, RESAMPLES

from ear_teacher_cli.config import TrainConfig, preset
from ear_teacher_cli.data.dataset import collate
from ear_teacher_cli.data.manifest import Manifest, read_manifest
from ear_teacher_cli.data.preprocessing import preprocessing_for
from ear_teacher_cli.embedding.embedder import Embedder, load_embedder
from ear_teacher_cli.errors import EarTeachError, ManifestError
from ear_teacher_cli.export.export import export_backbone
from ear_teacher_cli.model import whitening
from ear_teacher_cli.platform import usable_cores
from ear_teacher_cli.quality import identity_metrics, pairs
from ear_teacher_cli.training.module import EarTeacherLightningModule

GREY_SIDE = 32

METRICS = {"rank1": "rank-1", "eer": "EER"}  # key in metrics.json -> name in identity_metrics


def train(folder: Path) -> None:
    """Write `teacher.safetensors` as the job describes, and time and memory of its training to `cost.json`."""
    job = read_job(folder)
    teacher, start = folder / "teacher.safetensors", time.perf_counter()
    if job["kind"] == "earteach":
        _earteach_train(folder, job["options"])
    elif job["kind"] == "lightly":
        from rivals import train_rival

        train_rival(job["row"], config_of(job), teacher)
    else:  # not trained
        save_teacher(initial_backbone(config_of(job)), config_of(job), teacher)
    cost = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds(), "peak_memory_mb": peak_memory_mb()}
    (folder / "cost.json").write_text(json.dumps(cost))
    if job["kind"] == "earteach":
        # the last checkpoint instead of the best: all rows are measured after the same number of steps
        export_backbone(folder / "run" / "checkpoints" / "last.ckpt", teacher)
        shutil.rmtree(folder / "run" / "checkpoints")


def measure(folder: Path) -> None:
    """Measure `teacher.safetensors` and write `metrics.json`."""
    job = read_job(folder)
    torch.manual_seed(job["seed"])
    if job["kind"] == "step0":
        metrics = {"difference": step_zero_difference(config_of(job), folder / "teacher.safetensors", job)}
    else:
        model = images_of(job, folder)
        training = evenly_spaced(read_manifest(job["train"], job["root_dir"]), job["whiten_on"])
        mappings = [whitening.fit(rows) for rows in model.rows(training)[0]]
        lists = {
            name: _measure_manifest(folder, name, path, model, mappings, job) for name, path in job["lists"].items()
        }
        metrics = {"lists": lists}
        if model.embedder and job["kind"] in ("earteach", "lightly", "initial"):
            metrics |= _probe(folder, model.embedder, job)
        if job["kind"] == "earteach":
            metrics["psnr"] = _last_psnr(folder / "run" / "metrics.csv")
    (folder / "metrics.json").write_text(json.dumps(metrics))


def read_job(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "job.json").read_text(encoding="utf-8"))


def config_of(job: dict[str, Any]) -> TrainConfig:
    options = dict(job["options"])
    return TrainConfig(**preset(options.pop("preset", "recommended")) | options)


def cpu_seconds() -> float:
    """Return CPU seconds of all cores, of this process and its image loaders, including imports.

    Unlike wall-clock time they are comparable on a shared machine.
    """
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process in MB (ru_maxrss is in KiB on Linux, in bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def arguments_of(options: dict[str, Any]) -> list[str]:
    """Convert TrainConfig fields to command-line arguments of `earteach train`."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments


def _earteach_train(folder: Path, options: dict[str, Any]) -> None:
    from ear_teacher_cli.cli.app import main

    sys.argv = ["earteach", "train", *arguments_of(options), "--output-dir", str(folder), "--experiment-name", "run"]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def images_of(job: dict[str, Any], folder: Path) -> Images:
    """Return what the job measures: images as they are, and for weights of their own also the ears alone."""
    config = config_of(job)
    workers = min(config.num_workers, usable_cores())
    if job["kind"] == "grey":
        tiny = replace(preprocessing_for(config), image_size=GREY_SIDE)
        return Images(tiny, None, (NOTHING,), workers)
    painted = {"masked": (EAR,), "ear-only": (SURROUNDINGS,), "shuffled": (NOTHING,)}
    embedder = load_embedder(str(folder / "teacher.safetensors"))
    return Images(embedder.preprocessing, embedder, painted.get(job["kind"], (NOTHING, SURROUNDINGS)), workers)


def ears_of(manifest: Manifest, indices: list[int]) -> tuple[list[str], list[str] | None]:
    """Return (people, sides) of the rows; None for the sides if one is unknown.

    Raises ManifestError if a row has no identity.
    """
    if manifest.identities is None or not all(manifest.identities[i] for i in indices):
        raise ManifestError(f"{manifest.source}: has no identities; fill in the column identity")
    sides = [manifest.side(i) for i in indices]
    return [manifest.identities[i] for i in indices], None if None in sides else sides


def _probe(folder: Path, embedder: Embedder, job: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of the probes that the job asks for; write the IoU of each window of the mask probe."""
    metrics: dict[str, Any] = {}
    if job["landmarks"]:
        landmarks = landmark_probe.probe(embedder, job["landmarks"], job["seed"])
        metrics |= {"nme": landmarks.nme, "constant_nme": landmarks.constant_nme}
    if job["masks"]:
        # split with seed 0 whatever the run's, so that all runs are tested on the same photos
        masks = mask_probe.probe(embedder, job["masks"], choose=job["choosing"])
        metrics["masks"] = {name: {"mean": score.mean, "pooled": score.pooled} for name, score in masks.scores.items()}
        first = next(iter(masks.scores.values()))
        np.savez(folder / MASK_WINDOWS, iou=first.iou, photos=np.array(masks.test.photos))
    return metrics


def _measure_manifest(
    folder: Path, name: str, path: str, model: Images, mappings: list[whitening.Whitening], job: dict[str, Any]
) -> dict[str, Any]:
    """Return the metrics of an evaluation manifest; write its rows and the bootstrap of each metric to `NAME.npz`.

    The keys of the second way of painting, the ear alone, start with EAR_ONLY.
    """
    manifest = read_manifest(path)
    views, indices = model.rows(manifest)
    people, sides = ears_of(manifest, indices)
    if job["kind"] == "shuffled":
        people, sides = np.random.default_rng(job["seed"]).permutation(people).tolist(), None
    order = pairs.arrange(people, sides)
    drawn = identity_metrics.resamples(order.groups, RESAMPLES, 0)
    found, draws = {}, {"rows": np.array([manifest.rows[i] for i in indices])}
    for prefix, rows, mapping in zip(("", EAR_ONLY)[: len(views)], views, mappings, strict=True):
        for treatment, embeddings in (("raw", rows), ("whitened", mapping.apply(rows))):
            measured = identity_metrics.measure(np.ascontiguousarray(embeddings[order.index]), order, (), drawn)
            key = prefix + treatment
            found[key] = {metric: measured.figure(title).value for metric, title in METRICS.items()}
            draws |= {f"{key}_{metric}": measured.draws[title] for metric, title in METRICS.items()}
    np.savez(folder / f"{name}.npz", **draws)
    counts = np.unique(order.ear, return_counts=True)[1]
    images = len(indices)
    chance = float((counts * (counts - 1)).sum() / (images * max(1, images - 1)))
    return {**found, "pictures": images, "people": order.people, "ears": len(counts), "chance": chance}


def _last_psnr(metrics: Path) -> float:
    with open(metrics, encoding="utf-8", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["val/psnr"])


@torch.inference_mode()
def step_zero_difference(config: TrainConfig, teacher: Path, job: dict[str, Any]) -> float:
    """Return the largest difference between embeddings of a run before its first step and of the pretrained baseline.

    Measured on 64 images of the first evaluation manifest.
    """
    module = EarTeacherLightningModule(config)
    module.load_pretrained()
    module.eval()
    embedder = load_embedder(str(teacher))
    embedder.backbone.cpu()
    manifest = evenly_spaced(read_manifest(next(iter(job["lists"].values()))), 64)
    crops = Crops(manifest, embedder.preprocessing)
    pixels = collate([crops[i] for i in range(len(crops))])["pixels"][:, 0]
    return float((module(pixels) - embedder(pixels)).abs().max())


def main(folder: str) -> int:
    """Train and measure the run in `folder`, and return the exit code."""
    try:
        train(Path(folder))
        measure(Path(folder))
    except EarTeachError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

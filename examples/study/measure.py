"""Do one run of the study in a process of its own: train it, then measure it.

    python measure.py FOLDER

FOLDER contains the `job.json` that study.py wrote. `train` writes `teacher.safetensors` and `cost.json`, `measure` writes
`metrics.json` and, for each evaluation manifest, the bootstrap that the paired differences need (`NAME.npz`).

N images, D embedding.
"""

import csv
import json
import resource
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbones import initial_backbone, save_teacher
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from ear_teacher_cli.config import TrainConfig, preset
from ear_teacher_cli.data.crop import cut, points_in_crop, read_image
from ear_teacher_cli.data.dataset import UnreadableImage, collate
from ear_teacher_cli.data.manifest import Manifest, read_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing, preprocessing_for
from ear_teacher_cli.embedding.embedder import Embedder, load_embedder
from ear_teacher_cli.errors import EarTeachError, ImageError, ManifestError
from ear_teacher_cli.export.export import export_backbone
from ear_teacher_cli.model import whitening
from ear_teacher_cli.platform import usable_cores
from ear_teacher_cli.quality import identity_metrics, pairs
from ear_teacher_cli.training.module import EarTeacherLightningModule

GREY_SIDE = 32
RESAMPLES = 2000
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
        model = Images.of(job, folder)
        training = evenly_spaced(read_manifest(job["train"], job["root_dir"]), job["whiten_on"])
        mapping = whitening.fit(model.rows(training)[0])
        lists = {
            name: _measure_manifest(folder, name, path, model, mapping, job) for name, path in job["lists"].items()
        }
        metrics = {"lists": lists}
        if job["landmarks"] and model.embedder and job["kind"] in ("earteach", "lightly", "initial"):
            from landmark_probe import probe

            result = probe(model.embedder, job["landmarks"], job["seed"])
            metrics |= {"nme": result.nme, "constant_nme": result.constant_nme}
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


@dataclass
class Images:
    """Embed images with a backbone, or describe them by their grey pixels if there is none.

    `masked`: paint the ear over first.
    """

    preprocessing: Preprocessing
    embedder: Embedder | None
    masked: bool
    num_workers: int

    @staticmethod
    def of(job: dict[str, Any], folder: Path) -> "Images":
        """Return what the job measures."""
        config = config_of(job)
        workers = min(config.num_workers, usable_cores())
        if job["kind"] == "grey":
            tiny = replace(preprocessing_for(config), image_size=GREY_SIDE)
            return Images(tiny, None, False, workers)
        embedder = load_embedder(str(folder / "teacher.safetensors"))
        return Images(embedder.preprocessing, embedder, job["kind"] == "masked", workers)

    def rows(self, manifest: Manifest) -> tuple[np.ndarray, list[int]]:
        """Return (float32 N,D of unit length, their indices in the manifest), without unreadable images."""
        crops = Crops(manifest, self.preprocessing, self.masked)
        found, indices = [], []
        for batch in DataLoader(crops, batch_size=32, num_workers=self.num_workers, collate_fn=collate):
            if len(batch["index"]):
                found.append(self.embedder(batch["pixels"]) if self.embedder else _grey(batch["pixels"]))
                indices += batch["index"].tolist()
        if not indices:
            raise ManifestError(f"{manifest.source}: no image could be read; run earteach validate-data")
        return torch.nn.functional.normalize(torch.cat(found), dim=1).numpy(), indices


class Crops(Dataset):
    """Clean crops as EarDataset cuts them. `masked`: with the ear painted over, so that only its surroundings remain."""

    def __init__(self, manifest: Manifest, preprocessing: Preprocessing, masked: bool):
        self.manifest, self.preprocessing, self.masked = manifest, preprocessing, masked

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> dict[str, Any] | UnreadableImage:
        box = self.manifest.boxes[index]
        try:
            image = read_image(self.manifest.file(index)).image
            crop = cut(image, box, self.preprocessing)
        except ImageError as error:
            return UnreadableImage(index, error.reason, error.detail)
        if self.masked:
            mask_ear(crop, image.size, box, self.preprocessing)
        if self.preprocessing.mirror and self.manifest.side(index) == "right":
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"index": index, "pixels": torch.from_numpy(np.array(crop)).permute(2, 0, 1)}


def mask_ear(crop: Image.Image, size: tuple[int, int], box, preprocessing: Preprocessing) -> None:
    """Fill the ellipse inscribed in the ear's box (without a box: in the image) with the mean colour, in place."""
    corners = np.reshape(box or (0, 0, *size), (2, 2))
    (x1, y1), (x2, y2) = points_in_crop(corners, size, box, preprocessing)
    ImageDraw.Draw(crop).ellipse((x1, y1, x2, y2), fill=preprocessing.fill)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """Return the luminance (ITU-R BT.601) of uint8 B,3,H,W as float32 B,H*W."""
    return (pixels.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).flatten(1)


def evenly_spaced(manifest: Manifest, most: int) -> Manifest:
    """Return at most `most` rows of a manifest, evenly spaced."""
    return manifest.subset(np.linspace(0, len(manifest) - 1, min(most, len(manifest))).round().astype(int).tolist())


def ears_of(manifest: Manifest, indices: list[int]) -> tuple[list[str], list[str] | None]:
    """Return (people, sides) of the rows; None for the sides if one is unknown.

    Raises ManifestError if a row has no identity.
    """
    if manifest.identities is None or not all(manifest.identities[i] for i in indices):
        raise ManifestError(f"{manifest.source}: has no identities; fill in the column identity")
    sides = [manifest.side(i) for i in indices]
    return [manifest.identities[i] for i in indices], None if None in sides else sides


def _measure_manifest(
    folder: Path, name: str, path: str, model: Images, mapping: whitening.Whitening, job: dict[str, Any]
) -> dict[str, Any]:
    """Return the metrics of an evaluation manifest; write its rows and the bootstrap of each metric to `NAME.npz`."""
    manifest = read_manifest(path)
    rows, indices = model.rows(manifest)
    people, sides = ears_of(manifest, indices)
    if job["kind"] == "shuffled":
        people, sides = np.random.default_rng(job["seed"]).permutation(people).tolist(), None
    order = pairs.arrange(people, sides)
    drawn = identity_metrics.resamples(order.groups, RESAMPLES, 0)
    found, draws = {}, {"rows": np.array([manifest.rows[i] for i in indices])}
    for treatment, embeddings in (("raw", rows), ("whitened", mapping.apply(rows))):
        measured = identity_metrics.measure(np.ascontiguousarray(embeddings[order.index]), order, (), drawn)
        found[treatment] = {key: measured.figure(name).value for key, name in METRICS.items()}
        draws |= {f"{treatment}_{key}": measured.draws[name] for key, name in METRICS.items()}
    np.savez(folder / f"{name}.npz", **draws)
    counts = np.unique(order.ear, return_counts=True)[1]
    chance = float((counts * (counts - 1)).sum() / (len(rows) * max(1, len(rows) - 1)))
    return {**found, "pictures": len(rows), "people": order.people, "ears": len(counts), "chance": chance}


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
    crops = Crops(manifest, embedder.preprocessing, masked=False)
    pixels = collate([crops[i] for i in range(len(crops))])["pixels"]
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

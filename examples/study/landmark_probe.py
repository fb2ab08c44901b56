"""Measure how precisely landmarks of an ear can be located from frozen feature maps.

    python landmark_probe.py teacher.safetensors drawn/ears.jsonl --draw points.png

The feature maps of strides 4 to 32 are resampled to one grid of stride 8 and standardised per channel. A 1 x 1
convolution, the only trained layer, maps them to a heat map per landmark, and a soft-argmax (expected position under the
softmax; integral regression, Sun et al. 2018, Nibali et al. 2018) gives the coordinates. The metric is the normalised
mean error (NME): mean distance between predicted and true points, divided by the crop's side. Training and test ears are
of different people. The ears are drawn by make_sample_ears.py, with 55 landmarks each.

N ears, K landmarks, C channels, G cells along a side of the grid. Coordinates are x, y as fractions of the crop's side.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ear_teacher_cli.data.crop import cut, points_in_crop, read_image
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing, normalise
from ear_teacher_cli.embedding.embedder import Embedder, load_embedder
from ear_teacher_cli.errors import EarTeachError, ManifestError
from ear_teacher_cli.model.feature_maps import map_model

STRIDES = (4, 8, 16, 32)
GRID_STRIDE = 8
TRAIN_EARS, TEST_EARS = 240, 120
STEPS, BATCH, LEARNING_RATE = 300, 32, 1e-2
SMOOTH_L1_BETA = 0.02  # the loss is linear in errors above 2 % of the side


@dataclass(frozen=True)
class Ears:
    """`pixels` uint8 N,3,H,W; `points` float32 N,K,2; `right`: bool N, true for right ears."""

    pixels: torch.Tensor
    points: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """The result of a probe."""

    nme: float
    constant_nme: float  # of the mean landmarks of the ear's side, independent of the image
    test: Ears
    predicted: torch.Tensor  # N,K,2


def probe(weights: str | Path | Embedder, landmarks: str | Path, seed: int = 0) -> Probe:
    """Train and test the probe on weights that `load_embedder` reads. Deterministic for a given seed."""
    embedder = weights if isinstance(weights, Embedder) else load_embedder(str(weights))
    train, test = read_ears(landmarks, embedder.preprocessing)
    maps = map_model(embedder.backbone, embedder.architecture, embedder.preprocessing.image_size)
    train_maps, test_maps = (cached_maps(maps, ears.pixels, embedder) for ears in (train, test))
    std, mean = torch.std_mean(train_maps.float(), dim=(0, 2, 3), keepdim=True)  # 1,C,1,1
    train_maps, test_maps = ((m.float() - mean) / std.clamp_min(1e-6) for m in (train_maps, test_maps))
    head = _train_head(train_maps, train.points, seed)
    with torch.inference_mode():
        predicted = soft_argmax(head(test_maps))
    return Probe(nme(predicted, test.points), nme(_mean_points(train, test), test.points), test, predicted)


def read_ears(path: str | Path, preprocessing: Preprocessing) -> tuple[Ears, Ears]:
    """Read a .jsonl manifest with `landmarks` and return (training ears, test ears).

    The last third of the people, sorted by name, are the test set. Raises ManifestError if rows lack data.
    """
    manifest = read_manifest(path)
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    if manifest.identities is None or len(lines) != len(manifest) or not all("landmarks" in line for line in lines):
        raise ManifestError(
            f"{path}: not every row has identity and landmarks; give the ears.jsonl of make_sample_ears.py"
        )
    people = sorted(set(manifest.identities))
    if len(people) < 3:
        raise ManifestError(
            f"{path}: has {len(people)} people; the probe needs at least 3, to test on other people than it was trained on"
        )
    test_people = set(people[-(len(people) // 3) :])
    train = [i for i, person in enumerate(manifest.identities) if person not in test_people]
    test = [i for i, person in enumerate(manifest.identities) if person in test_people]
    train_ears, test_ears = (
        _cut_ears(manifest, lines, _evenly_spaced(indices, most), preprocessing)
        for indices, most in ((train, TRAIN_EARS), (test, TEST_EARS))
    )
    return train_ears, test_ears


def _evenly_spaced(indices: list[int], most: int) -> list[int]:
    """Return at most `most` of the indices, evenly spaced, so that all people remain."""
    return [indices[i] for i in np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(int)]


def _cut_ears(manifest, lines, indices, preprocessing: Preprocessing) -> Ears:
    pixels, points, right = [], [], []
    for i in indices:
        image = read_image(manifest.file(i)).image
        crop = cut(image, manifest.boxes[i], preprocessing)
        pixels.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))  # H,W,3 -> 3,H,W
        inside = points_in_crop(lines[i]["landmarks"], image.size, manifest.boxes[i], preprocessing)
        points.append(torch.tensor(inside / preprocessing.image_size, dtype=torch.float32))
        right.append(lines[i].get("side") == "right")
    return Ears(torch.stack(pixels), torch.stack(points), torch.tensor(right))


@torch.inference_mode()
def cached_maps(maps: torch.nn.Module, pixels: torch.Tensor, embedder: Embedder) -> torch.Tensor:
    """Return the maps of STRIDES at stride 8, float16 N,C,G,G, of uint8 N,3,H,W."""
    device = next(embedder.backbone.parameters()).device
    maps.to(device)
    grid = embedder.preprocessing.image_size // GRID_STRIDE
    chosen = [i for i, stride in enumerate(maps.feature_info.reduction()) if stride in STRIDES]
    found = []
    for batch in pixels.split(32):
        stages = maps(normalise(batch.to(device), embedder.preprocessing))
        found.append(torch.cat([to_grid(stages[i].float(), grid) for i in chosen], dim=1).half().cpu())
    return torch.cat(found)


def to_grid(stage: torch.Tensor, grid: int) -> torch.Tensor:
    """Resample a map B,C,H,W to B,C,G,G: average a finer one, interpolate a coarser one bilinearly."""
    if stage.shape[-1] >= grid:
        return F.adaptive_avg_pool2d(stage, grid)
    return F.interpolate(stage, size=(grid, grid), mode="bilinear", align_corners=False)


def soft_argmax(heat: torch.Tensor) -> torch.Tensor:
    """Return the expected x, y of the cells' centres under the softmax (Sun et al. 2018, eq. 3): B,K,G,G -> B,K,2."""
    probability = heat.flatten(2).softmax(-1).unflatten(2, heat.shape[2:])
    centres = (torch.arange(heat.shape[-1], device=heat.device) + 0.5) / heat.shape[-1]
    return torch.stack([(probability.sum(2) * centres).sum(-1), (probability.sum(3) * centres).sum(-1)], dim=-1)


def nme(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """Return the mean distance of N,K,2 points as a fraction of the crop's side."""
    return float((predicted - true).norm(dim=-1).mean())


def _train_head(maps: torch.Tensor, points: torch.Tensor, seed: int) -> torch.nn.Conv2d:
    """Train the 1 x 1 convolution with Adam and cosine decay on maps N,C,G,G and points N,K,2."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Conv2d(maps.shape[1], points.shape[1], 1)
    with torch.no_grad():
        head.weight.normal_(0, 0.01, generator=generator)
        head.bias.zero_()
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(maps), (min(BATCH, len(maps)),), generator=generator)
        loss = F.smooth_l1_loss(soft_argmax(head(maps[batch])), points[batch], beta=SMOOTH_L1_BETA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


def _mean_points(train: Ears, test: Ears) -> torch.Tensor:
    """Return the mean training landmarks of each test ear's side, N,K,2; of both sides if training had no such side."""
    means = [
        train.points[train.right == side].mean(0) if (train.right == side).any() else train.points.mean(0)
        for side in (False, True)
    ]
    return torch.stack([means[int(side)] for side in test.right])


def draw(result: Probe, path: str | Path, count: int = 8, zoom: int = 3) -> None:
    """Write an image of `count` test ears with true points (green) and predicted ones (red)."""
    count = min(count, len(result.predicted))
    tiles = []
    for i in np.linspace(0, len(result.predicted) - 1, count).round().astype(int).tolist():
        image = Image.fromarray(result.test.pixels[i].permute(1, 2, 0).numpy())
        side = image.width * zoom
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        for points, colour in ((result.test.points[i], (40, 220, 60)), (result.predicted[i], (240, 40, 40))):
            for x, y in (points * side).tolist():
                pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=colour)
        tiles.append(np.asarray(image))
    columns = -(-count // 2)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, count - count % columns, columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def main(argv: list[str] | None = None) -> int:
    """Run the probe and return the exit code."""
    parser = argparse.ArgumentParser(description="Landmark probe on frozen feature maps of a backbone.")
    parser.add_argument("weights", help="an export, a checkpoint, a run folder, or a plain state dict with --backbone")
    parser.add_argument("landmarks", help="ears.jsonl of make_sample_ears.py")
    parser.add_argument("--backbone", help="timm model of a plain state dict")
    parser.add_argument("--image-size", type=int, help="side of the crops in pixels for a plain state dict")
    parser.add_argument("--seed", type=int, default=0, help="seed of the probe (default: %(default)s)")
    parser.add_argument("--draw", metavar="FILE.png", help="draw predicted and true points of a few test ears")
    options = parser.parse_args(argv)
    try:
        result = probe(
            load_embedder(options.weights, options.backbone, options.image_size), options.landmarks, options.seed
        )
    except EarTeachError as error:
        print(f"landmark_probe: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"NME {result.nme:.4f} of the crop's side; the mean landmarks of the ear's side give {result.constant_nme:.4f}"
    )
    if options.draw:
        draw(result, options.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())

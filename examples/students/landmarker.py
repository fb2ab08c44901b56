"""Train a small landmark model, 55 points in a crop of 192 px, with and without a teacher.

    python landmarker.py EARS --teacher teacher=teacher/ --draw landmarks.png

EARS: output folder of make_sample_ears.py. The student has 0.24 million parameters in BlazeFace's blocks, and predicts a heat
map per point on 24 x 24 cells. (Direct regression of the coordinates, as in FaceMesh, reached 3.5 % in 480 steps, heat maps
3.0 % in 240; 50 labelled ears, one seed.) With a teacher, it is first distilled from the teacher's maps of strides 4, 8 and
16 on all training ears without their landmarks (and on --unlabelled crops). Then all students train on the same few labelled
ears in the same order. The control is distilled from random weights: its gain cannot come from what the teacher learned.

The metric is the normalised mean error: mean distance between predicted and true points in % of the crop's side, on ears
of people on whom neither student nor teacher was trained.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from distillation import Block, Task, as_input, compare, crops_of
from PIL import Image, ImageDraw, ImageFont
from torch import nn

SIDE, POINTS, WIDTHS = 192, 55, (32, 64, 128, 192)
FILL = (124, 116, 104)  # around images that are not square
COLOURS = ((230, 60, 60), (60, 160, 240), (90, 200, 90), (240, 180, 40))  # helix, antihelix, concha, tragus
PARTS = (20, 15, 15, 5)


class Trunk(nn.Module):
    """Convolutional trunk: images B,3,S,S -> maps of strides 4, 8, 16 and 32."""

    def __init__(self, widths: tuple[int, int, int, int], depths: tuple[int, int, int, int]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 5, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        stages, narrow = [], 24
        for width, depth in zip(widths, depths, strict=True):
            stages.append(nn.Sequential(Block(narrow, width, 2), *(Block(width, width) for _ in range(depth - 1))))
            narrow = width
        self.stages = nn.ModuleList(stages)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        images, found = self.stem(images), []
        for stage in self.stages:
            images = stage(images)
            found.append(images)
        return found


class Landmarker(nn.Module):
    """Predict points B,55,2 (x, y as fractions of the side) from crops B,3,192,192.

    Maps of strides 32, 16 and 8 are upsampled and added on 24 x 24 cells. Each point is the expected position under the
    softmax of its heat map (integral regression, Sun et al. 2018, eq. 3).
    """

    channels = dict(zip((4, 8, 16), WIDTHS[:3], strict=True))

    def __init__(self):
        super().__init__()
        self.trunk = Trunk(WIDTHS, (2, 3, 4, 3))
        self.sides = nn.ModuleList(nn.Conv2d(width, 64, 1) for width in WIDTHS[1:])
        self.heat = nn.Sequential(Block(64, 64), nn.Conv2d(64, POINTS, 1))

    def maps(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the maps for distillation, stride -> map."""
        return dict(zip(self.channels, self.trunk(images)[:3], strict=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fine, middle, coarse = (side(stage) for side, stage in zip(self.sides, self.trunk(images)[1:], strict=True))
        heat = self.heat(fine + F.interpolate(middle + F.interpolate(coarse, scale_factor=2), scale_factor=2))
        probability = heat.flatten(2).softmax(-1).unflatten(2, heat.shape[2:])  # B,55,24,24
        centres = (torch.arange(heat.shape[-1]) + 0.5) / heat.shape[-1]
        return torch.stack([(probability.sum(2) * centres).sum(-1), (probability.sum(3) * centres).sum(-1)], -1)


def read_ears(folder: str | Path, split: str) -> list[dict]:
    """Return the rows of one split of ears.jsonl (make_sample_ears.py), with the path of the image as `file`."""
    with open(Path(folder) / "ears.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row | {"file": Path(folder) / row["image_path"]} for row in rows if row["split"] == split]


def square(image: Image.Image, region: tuple[float, ...], side: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Cut the region (x1, y1, x2, y2) of an image, pad it to a square, and return (uint8 side,side,3; scale; offset).

    A point p of the image is at p * scale + offset in the square, in pixels.
    """
    x1, y1, x2, y2 = region
    scale = side / max(x2 - x1, y2 - y1)
    size = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    corner = (side - size[0]) // 2, (side - size[1]) // 2
    canvas = Image.new("RGB", (side, side), FILL)
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC, box=region), corner)
    return np.asarray(canvas), scale, np.array(corner) - np.array([x1, y1]) * scale


def crops(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the boxes with a margin of a tenth: (uint8 N,3,192,192; landmarks N,55,2 as fractions of the side)."""
    pixels, points = [], []
    for row in rows:
        with Image.open(row["file"]) as file:
            image = file.convert("RGB")
        box = np.array(row["bbox"]).reshape(2, 2)
        margin = 0.1 * (box[1] - box[0])
        region = np.concatenate([np.maximum(box[0] - margin, 0), np.minimum(box[1] + margin, image.size)])
        crop, scale, offset = square(image, tuple(region.tolist()), SIDE)
        pixels.append(torch.from_numpy(crop.transpose(2, 0, 1).copy()))
        points.append(torch.tensor((np.array(row["landmarks"]) * scale + offset) / SIDE, dtype=torch.float32))
    return torch.stack(pixels), torch.stack(points)


def load(options):
    """Read the crops and landmarks to train on and to test on, and the unlabelled images: the same crops, and others."""
    train, test = (crops(read_ears(options.ears, split)) for split in ("train", "eval"))
    others = [crops_of(options.unlabelled, SIDE, options.most)] if options.unlabelled else []
    return train, test, [train[0], *others]


def build(seed: int) -> Landmarker:
    """Return a student with random weights."""
    torch.manual_seed(seed)
    return Landmarker().to(memory_format=torch.channels_last)


def loss(student: Landmarker, pixels: torch.Tensor, points: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return the smooth L1 loss of augmented crops."""
    images, points = augment(as_input(pixels), points, random)
    return F.smooth_l1_loss(student(images), points, beta=0.01)


def augment(images: torch.Tensor, points: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate by up to 15 degrees, scale by 0.85 to 1.15, shift by up to 5 %, change brightness and contrast.

    The points are transformed alike.
    """

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=random)

    angle, scale, shift = uniform(-0.26, 0.26), uniform(0.85, 1.15), uniform(-0.1, 0.1, 2)  # the side is 2 long
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(1, (2, 2))
    linear = rotation / scale[:, None, None]
    grid = F.affine_grid(torch.cat([linear, shift[:, :, None]], -1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False) * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.2, 0.2, 1, 1, 1)
    # grid_sample maps output pixels to input pixels; points need the inverse
    points = torch.linalg.solve(linear, (2 * points - 1 - shift[:, None]).transpose(1, 2)).transpose(1, 2)
    return images.to(memory_format=torch.channels_last), (points + 1) / 2


@torch.inference_mode()
def predict(student: Landmarker, pixels: torch.Tensor) -> torch.Tensor:
    """Return the points N,55,2 of crops N,3,192,192."""
    student.eval()
    return torch.cat([student(as_input(batch)) for batch in pixels.split(32)])


class Distances(NamedTuple):
    """`mean`: of each image the mean distance between predicted and true points as a share of the crop's side, N."""

    mean: np.ndarray


def compared(predicted: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor]) -> Distances:
    """Measure the distances."""
    return Distances((predicted - test[1]).norm(dim=-1).mean(1).numpy())


def nme(distances: Distances, weights: np.ndarray) -> float:
    """Return the normalised mean error in %, image n counted weights[n] times."""
    return 100 * float((distances.mean * weights).sum() / weights.sum())


def draw(test, predicted, scores: dict[str, float], count: int, path: Path, columns: int = 6) -> None:
    """Write an image of evenly spaced test ears: a row with the true points, and a row for each kind of student."""
    places = np.linspace(0, len(test[0]) - 1, columns).round().astype(int)
    rows = {"true": test[1], **predicted}
    page = Image.new("RGB", (130 + columns * (SIDE + 6), 8 + len(rows) * (SIDE + 6)), (250, 250, 248))
    pen = ImageDraw.Draw(page)
    for line, (name, points) in enumerate(rows.items()):
        top = 8 + line * (SIDE + 6)
        error = "" if name == "true" else f"\nNME {scores[name]:.2f} %\n{count} labelled"
        pen.text((8, top + 70), name + error, fill=(24, 28, 36), font=ImageFont.load_default(15))
        for column, place in enumerate(places):
            left = 130 + column * (SIDE + 6)
            page.paste(Image.fromarray(test[0][place].permute(1, 2, 0).numpy()), (left, top))
            strips = torch.split(points[place] * SIDE, PARTS)
            for strip, colour in zip(strips, COLOURS, strict=True):
                dots = [(left + x, top + y) for x, y in strip.tolist()]
                pen.line(dots, colour, 1)
                for x, y in dots:
                    pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), colour)
    page.save(path)


TASK = Task(
    what="ears",
    unit="NME %",
    inputs={"ears": "output folder of make_sample_ears.py"},
    side=SIDE,
    steps=200,
    rate=2e-3,
    kept=Distances,
    load=load,
    build=build,
    loss=loss,
    predict=predict,
    compared=compared,
    score=nme,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(compare(TASK, __doc__))

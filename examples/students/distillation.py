"""Code that both students share: standardised maps of the export, distillation, blocks, and the comparison.

Uses only public packages (torch, timm, numpy, Pillow) and the exported folder, not earteach.

B images, S pixels along a side, C channels of a map. Pixels are uint8 RGB.
"""

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

KINDS = ("without", "untrained", "teacher")
FILL = (124, 116, 104)  # around images that are not square


class Teacher:
    """Feature maps of an exported folder at some strides, for all of `pixels`, uint8 N,3,S,S.

    `maps`: for each stride float16 N,C,S/stride,S/stride, standardised per channel with mean and variance of the export.
    `untrained`: use random weights of the same architecture (control), standardised with statistics of their own maps.
    """

    def __init__(self, folder: str | Path, strides: tuple[int, ...], pixels: torch.Tensor, untrained: bool = False):
        folder = Path(folder)
        about = json.loads((folder / "features.json").read_text())["maps"]
        stages = [[stage["stride"] for stage in about].index(stride) for stride in strides]
        self.channels = [about[stage]["channels"] for stage in stages]
        logging.getLogger("timm").setLevel(logging.ERROR)  # it warns about the missing classifier
        if untrained:
            torch.manual_seed(0)
            name = json.loads((folder / "config.json").read_text())["architecture"]
            model = timm.create_model(name, pretrained=False, features_only=True).eval()
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
        preprocess = json.loads((folder / "preprocess.json").read_text())
        mean, std = (torch.tensor(preprocess[name])[:, None, None] * 255 for name in ("mean", "std"))
        found: list[list[torch.Tensor]] = [[] for _ in stages]
        statistics = [(torch.tensor(about[s]["mean"]), torch.tensor(about[s]["variance"]).sqrt()) for s in stages]
        with torch.inference_mode():
            for start in range(0, len(pixels), 32):
                maps = model((pixels[start : start + 32] - mean) / std)
                maps = [maps[stage] for stage in stages]
                if untrained and start == 0:
                    statistics = [(each.mean((0, 2, 3)), each.std((0, 2, 3))) for each in maps]
                for batches, each, (centre, deviation) in zip(found, maps, statistics, strict=True):
                    least = 0.01 * deviation.median()  # a channel that was constant in the export may vary here
                    standardised = (each - centre[:, None, None]) / deviation.clamp_min(least)[:, None, None]
                    batches.append(standardised.half())
        self.maps = [torch.cat(batches) for batches in found]


def distil(
    student: nn.Module, pixels: torch.Tensor, teacher: Teacher, steps: int, batch: int, seed: int, rate: float = 2e-3
) -> None:
    """Train `student.maps(images)` to match the teacher's maps of unlabelled images, uint8 N,3,S,S.

    A 1 x 1 convolution projects each map to the teacher's channels. The loss is smooth L1 plus 1 - cosine over channels.
    """
    random = torch.Generator().manual_seed(seed)
    widths = [stage.shape[1] for stage in student.maps(as_input(pixels[:1]))]
    torch.manual_seed(seed)
    projections = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, teacher.channels, strict=True))
    optimiser = torch.optim.AdamW([*student.parameters(), *projections.parameters()], lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    student.train()
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (batch,), generator=random)
        loss = torch.zeros(())
        maps = student.maps(as_input(pixels[chosen]))
        for own, projection, of_teacher in zip(maps, projections, teacher.maps, strict=True):
            target, output = of_teacher[chosen].float(), projection(own)
            loss = loss + F.smooth_l1_loss(output, target) + 1 - F.cosine_similarity(output, target, dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def fine_tune(
    student: nn.Module,
    train: tuple[torch.Tensor, torch.Tensor],
    count: int,
    loss: Callable[..., torch.Tensor],
    steps: int,
    batch: int,
    seed: int,
    rate: float = 2e-3,
) -> nn.Module:
    """Train on the labels of the first `count` training images in an order fixed by `seed`, and return the student.

    loss(student, pixels, labels, random) augments the images and returns the loss.
    """
    random = torch.Generator().manual_seed(seed)
    labelled = torch.randperm(len(train[0]), generator=random)[:count]
    optimiser = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    student.train()
    for _ in range(steps):
        chosen = labelled[torch.randint(len(labelled), (batch,), generator=random)]
        error = loss(student, train[0][chosen], train[1][chosen], random)
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        schedule.step()
    return student


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 B,3,S,S to float32 in [-1, 1], the students' input."""
    return (pixels / 127.5 - 1).to(memory_format=torch.channels_last)


class Block(nn.Module):
    """BlazeFace block (Bazarevsky et al. 2019, fig. 1): depthwise 5 x 5, pointwise 1 x 1, residual connection."""

    def __init__(self, narrow: int, wide: int, stride: int = 1):
        super().__init__()
        self.deep = nn.Sequential(
            nn.Conv2d(narrow, narrow, 5, stride, 2, groups=narrow, bias=False),
            nn.Conv2d(narrow, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
        )
        self.stride, self.added_channels = stride, wide - narrow

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        skip = F.max_pool2d(images, 2) if self.stride == 2 else images
        return F.relu(self.deep(images) + F.pad(skip, (0, 0, 0, 0, 0, self.added_channels)))


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


@dataclass(frozen=True)
class Task:
    """A student's task. `what`: name of the labelled images. `unit`: name of the metric.

    load(rows) -> images and labels; build(seed) -> a student; `loss` as in `fine_tune`; predict(student, images) ->
    predictions for score(predicted, test) and draw(test, {kind: predicted}, count, path). `strides`: of the maps that
    distillation uses. `steps`: default number of steps of training on labels.
    """

    what: str
    unit: str
    strides: tuple[int, ...]
    steps: int
    load: Callable[[list[dict]], tuple[torch.Tensor, torch.Tensor]]
    build: Callable[[int], nn.Module]
    loss: Callable[..., torch.Tensor]
    predict: Callable[[nn.Module, torch.Tensor], Any]
    score: Callable[[Any, tuple[torch.Tensor, torch.Tensor]], float]
    draw: Callable[..., None]


def compare(task: Task, description: str) -> int:
    """Run a student's script: parse its command line, train all kinds of students, and print the table.

    For every seed and number of labels the student is trained without a teacher, with an untrained copy of it, and with
    it. `description`: docstring of the script.
    """
    parser = _parser(task, description)
    options = parser.parse_args()
    what, unit, start = task.what, task.unit, time.time()
    train, test = (task.load(read_ears(options.ears, split)) for split in ("train", "eval"))
    if max(options.labelled) > len(train[0]):
        parser.error(
            f"--labelled: there are {len(train[0])} training {what}; draw more people, or give a smaller number"
        )
    kinds = [kind for kind in KINDS if kind in options.kinds]
    teachers = {
        kind: Teacher(options.teacher, task.strides, train[0], kind == "untrained")
        for kind in kinds
        if kind != "without"
    }
    found, shown = {}, {}
    for seed in options.seeds:
        for kind in kinds:
            student = task.build(seed)
            if kind in teachers:
                distil(student, train[0], teachers[kind], options.distil_steps, 2 * options.batch, seed)
            for count in options.labelled:
                trained = fine_tune(copy.deepcopy(student), train, count, task.loss, options.steps, options.batch, seed)
                shown[count, kind] = task.predict(trained, test[0])
                found.setdefault((count, kind), []).append(task.score(shown[count, kind], test))
                print(f"seed {seed}, {count} labelled, {kind}: {found[count, kind][-1]:.2f}", file=sys.stderr)
    size = sum(p.numel() for p in task.build(0).parameters())
    print(f"{size:,} parameters; {len(test[0])} test {what}; seeds {options.seeds}; {time.time() - start:.0f} s\n")
    print(table(found, options.labelled, kinds, what, unit))
    if options.draw:
        first = options.labelled[0]
        task.draw(test, {kind: shown[first, kind] for kind in kinds}, first, Path(options.draw))
    if options.json:
        runs = [{"labelled": count, "kind": kind, unit: values} for (count, kind), values in found.items()]
        Path(options.json).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser(task: Task, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("ears", help="output folder of make_sample_ears.py")
    add("teacher", help="folder of earteach export-backbone")
    counts = f"numbers of labelled {task.what} {default}"
    add("--labelled", type=int, nargs="+", default=[50, 200, 1000], metavar="COUNT", help=counts)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help=f"random seeds {default}")
    kinds = f"one or more of {', '.join(KINDS)} (default: all)"
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=kinds)
    add("--steps", type=int, default=task.steps, help=f"steps of training on labels {default}")
    add("--distil-steps", type=int, default=200, help=f"steps of distillation {default}")
    add("--batch", type=int, default=16, help=f"batch size; distillation uses twice as many images {default}")
    add("--draw", metavar="FILE.png", help=f"draw true and predicted labels on test {task.what}")
    add("--json", metavar="FILE", help="write the metric of every run")
    return parser


def table(found: dict[tuple[int, str], list[float]], counts: list[int], kinds: list[str], what: str, unit: str) -> str:
    """Return a Markdown table: mean and standard deviation over seeds, and the difference from the first kind per seed."""
    base, *others = kinds
    columns = [f"labelled {what}", f"{base}, {unit}", *(f"{kind}, {unit} (difference of each seed)" for kind in others)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for count in counts:
        cells = [str(count), _mean_and_deviation(found[count, base])]
        for kind in others:
            gains = [b - a for a, b in zip(found[count, base], found[count, kind], strict=True)]
            cells.append(f"{_mean_and_deviation(found[count, kind])} ({', '.join(f'{gain:+.2f}' for gain in gains)})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_deviation(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"

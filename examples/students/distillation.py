"""Code that both students share: unlabelled images with what a teacher sees in them, distillation, and the comparison.

N images, S pixels along a side, C channels of a map. Pixels are uint8 RGB.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ear_teacher_cli import load_crop
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.distillation import MEASURED_ON, Distillation, Targets, Teacher
from ear_teacher_cli.errors import EarTeachError, ImageError

WITHOUT, UNTRAINED = "without", "untrained"  # no teacher; random weights of a teacher's architecture
DRAWS = 2000  # of the bootstrap


class Source:
    """Unlabelled images, and the maps of them that a teacher gives: computed once, since images are not augmented.

    `pixels` N,3,S,S are what the student sees. `loss(student, random, batch)` is that of a batch drawn by `random`.
    """

    def __init__(self, images: torch.Tensor, side: int, teacher: Teacher, channels: dict[int, int]):
        """`images` N,3,T,T: of any size; the student sees them at `side`. `channels`: stride -> C of the student's maps."""
        self.pixels = torch.cat([scaled(part, side) for part in images.split(64)])
        if not teacher.statistics:
            teacher.measure(images[:: -(-len(images) // MEASURED_ON)].split(32))
        self.distillation = Distillation(teacher, channels)
        found: dict[int, list[torch.Tensor]] = {stride: [] for stride in channels}
        for part in images.split(32):
            for stride, stage in teacher(part).maps.items():
                cells = min(side // stride, stage.shape[-1])
                found[stride].append(F.adaptive_avg_pool2d(stage, cells).half())
        self.maps = {stride: torch.cat(parts) for stride, parts in found.items()}

    def loss(self, student: nn.Module, random: torch.Generator, batch: int) -> torch.Tensor:
        chosen = torch.randint(len(self.pixels), (batch,), generator=random)
        targets = Targets(torch.empty(0), {stride: stage[chosen].float() for stride, stage in self.maps.items()})
        return self.distillation(targets, maps=student.maps(as_input(self.pixels[chosen])))


def distil(student: nn.Module, sources: list[Source], steps: int, batch: int, seed: int, rate: float = 2e-3) -> None:
    """Train `student.maps(images)`, stride -> map, to match a teacher's; each source gives every batch its share."""
    random = torch.Generator().manual_seed(seed)
    projections = nn.ModuleList(copy.deepcopy(source.distillation.projections) for source in sources)
    for source, own in zip(sources, projections, strict=True):
        source.distillation.projections = own
    optimiser = torch.optim.AdamW([*student.parameters(), *projections.parameters()], lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    student.train()
    for _ in range(steps):
        loss = torch.stack([source.loss(student, random, batch // len(sources)) for source in sources]).mean()
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
    rate: float,
) -> None:
    """Train on the labels of the first `count` training images in an order fixed by `seed`.

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


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 B,3,S,S to float32 in [-1, 1], the students' input."""
    return (pixels / 127.5 - 1).to(memory_format=torch.channels_last)


def scaled(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Scale uint8 B,3,S,S to uint8 B,3,side,side."""
    if pixels.shape[-1] == side:
        return pixels
    small = F.interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True)
    return small.round().clamp(0, 255).byte()


def crops_of(path: str, side: int, most: int) -> torch.Tensor:
    """Read the ears of a list, at most `most` of them, evenly spaced: uint8 N,3,side,side."""
    ears, preprocessing = read_manifest(path), Preprocessing(side, 0.1, True, "bicubic", (0.5,) * 3, (0.5,) * 3)
    found = []
    for row in range(0, len(ears), -(-len(ears) // most)):
        try:
            found.append(torch.from_numpy(load_crop(ears.file(row), ears.boxes[row], preprocessing)))
        except ImageError as error:
            print(f"{ears.where(row)}: {error.detail}; skipped", file=sys.stderr)
    return torch.stack(found)


@dataclass(frozen=True)
class Task:
    """A student's task. `what`: name of the labelled images. `unit`: name of the metric. `inputs`: name and help of the
    script's arguments for them.

    load(options) -> (images, labels) to train on, the same to test on, and unlabelled images for each source; build(seed) ->
    a student with `channels`, stride -> C, and `maps`; `loss` as in `fine_tune`; predict(student, images) -> predictions;
    compared(predictions, test) -> a NamedTuple of arrays, `kept`, that score(compared, weights) needs, where `weights`, int N,
    is how often each test image counts; draw(test, {kind: predictions}, scores, count, path). `side`: of the student's input. `steps`,
    `rate`: of training on labels, by default.
    """

    what: str
    unit: str
    inputs: dict[str, str]
    side: int
    steps: int
    rate: float
    kept: type
    load: Callable[..., tuple[Any, Any, list[torch.Tensor]]]
    build: Callable[[int], nn.Module]
    loss: Callable[..., torch.Tensor]
    predict: Callable[[nn.Module, torch.Tensor], Any]
    compared: Callable[[Any, Any], Any]
    score: Callable[[Any, np.ndarray], float]
    draw: Callable[..., None]


def compare(task: Task, description: str) -> int:
    """Run a student's script: parse its command line, train all kinds of students, and print the table.

    For every seed and number of labels the student is trained without a teacher, with random weights of the first teacher's
    architecture, and with every teacher. `description`: docstring of the script.
    """
    parser = _parser(task, description)
    options = parser.parse_args()
    teachers = _teachers(parser, options)
    started = time.time()
    train, test, unlabelled = _loaded(task, options, teachers)
    if max(options.labelled) > len(train[0]):
        parser.error(f"--labelled: there are {len(train[0])} training {task.what}; give a smaller number")
    kinds = [kind for kind in (WITHOUT, UNTRAINED, *teachers) if kind not in options.leave_out]
    found: dict[tuple[int, str], list[Any]] = {(count, kind): [] for count in options.labelled for kind in kinds}
    once, shown = np.ones(len(test[0]), int), {}
    for seed in options.seeds:
        for kind in kinds:
            paths = {count: _path(options, seed, count, kind) for count in options.labelled}
            to_draw = options.draw and seed == options.seeds[-1]
            if not to_draw and all(path and path.is_file() for path in paths.values()):
                for count, path in paths.items():
                    found[count, kind].append(task.kept(**np.load(path)))
                continue
            student = task.build(seed)
            if kind != WITHOUT:
                sources = _sources(task, options, teachers, kind, seed, unlabelled, student)
                distil(student, sources, options.distil_steps, 2 * options.batch, seed)
            for count, path in paths.items():
                trained = copy.deepcopy(student)
                fine_tune(trained, train, count, task.loss, options.steps, options.batch, seed, task.rate)
                shown[count, kind] = task.predict(trained, test[0])
                compared = task.compared(shown[count, kind], test)
                print(
                    f"seed {seed}, {count} labelled, {kind}: {task.score(compared, once):.2f}",
                    file=sys.stderr,
                    flush=True,
                )
                found[count, kind].append(compared)
                _keep(compared, path)
    size = sum(p.numel() for p in task.build(0).parameters())
    took = time.time() - started
    print(f"{size:,} parameters; {len(test[0])} test {task.what}; seeds {options.seeds}; {took:.0f} s\n")
    scores = {key: [task.score(each, once) for each in runs] for key, runs in found.items()}
    print(table(task, found, scores, len(once), options.labelled, kinds))
    if options.draw:
        first = options.labelled[0]
        last = {kind: scores[first, kind][-1] for kind in kinds}
        task.draw(test, {kind: shown[first, kind] for kind in kinds}, last, first, Path(options.draw))
    if options.json:
        runs = [{"labelled": count, "kind": kind, task.unit: values} for (count, kind), values in scores.items()]
        Path(options.json).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return 0


def _loaded(task: Task, options: argparse.Namespace, teachers: dict[str, list[str]]) -> Any:
    """Return the data, after a look at the teachers. Exit with a message if something cannot be read."""
    try:
        for weights in {path for paths in teachers.values() for path in paths}:
            Teacher(weights, ())
        return task.load(options)
    except (EarTeachError, OSError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")


def _path(options: argparse.Namespace, seed: int, count: int, kind: str) -> Path | None:
    """Return where --keep keeps the result of a student; None without it."""
    return Path(options.keep) / f"{kind}-{count}-{seed}.npz" if options.keep else None


def _keep(compared: Any, path: Path | None) -> None:
    """Write the result of a student, if there is a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **compared._asdict())


def _teachers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return name -> weights for each seed, of `--teacher NAME=WEIGHTS [WEIGHTS ...]`."""
    found = {}
    for first, *others in options.teacher:
        name, equals, path = first.partition("=")
        weights = [path, *others]
        if not equals or len(weights) not in (1, len(options.seeds)):
            parser.error(f"--teacher {first}: give NAME=WEIGHTS, and one file of weights or one for each seed")
        if name in (WITHOUT, UNTRAINED, *found):
            parser.error(f"--teacher {first}: {name} is taken; give the teacher another name")
        found[name] = weights * (len(options.seeds) if len(weights) == 1 else 1)
    return found


def _sources(
    task: Task,
    options: argparse.Namespace,
    teachers: dict[str, list[str]],
    kind: str,
    seed: int,
    unlabelled: list[torch.Tensor],
    student: nn.Module,
) -> list[Source]:
    """Return the sources of a kind of teacher: the first are the training images, which it sees at --teacher-size."""
    place = options.seeds.index(seed)
    weights = next(iter(teachers.values()))[place] if kind == UNTRAINED else teachers[kind][place]
    sizes = [options.teacher_size, *[None] * (len(unlabelled) - 1)]
    found = []
    for images, size in zip(unlabelled, sizes, strict=True):
        torch.manual_seed(seed)
        teacher = Teacher(weights, tuple(student.channels), size, untrained=kind == UNTRAINED)
        if size is not None:
            teacher.statistics = {}  # those of an export are of crops at its own size
        found.append(Source(images, task.side, teacher, student.channels))
    return found


def _parser(task: Task, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    for name, text in task.inputs.items():
        add(name, help=text)
    text = "a teacher: an export, a checkpoint or a run, or one for each seed; repeat for more"
    add("--teacher", action="append", nargs="+", required=True, metavar="NAME=WEIGHTS", help=text)
    text = f"pixels along the side of the {task.what} that a teacher sees (default: as it was trained)"
    add("--teacher-size", type=int, metavar="N", help=text)
    add("--root-dir", metavar="DIR", help="folder that the paths of photos start from (default: as earteach)")
    add("--unlabelled", metavar="LIST", help="list of ears, or folder of crops, to distil on, too")
    add("--most", type=int, default=2000, metavar="N", help=f"crops of --unlabelled to use {default}")
    add("--leave-out", nargs="+", default=[], choices=(WITHOUT, UNTRAINED), help="kinds of students to leave out")
    counts = f"numbers of labelled {task.what} {default}"
    add("--labelled", type=int, nargs="+", default=[50, 200, 600], metavar="COUNT", help=counts)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help=f"random seeds {default}")
    add("--steps", type=int, default=task.steps, help=f"steps of training on labels {default}")
    add("--distil-steps", type=int, default=200, help=f"steps of distillation {default}")
    add("--batch", type=int, default=16, help=f"batch size; distillation uses twice as many images {default}")
    add("--draw", metavar="FILE.png", help=f"draw true and predicted labels on test {task.what}")
    add("--json", metavar="FILE", help="write the metric of every run")
    text = "keep the result of every student here, and train only those that are missing; with the same other options"
    add("--keep", metavar="DIR", help=text)
    return parser


def table(
    task: Task,
    found: dict[tuple[int, str], list[Any]],
    scores: dict[tuple[int, str], list[float]],
    images: int,
    counts: list[int],
    kinds: list[str],
) -> str:
    """Return two Markdown tables: mean and standard deviation over seeds; and the differences between kinds, paired by
    test image and seed, with a 95 % interval from a bootstrap over the test images."""
    lines = [f"| labelled {task.what} | {' | '.join(f'{kind}, {task.unit}' for kind in kinds)} |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for count in counts:
        cells = [_mean_and_deviation(scores[count, kind]) for kind in kinds]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    pairs = [(b, a) for i, b in enumerate(kinds) for a in kinds[:i]]
    if not pairs:
        return "\n".join(lines)
    lines += ["", f"| {task.unit} minus | {' | '.join(f'{count} labelled' for count in counts)} |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=DRAWS)  # DRAWS,N
    again = {
        key: np.mean([[task.score(each, weights) for weights in draws] for each in runs], axis=0)
        for key, runs in found.items()
    }
    for b, a in pairs:
        cells = []
        for count in counts:
            differences = again[count, b] - again[count, a]
            low, high = np.quantile(differences, [0.025, 0.975])
            mean = np.mean(scores[count, b]) - np.mean(scores[count, a])
            cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(f"| {b} - {a} | {' | '.join(cells)} |")
    lines += [
        "",
        f"95 % intervals: a bootstrap over the test {task.what}. They hold for these students: seeds, training sets and",
    ]
    lines[-1] += " people are not drawn anew."
    return "\n".join(lines)


def _mean_and_deviation(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


class Block(nn.Module):
    """BlazeFace block (Bazarevsky et al. 2019, fig. 1): depthwise k x k, pointwise 1 x 1, residual connection.

    Padding and names are those of published models, so that weights can be exchanged: with stride 2 as TensorFlow pads.
    """

    def __init__(self, narrow: int, wide: int, stride: int = 1, kernel: int = 5):
        super().__init__()
        before = (kernel - stride) // 2
        self.pad = (before, kernel - stride - before) * 2
        self.convs = nn.Sequential(
            nn.Conv2d(narrow, narrow, kernel, stride, groups=narrow, bias=False),
            nn.Conv2d(narrow, wide, 1, bias=False),
        )
        self.norm = nn.BatchNorm2d(wide)
        self.stride, self.added_channels = stride, wide - narrow

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        skip = F.max_pool2d(images, 2) if self.stride == 2 else images
        return F.relu(
            self.norm(self.convs(F.pad(images, self.pad))) + F.pad(skip, (0, 0, 0, 0, 0, self.added_channels))
        )

"""Speed and memory of `earteach distill`, compared with a minimal PyTorch loop.

The loop has the same teacher, student, losses, augmentation and data. The time of both is that of an epoch's training steps,
the memory the peak of a process that runs three epochs.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from bench import Line, Work, in_turn
from measure_step import time_last_epoch
from photos import drawn
from torch.utils.data import DataLoader

from ear_teacher_cli import EarDataModule
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.preprocessing import normalise, preprocessing_for
from ear_teacher_cli.distill_config import DistillConfig
from ear_teacher_cli.distillation import Distillation, Teacher, config_for
from ear_teacher_cli.export.export import export_backbone
from ear_teacher_cli.model.map_reader import MapReader
from ear_teacher_cli.model.teacher import build_backbone, embedding_size
from ear_teacher_cli.training.run import train

EPOCHS = 3  # the last is measured


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    drawn(folder, people=3 if quick else 24)
    config = _config(folder, quick)
    step, loader = _minimal_loop(config)
    runs: list[dict[str, float]] = []

    def ours() -> float:
        runs.append(time_last_epoch(config))
        return runs[-1]["steps"]

    def minimal() -> float:
        start = time.perf_counter()
        for batch in loader:
            step(batch)
        return time.perf_counter() - start

    seconds = in_turn({"ours": ours, "minimal": minimal}, rounds)
    teacher = read_architecture(config)
    what = f"{config.backbone} from {teacher}, {config.image_size} px, batch {config.batch_size}"
    work = Work("distilling", what, len(loader) * config.batch_size, "images")
    yield work.compare(seconds, "minimal", "a minimal PyTorch loop", 0.97)
    peaks = {name: [_peak(name, folder, quick) for _ in range(min(rounds, 2))] for name in ("ours", "minimal")}
    ratios = [a / b for a, b in zip(peaks["ours"], peaks["minimal"], strict=True)]
    megabytes = [f"{peaks[name][-1]:.0f} MB" for name in ("ours", "minimal")]
    yield Line("distilling", what, "peak memory of the loop", ratios, 1.2, *megabytes, more_is_better=False)


def read_architecture(config: DistillConfig) -> str:
    """Return the name in timm of the teacher's model."""
    return json.loads((Path(config.teacher) / "config.json").read_text())["architecture"]


def _config(folder: Path, quick: bool) -> DistillConfig:
    """Train and export a teacher, unless there is one, and return the configuration of the distillation."""
    lists = {
        "train_metadata": str(folder / "ears" / "train_teacher.npy"),
        "val_metadata": str(folder / "ears" / "val_teacher.npy"),
        "box_format": "xyxy",  # few boxes do not tell
    }
    common = {
        **lists,
        "pretrained": False,
        "precision": "32-true",
        "num_workers": 1,
        "output_dir": str(folder / "runs"),
    }
    size = 64 if quick else 128
    if not (folder / "teacher").is_dir():
        options = {"backbone": "test_convnext" if quick else "convnext_atto", "experiment_name": "teacher"}
        teacher = TrainConfig(**common, **options, image_size=size, max_epochs=1, batch_size=8, report=False)
        export_backbone(train(teacher, Console(quiet=True)).experiment, folder / "teacher")
    student = "test_resnet" if quick else "mobilenetv3_small_100"
    config = config_for(folder / "teacher", **common, backbone=student, max_epochs=EPOCHS)
    return replace(config, batch_size=8 if quick else 32, cache="off", max_bad=0.0)  # the minimal loop has no cache


def _minimal_loop(config: DistillConfig) -> tuple[Callable[[dict], None], DataLoader]:
    """Return a function that trains on one batch, and the loader of the batches."""
    data = EarDataModule(config)
    data.setup()
    student = build_backbone(config.backbone, config.image_size).to(memory_format=torch.channels_last)
    reader = MapReader(student, config.image_size, min(config.map_strides), "map_weight", "0")
    channels = {stride: reader.shapes[stride][0] for stride in config.map_strides}
    teacher = Teacher(config.teacher, config.map_strides)
    distillation = Distillation(teacher, channels, embedding_size(student, config.image_size))
    optimizer = torch.optim.AdamW([*student.parameters(), *distillation.parameters()], lr=config.learning_rate)
    preprocessing = preprocessing_for(config)
    student.train()

    def step(batch: dict) -> None:
        embedding, maps = reader(student, normalise(batch["pixels"], preprocessing))
        loss = distillation(batch["pixels"], maps, embedding)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, data.train_dataloader()


def _peak(name: str, folder: Path, quick: bool) -> float:
    """Return the peak memory in MB of a process that distils: `ours` or `minimal`."""
    command = [sys.executable, str(Path(__file__)), name, str(folder), "quick" if quick else ""]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _distil_once(name: str, folder: Path, quick: bool) -> None:
    config = _config(folder, quick)
    if name == "ours":
        train(config, Console(quiet=True), overwrite=True)
    else:
        step, loader = _minimal_loop(config)
        for _ in range(EPOCHS):
            for batch in loader:
                step(batch)
    # not getrusage, whose peak includes that of the parent process
    print(int(open("/proc/self/status", encoding="utf-8").read().split("VmHWM:")[1].split()[0]) / 1024)


if __name__ == "__main__":
    _distil_once(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "quick")

"""Speed of the training step of `earteach train`, compared with a minimal PyTorch loop.

The loop has the same model, losses, augmentation and data; on one preloaded batch it is the upper bound. The other rows
are the share of an epoch that is neither training steps nor forward passes of validation: logging, collage, metrics,
whitening and checkpoints.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import Line, Work, in_turn
from photos import drawn
from torch.utils.data import DataLoader

from ear_teacher_cli import EarDataModule, EarTeacherLightningModule
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.preprocessing import to_unit
from ear_teacher_cli.training.losses import contrastive_loss, metric_loss
from ear_teacher_cli.training.run import train

EPOCHS = 3  # the last is measured
SHARES = {500: 0.1, 5000: 0.05}  # images of an epoch -> aim of the share of what is besides its steps


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    drawn(folder, people=3 if quick else 24)
    config = TrainConfig(
        train_metadata=str(folder / "ears" / "train_teacher.npy"),
        val_metadata=str(folder / "ears" / "val_teacher.npy"),
        box_format="xyxy",  # few boxes do not tell
        backbone="test_convnext" if quick else "convnext_atto",
        image_size=64 if quick else 128,
        batch_size=8 if quick else 16,
        pretrained=False,
        precision="32-true",
        num_workers=1,
        max_epochs=EPOCHS,
        max_bad=0.0,
        cache="off",  # the minimal loop has none
        output_dir=str(folder / "runs"),
    )
    step, loader = _minimal_loop(config)
    preloaded = next(iter(loader))
    batches = len(loader)
    runs: list[dict[str, float]] = []

    def ours() -> float:
        runs.append(time_last_epoch(config))
        return runs[-1]["steps"]

    def minimal() -> float:
        start = time.perf_counter()
        for batch in loader:
            step(batch)
        return time.perf_counter() - start

    def bound() -> float:
        start = time.perf_counter()
        for _ in range(batches):
            step(preloaded)
        return time.perf_counter() - start

    seconds = in_turn({"ours": ours, "minimal": minimal, "bound": bound}, rounds)
    what = f"{config.backbone}, {config.image_size} px, batch {config.batch_size}, 2 views"
    work = Work("step", what, batches * config.batch_size, "images")
    yield work.compare(seconds, "minimal", "a minimal PyTorch loop", 0.97)
    aim = 0.95 if torch.cuda.is_available() else None
    yield work.compare(seconds, "bound", "the same loop on one preloaded batch", aim)
    yield from _measure_shares(folder, replace(config, image_size=64, cache="ram", max_epochs=2), min(rounds, 2), quick)


def _measure_shares(folder: Path, config: TrainConfig, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the share of each number of images in SHARES, in the second epoch, whose crops are in the cache."""
    for images, aim in SHARES.items():
        count = images // 20 if quick else images
        config = replace(config, train_metadata=str(_many_boxes(folder, count)), root_dir=str(folder / "ears"))
        runs = [time_last_epoch(config) for _ in range(rounds)]
        shares = [run["other"] / run["epoch"] for run in runs]
        times = f"{runs[-1]['other']:.2f} s", f"{runs[-1]['epoch']:.2f} s"
        what = f"logging, collage, whitening, checkpoints; {config.backbone}, {config.image_size} px, {count:,} images"
        yield Line("step", what, "the whole epoch", shares, aim, *times, more_is_better=False)


def _many_boxes(folder: Path, count: int) -> Path:
    """Write a list of `count` ears: the drawn ones again and again, each time with a slightly different box."""
    ears, path = drawn(folder), folder / f"{count}.csv"
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_path,x1,y1,x2,y2\n")
        for number in range(count):
            row, again = number % len(ears), number // len(ears)
            x1, y1, x2, y2 = ears.boxes[row]
            file.write(f"{ears.paths[row]},{x1 + again / 100:.2f},{y1:.2f},{x2:.2f},{y2:.2f}\n")
    return path


def _minimal_loop(config: TrainConfig) -> tuple[Callable[[dict], None], DataLoader]:
    """Return a function that trains on one batch, and the loader of the batches."""
    data = EarDataModule(config)
    data.setup()
    loader = data.train_dataloader()
    module = EarTeacherLightningModule(config).train()
    prototypes = torch.nn.Parameter(F.normalize(torch.randn(512, config.projection_dim), dim=1))
    optimizer = torch.optim.AdamW([*module.parameters(), prototypes], lr=1e-4)
    labels = torch.randint(512, (len(data.train_set),))

    def step(batch: dict) -> None:
        views = torch.cat([batch["pixels"], batch["view"]])
        embedding, maps = module.features(views)
        first = module.model.decoder_input(embedding, maps)[: len(batch["pixels"])]
        loss = config.reconstruction_weight * F.mse_loss(module.model.decoder(first), to_unit(batch["clean"]))
        projection = module.model.projection(embedding)
        loss = loss + contrastive_loss(projection, config.temperature)
        prediction = module.model.prediction(projection)
        label = labels[batch["index"]].repeat(2)
        loss = loss + 0.5 * metric_loss("arcface", prediction, prototypes, label, config.margin, config.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, loader


def time_last_epoch(config: TrainConfig) -> dict[str, float]:
    """Run `train` and return seconds of its last epoch: `epoch`, of which `steps`, and `other`.

    `other` is neither training steps nor forward passes of validation.
    """
    marks: dict[str, float] = {}

    class Timed(EarTeacherLightningModule):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            marks["start"] = time.perf_counter()

        def on_validation_epoch_start(self):
            super().on_validation_epoch_start()
            marks["validation"] = time.perf_counter()
            marks["passes"] = 0.0

        def validation_step(self, batch, index):
            start = time.perf_counter()
            super().validation_step(batch, index)
            marks["passes"] += time.perf_counter() - start

    import ear_teacher_cli.training.launch as training

    original, training.EarTeacherLightningModule = training.EarTeacherLightningModule, Timed
    try:
        train(config, Console(quiet=True), overwrite=True)
    finally:
        training.EarTeacherLightningModule = original
    end = time.perf_counter()
    steps, epoch = marks["validation"] - marks["start"], end - marks["start"]
    return {"steps": steps, "epoch": epoch, "other": epoch - steps - marks["passes"]}

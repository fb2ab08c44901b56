"""The training step: `earteach train` against a bare PyTorch loop over the same model, losses, augmentation and data.

The limit is that loop on one batch that is there already. What an epoch of `train` takes beyond its steps and the
forward passes of validation is logging, collage, metrics, whitening and checkpoints.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import Line, in_turn, rate, speed_up
from photos import drawn

from ear_teacher_cli import EarDataModule, EarTeacherLightningModule
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.preprocessing import normalise, to_unit
from ear_teacher_cli.training.losses import contrastive_loss, metric_loss
from ear_teacher_cli.training.run import train

EPOCHS = 3  # of which the first is not counted


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    drawn(folder, people=3 if quick else 24)
    config = TrainConfig(
        train_metadata=str(folder / "ears" / "train_teacher.npy"),
        val_metadata=str(folder / "ears" / "val_teacher.npy"),
        backbone="test_convnext" if quick else "convnext_atto",
        image_size=64 if quick else 128,
        batch_size=8 if quick else 16,
        pretrained=False,
        precision="32-true",
        num_workers=1,
        max_epochs=EPOCHS,
        max_bad=0.0,
        cache="off",  # the bare loop has none
        output_dir=str(folder / "runs"),
    )
    told: dict[str, float] = {}
    data = EarDataModule(config)
    data.setup()
    loader = data.train_dataloader()
    module = EarTeacherLightningModule(config).train()
    prototypes = torch.nn.Parameter(F.normalize(torch.randn(512, config.projection_dim), dim=1))
    optimizer = torch.optim.AdamW([*module.parameters(), prototypes], lr=1e-4)
    labels = torch.randint(512, (len(data.train_set),))
    batches = len(loader)
    fixed = next(iter(loader))

    def step(batch: dict) -> None:
        views = torch.cat([batch["pixels"], batch["view"]])
        embedding = module.model.embed(normalise(views, module.preprocessing))
        first = embedding[: len(batch["pixels"])]
        loss = F.mse_loss(module.model.decoder(first), to_unit(batch["pixels"]))
        projection = module.model.projection(embedding)
        loss = loss + contrastive_loss(projection, config.temperature)
        prediction = module.model.prediction(projection)
        label = labels[batch["index"]].repeat(2)
        loss = loss + 0.5 * metric_loss("arcface", prediction, prototypes, label, config.margin, config.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def ours() -> float:
        told.update(_one_run(config))
        return told["steps"]

    def bare() -> float:
        start = time.perf_counter()
        for batch in loader:
            step(batch)
        return time.perf_counter() - start

    def limit() -> float:
        start = time.perf_counter()
        for _ in range(batches):
            step(fixed)
        return time.perf_counter() - start

    beyond: list[float] = []

    def ours_and_beyond() -> float:
        steps = ours()
        beyond.append(told["beyond"] / told["epoch"])
        return steps

    seconds = in_turn({"ours": ours_and_beyond, "bare": bare, "limit": limit}, rounds)
    images = batches * config.batch_size
    what = f"{config.backbone}, {config.image_size} px, batch {config.batch_size}, 2 views"
    mine = rate(seconds["ours"], images, "pictures")
    yield Line(
        "step",
        what,
        "a bare loop",
        speed_up(seconds, "ours", "bare"),
        0.97,
        mine,
        rate(seconds["bare"], images, "pictures"),
    )
    aim = 0.95 if torch.cuda.is_available() else None
    yield Line(
        "step",
        what,
        "the same loop on one ready batch",
        speed_up(seconds, "ours", "limit"),
        aim,
        mine,
        rate(seconds["limit"], images, "pictures"),
    )
    yield Line("step", "logging, collage, whitening, checkpoints", "the epoch they are part of", beyond[1:], 0.03,
               f"{told['beyond']:.2f} s", f"{told['epoch']:.2f} s", more_is_better=False)  # fmt: skip


def _one_run(config: TrainConfig) -> dict[str, float]:
    """Seconds of the last epoch of a run: all of it, its steps, and what is neither steps nor validation's passes."""
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

    import ear_teacher_cli.training.launch as verb

    theirs, verb.EarTeacherLightningModule = verb.EarTeacherLightningModule, Timed
    try:
        train(config, Console(quiet=True), overwrite=True)
    finally:
        verb.EarTeacherLightningModule = theirs
    end = time.perf_counter()
    steps, epoch = marks["validation"] - marks["start"], end - marks["start"]
    return {"steps": steps, "epoch": epoch, "beyond": epoch - steps - marks["passes"]}

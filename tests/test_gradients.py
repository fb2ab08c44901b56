"""Clipping, accumulation, checkpointing and gathering of gradients."""

import dataclasses
import math
import os
import signal

import pytest
import pytorch_lightning as pl
import torch
from conftest import apart, read_epochs, small_config
from safetensors.torch import load_file, save_file
from test_resume import assert_same_weights

from ear_teacher_cli import EarDataModule, EarTeacherLightningModule
from ear_teacher_cli.console import Console
from ear_teacher_cli.errors import ConfigError
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.model.teacher import TeacherModel
from ear_teacher_cli.training import losses, objectives
from ear_teacher_cli.training.device import best_precision
from ear_teacher_cli.training.optimisation import steps_to_shift
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)


class Noted(pl.Callback):
    """The norm of the gradients that each optimizer step used."""

    def __init__(self):
        self.norms, self.gradients = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches and done < trainer.num_training_batches:
            return
        found = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if found:
            self.gradients.append(torch.cat([g.flatten() for g in found]))
            self.norms.append(float(self.gradients[-1].norm()))


def fitted(config, **options) -> tuple[Noted, pl.Trainer]:
    """The gradients of a run with a Trainer of one's own."""
    noted = Noted()
    trainer = pl.Trainer(
        max_epochs=config.max_epochs,
        accelerator="cpu",
        callbacks=[noted],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    pl.seed_everything(0, verbose=False)
    trainer.fit(EarTeacherLightningModule(config), datamodule=EarDataModule(config))
    return noted, trainer


@pytest.mark.slow
def test_gradients_are_clipped_and_their_norm_before_that_is_logged(manifests, tmp_path):
    config = small_config(manifests, output_dir=str(tmp_path), max_epochs=1, gradient_clip_val=0.0)
    free, trainer = fitted(config)
    logged = float(trainer.callback_metrics["train/gradient_norm"])
    assert logged == pytest.approx(sum(free.norms) / len(free.norms), rel=1e-4) and min(free.norms) > 0.1
    limit = 0.5 * min(free.norms)
    clipped, trainer = fitted(small_config(manifests, output_dir=str(tmp_path), max_epochs=1, gradient_clip_val=limit))
    assert clipped.norms == pytest.approx([limit] * len(free.norms), rel=1e-4)
    assert float(trainer.callback_metrics["train/gradient_norm"]) > 1.5 * limit
    own, _ = fitted(config, gradient_clip_val=limit / 2)  # of the user's own Trainer
    assert own.norms == pytest.approx([limit / 2] * len(free.norms), rel=1e-4)


@pytest.mark.slow
def test_two_accumulated_batches_are_one_of_twice_the_size(manifests, tmp_path, monkeypatch):
    """Of a loss that is a mean over images, without batch statistics (the decoder's) and without pseudo-classes."""
    original = EarTeacherLightningModule.training_step

    def without_batch_statistics(self, *arguments):
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return original(self, *arguments)

    monkeypatch.setattr(EarTeacherLightningModule, "training_step", without_batch_statistics)
    options = dict(
        output_dir=str(tmp_path), max_epochs=1, metric_loss="none", decoder_start="random", gradient_clip_val=0.0
    )
    together, _ = fitted(small_config(manifests, batch_size=8, **options))
    halves, trainer = fitted(small_config(manifests, batch_size=4, **options), accumulate_grad_batches=2)
    assert trainer.global_step == len(halves.gradients) == len(together.gradients) == 3
    assert apart(halves.gradients[0], together.gradients[0]) < 1e-3
    one, _ = fitted(small_config(manifests, batch_size=4, **options))
    assert len(one.gradients) == 6 and apart(one.gradients[0], together.gradients[0]) > 0.05


@pytest.mark.slow
def test_the_last_step_of_an_epoch_is_the_mean_of_fewer_batches(manifests, tmp_path, monkeypatch):
    """3 batches, two to a step: the gradient of the second step is that of its one batch."""
    original = EarTeacherLightningModule.training_step

    def step(self, *given):
        loss = original(self, *given)
        constant = sum(p.sum() for p in self.model.backbone.parameters()) * self._share_of_step(given[1])
        return loss * 0 + constant

    monkeypatch.setattr(EarTeacherLightningModule, "training_step", step)
    options = dict(
        output_dir=str(tmp_path), max_epochs=1, metric_loss="none", decoder_start="random", gradient_clip_val=0.0
    )
    found, _ = fitted(small_config(manifests, batch_size=8, **options), accumulate_grad_batches=2)
    sums = [float(gradient.max()) for gradient in found.gradients]
    assert sums == pytest.approx([1.0, 1.0])


RECIPE = dict(max_epochs=2, batch_size=3, accumulate_grad_batches=3, augment=True, ema_decay=0.9, gradient_clip_val=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "left"),
    [(1, (0, 3)), (4, (0, 6)), (7, (0, 6)), (8, (0, 6)), (9, (1, 3))],  # epochs and batches done when it stops
)
def test_a_stop_between_accumulated_batches_waits_for_the_step(manifests, tmp_path, monkeypatch, call, left):
    """8 batches an epoch: optimizer steps after 3, 6 and 8 of them."""
    config = small_config(manifests, output_dir=str(tmp_path), experiment_name="whole", **RECIPE)
    whole = train(config, QUIET).experiment
    assert read_checkpoint(whole / "checkpoints" / "last.ckpt").content["global_step"] == 6
    original, calls = EarTeacherLightningModule.training_step, []

    def with_signal(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EarTeacherLightningModule, "training_step", with_signal)
        outcome = train(small_config(manifests, output_dir=str(tmp_path), **RECIPE), QUIET)
    checkpoint = read_checkpoint(outcome.experiment / "checkpoints" / "last.ckpt")
    assert (outcome.interrupted, checkpoint.epoch, checkpoint.steps_done) == (143, *left)
    resume(outcome.experiment, QUIET)
    assert_same_weights(whole, outcome.experiment)
    assert read_epochs(outcome.experiment) == read_epochs(whole)


@pytest.mark.slow
def test_a_batch_without_a_finite_loss_leaves_the_others_of_its_step(manifests, tmp_path, monkeypatch):
    options = dict(output_dir=str(tmp_path), max_epochs=1, batch_size=4, metric_loss="none", gradient_clip_val=0.0)
    config = small_config(manifests, **options)
    original, calls = objectives.Objective.training, []

    def spoiled(which):
        def training(self, outputs):
            calls.append(1)
            found = original(self, outputs)
            return dataclasses.replace(found, total=found.total * math.nan) if len(calls) in which else found

        calls.clear()
        return training

    whole, _ = fitted(config, accumulate_grad_batches=2)
    monkeypatch.setattr(objectives.Objective, "training", spoiled({1}))
    half, _ = fitted(config, accumulate_grad_batches=2)
    assert len(half.gradients) == 3 and 0.05 < apart(half.gradients[0], whole.gradients[0]) < 3
    monkeypatch.setattr(objectives.Objective, "training", spoiled({1, 2}))
    none, trainer = fitted(config, accumulate_grad_batches=2)
    assert len(none.gradients) == 2 and trainer.global_step == 3  # the first step had no gradient at all


@pytest.mark.parametrize("backbone", ["test_convnext", "test_efficientnet", "test_resnet"])
@pytest.mark.parametrize("decoder_input", ["map", "embedding"])
def test_activations_computed_again_give_the_same_gradients_and_statistics(manifests, backbone, decoder_input):
    options = dict(backbone=backbone, decoder_input=decoder_input, decoder_start="random", freeze_statistics=False)
    images, gradients, buffers, passes = torch.randn(4, 3, 64, 64), [], [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = TeacherModel(small_config(manifests, gradient_checkpointing=again, **options), heads=()).train()
        names = ("stages.1.blocks.0", "blocks.1.0", "layer2.0")
        layer = next(m for name, m in model.backbone.named_modules() if name in names)
        count = []
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        embedding, maps = model.embed_with_maps(images)
        loss = model.decoder(model.decoder_input(embedding, maps)).square().mean() + embedding.square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None]))
        buffers.append(dict(model.backbone.named_buffers()))
        passes.append(len(count))
    assert passes == [1, 2]  # the layer ran again
    assert apart(gradients[1], gradients[0]) < 1e-5 and gradients[0].abs().max() > 0
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    moved = [buffer for name, buffer in buffers[1].items() if name.endswith("num_batches_tracked")]
    assert all(int(buffer) == 1 for buffer in moved) and bool(moved) == (backbone != "test_convnext")


def test_a_backbone_that_cannot_is_named(manifests):
    with pytest.raises(ConfigError, match="gradient_checkpointing: timm does not offer it for DLA"):
        TeacherModel(small_config(manifests, backbone="dla46_c", gradient_checkpointing=True), heads=())


@pytest.mark.slow
def test_a_run_with_everything_resumes_exactly(manifests, tmp_path, monkeypatch):
    options = dict(
        max_epochs=2, batch_size=4, gradient_checkpointing=True, deterministic=True, accumulate_grad_batches=2,
        gradient_clip_val=1.0, precision="auto", checkpoint_every_n_epochs=1, views=2, augment=True,
        contrastive_weight=1.0, augmentation="strong",
    )  # fmt: skip
    original, seen = EarTeacherLightningModule.training_step, []

    def watched(self, *arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(self, *arguments)

    monkeypatch.setattr(EarTeacherLightningModule, "training_step", watched)
    whole = train(small_config(manifests, output_dir=str(tmp_path), experiment_name="whole", **options), QUIET)
    assert whole.config.precision == "32-true"
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()
    names = sorted(path.name for path in (whole.experiment / "checkpoints").iterdir())
    assert "epoch_0001.ckpt" in names and "epoch_0002.ckpt" in names
    again = train(small_config(manifests, output_dir=str(tmp_path), experiment_name="again", **options), QUIET)
    assert_same_weights(whole.experiment, again.experiment)
    for path in (again.experiment / "checkpoints").iterdir():
        if path.name != "epoch_0001.ckpt":
            path.unlink()
    resume(again.experiment, QUIET)
    assert_same_weights(whole.experiment, again.experiment)


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_checkpoints_of_one_epoch_are_one_file_where_there_are_links(manifests, tmp_path, monkeypatch, links):
    if not links:

        def refused(*_, **__):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refused)
    options = dict(max_epochs=2, checkpoint_every_n_epochs=2, metric_loss="none")
    folder = train(small_config(manifests, output_dir=str(tmp_path), **options), QUIET).experiment / "checkpoints"
    files = {path.name: path.stat().st_ino for path in folder.iterdir()}
    best = [inode for name, inode in files.items() if name.startswith("best-epoch_0002")]
    assert len(best) == 1 and len(files) == 4 and not list(folder.glob(".*"))
    assert len({files["last.ckpt"], files["epoch_0002.ckpt"], *best}) == (1 if links else 3)
    for path in folder.iterdir():
        assert read_checkpoint(path).epoch == (1 if "0001" in path.name else 2)
    (tmp_path / "none").mkdir()
    none = small_config(manifests, output_dir=str(tmp_path / "none"), **options | {"checkpoint_every_n_epochs": 0})
    assert not list((train(none, QUIET).experiment / "checkpoints").glob("epoch_*"))


@pytest.mark.parametrize(
    ("cuda", "bfloat16", "precision"),
    [(False, False, "32-true"), (True, True, "bf16-mixed"), (True, False, "16-mixed")],
)
def test_the_best_precision_of_a_machine(manifests, monkeypatch, cuda, bfloat16, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    assert best_precision(small_config(manifests)) == precision


def test_a_schedule_counts_optimizer_steps():
    """10 batches an epoch, by 4: 3 steps. Then 20 batches: 5 steps."""
    restored = {"steps_per_epoch": 10, "epochs_completed": 2, "steps_done": 0, "global_step": 6}
    assert steps_to_shift(restored, 10, 4) == 0
    assert steps_to_shift(restored, 20, 4) == 10 - 6


def of_rank(rank: int, world: int, file: str, projections: torch.Tensor, sizes: list[int]) -> None:
    """Write the mean loss of the ranks, and its gradient, as DistributedDataParallel computes them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}.meeting", rank=rank, world_size=world)
    start = sum(sizes[:rank])
    leaf = projections.clone().requires_grad_()
    views = leaf.unflatten(0, (2, -1))[:, start : start + sizes[rank]].flatten(0, 1)  # both views of this rank's images
    loss = losses.contrastive_loss(views, 0.2, objectives.rows_of_other_ranks(views, 2 * max(sizes)))
    loss.backward()
    torch.distributed.all_reduce(leaf.grad)
    total = loss.detach() * sizes[rank]
    torch.distributed.all_reduce(total)
    if rank == 0:
        save_file({"loss": total / sum(sizes), "gradient": leaf.grad / world}, file)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[3, 3], [4, 2]])
def test_the_contrastive_loss_of_two_devices_is_that_of_one(tmp_path, sizes):
    """Every view is compared with those of all devices. Where a device has fewer images, their gradient weighs more."""
    projections = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    leaf = projections.clone().requires_grad_()
    loss = losses.contrastive_loss(leaf, 0.2)
    loss.backward()
    one = float(loss.detach())
    torch.multiprocessing.spawn(of_rank, (2, str(tmp_path / "found"), projections, sizes), nprocs=2)
    two = load_file(tmp_path / "found")
    assert float(two["loss"]) == pytest.approx(one, rel=1e-5)
    if sizes[0] == sizes[1]:
        assert apart(two["gradient"], leaf.grad) < 1e-4
    assert float(losses.contrastive_loss(projections[[0, 1, 2, 6, 7, 8]], 0.2)) < float(
        one
    )  # alone: an easier question

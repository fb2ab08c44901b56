"""Training: complete in what it writes, honest about bad images."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import SMALL, read_epochs, read_table, small_config
from PIL import Image
from pytorch_lightning.loggers import Logger
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from ear_teacher_cli import EarDataModule, EarTeacherLightningModule, run_folder
from ear_teacher_cli.config import METRIC_LOSSES
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.dataset import EpochSampler
from ear_teacher_cli.errors import EarTeachError, UsageError
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.model.teacher import TeacherModel
from ear_teacher_cli.quality import collapse
from ear_teacher_cli.quality.collapse import health
from ear_teacher_cli.training.run import train

QUIET = Console(quiet=True)


def test_everything_the_original_promises_is_written(run):
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert "last.ckpt" in names and "epoch_0005.ckpt" in names
    assert len([n for n in names if re.fullmatch(r"best-epoch_\d{4}-val_loss_[\d.]+\.ckpt", n)]) == 3
    collages = run / "version_0" / "reconstruction_collages"
    assert sorted(p.name for p in collages.iterdir()) == [f"epoch_{i:04d}.png" for i in range(7)] + ["progress.gif"]
    with Image.open(collages / "progress.gif") as gif:
        assert gif.n_frames == 7
    assert 'backbone = "test_convnext"' in (run / "config.toml").read_text()
    rows = read_epochs(run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]


ORIGINAL_METRICS = [
    "train/loss",
    "train/recon_loss",
    "train/metric_loss",
    "train/lr",
    "val/loss",
    "val/recon_loss",
    "val/metric_loss",
]


def test_tensorboard_holds_every_metric_of_the_original_and_the_collage(run):
    events = EventAccumulator(str(run / "version_0"), size_guidance={"images": 0}).Reload()
    assert set(ORIGINAL_METRICS) <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["reconstruction_collage"]
    assert [event.step for event in events.Images("reconstruction_collage")] == list(range(7))
    rows = read_epochs(run)
    assert set(ORIGINAL_METRICS) <= set(rows[0])
    assert float(rows[-1]["val/loss"]) == pytest.approx(events.Scalars("val/loss")[-1].value, rel=1e-4)


def test_the_loss_is_what_the_weights_say(run):
    for row in read_epochs(run):
        for split in ("train", "val"):
            total = float(row[f"{split}/recon_loss"]) + 0.1 * float(row[f"{split}/metric_loss"])
            assert float(row[f"{split}/loss"]) == pytest.approx(total, rel=1e-3)


def test_it_learns_to_reconstruct(run):
    rows = read_epochs(run)
    assert float(rows[-1]["val/psnr"]) > float(rows[0]["val/psnr"]) + 0.5


def test_the_best_checkpoints_are_the_three_lowest_validation_losses(run):
    losses = sorted(float(row["val/loss"]) for row in read_epochs(run))
    kept = sorted(float(re.search(r"loss_([\d.]+)\.ckpt", p.name)[1]) for p in (run / "checkpoints").glob("best-*"))
    assert kept == pytest.approx(losses[:3], abs=1e-4)
    assert str(run_folder.best_checkpoint(run)).endswith(f"{kept[0]:.4f}.ckpt")


def test_every_checkpoint_loads_without_pickle_and_holds_no_absolute_path(run):
    for path in (run / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)  # noqa: TID251  (the promise itself)
        assert str(run.parent) not in repr({k: content[k] for k in ("callbacks", "earteach", "loops")})
        assert set(content["earteach"]) == {
            "format",
            "version",
            "backbone",
            "embedding_dim",
            "epochs_completed",
            "steps_per_epoch",
            "preprocessing",
            "start",
            "judged_on",
        }


def test_classes_belong_to_images_and_live_in_the_checkpoint(run):
    first, last = (
        read_checkpoint(run / "checkpoints" / name).content["pseudo_classes"]
        for name in ("epoch_0005.ckpt", "last.ckpt")
    )
    assert torch.equal(first["labels"], last["labels"]) and len(first["labels"]) == 24
    assert first["count"] == 6 and set(first["labels"].tolist()) == set(range(6))


def test_an_existing_experiment_is_refused_naming_three_ways_out(run, manifests, earteach):
    said = earteach("train", *manifests, *SMALL, "--output-dir", run.parent)
    assert said.code == 2
    for way in ("earteach resume", "--experiment-name", "--overwrite"):
        assert way in said.err


def test_overwrite_removes_the_run_and_nothing_else(run, manifests, tmp_path):
    copy = shutil.copytree(run, tmp_path / "ear_teacher")
    (copy / "notes.txt").write_text("mine")
    outcome = train(small_config(manifests, output_dir=str(tmp_path), max_epochs=1), QUIET, overwrite=True)
    assert outcome.epochs == 1 and (copy / "notes.txt").read_text() == "mine"
    assert not (copy / "checkpoints" / "epoch_0005.ckpt").exists()


def with_bad_image(ears: Path, into: Path) -> Path:
    copy = shutil.copytree(ears, into / "ears")
    victim = copy / "images" / "p000" / "00.jpg"
    victim.write_bytes(victim.read_bytes()[:500])
    return copy


@pytest.mark.slow
def test_a_bad_image_is_skipped_and_listed(ears, tmp_path):
    copy = with_bad_image(ears, tmp_path)
    paths = ["--train-metadata", str(copy / "train_teacher.npy"), "--val-metadata", str(copy / "val_teacher.npy")]
    outcome = train(small_config(paths, output_dir=str(tmp_path), max_epochs=2, max_bad=0.1), QUIET)
    rows = read_table(outcome.experiment / "bad_images.csv")
    assert [(row["split"], row["row"], row["reason"]) for row in rows] == [("train", "0", "truncated")]
    labels = read_checkpoint(outcome.experiment / "checkpoints" / "last.ckpt").content["pseudo_classes"]["labels"]
    assert labels[0] == -1 and (labels[1:] >= 0).all()


def test_too_many_bad_images_stop_the_run_naming_one(ears, tmp_path):
    copy = with_bad_image(ears, tmp_path)
    paths = ["--train-metadata", str(copy / "train_teacher.npy"), "--val-metadata", str(copy / "val_teacher.npy")]
    with pytest.raises(EarTeachError, match=r"train_teacher\.npy row 0 .*1 of 24 images are unreadable.*--max-bad"):
        train(small_config(paths, output_dir=str(tmp_path), max_epochs=2), QUIET)


def test_a_wrong_root_is_one_line_before_anything_is_written(manifests, tmp_path, earteach):
    said = earteach("train", *manifests, *SMALL, "--root-dir", tmp_path, "--output-dir", tmp_path / "out")
    assert said.code == 1 and "none of its images is under" in said.err and "--root-dir" in said.err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_known_before_the_first_epoch(manifests, tmp_path, earteach):
    (tmp_path / "out").write_text("a file")
    said = earteach("train", *manifests, *SMALL, "--output-dir", tmp_path / "out")
    assert said.code == 1 and "--output-dir" in said.err and "epoch 1" not in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        *({"metric_loss": name} for name in METRIC_LOSSES),
        {"pseudo_classes": "instance"},
        {"pseudo_classes": "fixed"},
        {"pseudo_classes": "batch"},
        {"pseudo_classes": "none"},
        {"pad": False},
    ],
)
def test_every_kind_of_run_trains(manifests, tmp_path, changes):
    outcome = train(small_config(manifests, output_dir=str(tmp_path), max_epochs=1, **changes), QUIET)
    row = read_epochs(outcome.experiment)[0]
    assert ("val/metric_loss" in row) == ("none" not in changes.values())
    assert float(row["train/loss"]) > 0


def test_dry_run_writes_nothing_and_prints_a_config_that_config_reads_back(manifests, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    said = earteach("train", *manifests, *SMALL, "--dry-run", "--seed", 7)
    assert said.code == 0 and "nothing was written" in said.err and "one training step" in said.err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c.toml").write_bytes(said.out)
    again = earteach("train", "--config", "c.toml", "--dry-run", "--learning_rate", "5e-4")
    assert again.code == 0
    assert again.out.decode() == said.out.decode().replace("learning_rate = 0.001", "learning_rate = 0.0005")


PLAIN_TRAINER = dict(
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    log_every_n_steps=1,
)


def test_the_original_python_example_works(manifests, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datamodule = EarDataModule(
        backbone="test_convnext",
        batch_size=8,
        num_workers=0,
        train_metadata=manifests[1],
        val_metadata=manifests[3],
        image_size=64,
    )
    model = EarTeacherLightningModule(
        learning_rate=1e-4, max_epochs=1, pretrained=False, backbone="test_convnext", image_size=64
    )
    trainer = pl.Trainer(max_epochs=1, **PLAIN_TRAINER)
    trainer.fit(model, datamodule=datamodule)
    assert trainer.callback_metrics["val/loss"] > 0
    trainer.save_checkpoint("x.ckpt")
    back = EarTeacherLightningModule.load_from_checkpoint("x.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


def fit_plainly(manifests, tmp_path, **options) -> tuple[pl.Trainer, EarTeacherLightningModule]:
    """Fit with a Trainer that knows nothing of us."""
    config = small_config(manifests, output_dir=str(tmp_path), **options)
    trainer = pl.Trainer(max_epochs=config.max_epochs, **PLAIN_TRAINER)
    module = EarTeacherLightningModule(config)
    trainer.fit(module, datamodule=EarDataModule(config))
    return trainer, module


class Logged(Logger):
    """Keeps what it is given: (step, metrics)."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[int, dict]] = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def test_a_plain_trainer_measures_the_baseline(manifests, tmp_path):
    config = small_config(manifests, output_dir=str(tmp_path), max_epochs=1)
    trainer = pl.Trainer(max_epochs=1, **PLAIN_TRAINER | {"logger": (logged := Logged())})
    module = EarTeacherLightningModule(config)
    trainer.fit(module, datamodule=EarDataModule(config))
    assert {"retrieval", "spread", "effective_rank", "abs_cosine"} <= set(module.baseline)
    assert (0, {f"val/{name}": value for name, value in module.baseline.items()}) in logged.rows
    assert module.verdict[0] in ("in order", "DEGRADED", "COLLAPSED")
    rows, before = module.validation_embeddings, module.baseline_embeddings
    assert rows.index.tolist() == before.index.tolist() == list(range(len(rows.embeddings)))
    assert rows.embeddings.dtype == torch.float32 and (before.epoch, rows.epoch) == (0, 1)
    assert health(before.embeddings).spread == pytest.approx(module.baseline["spread"])


def test_a_plain_trainer_without_validation_has_no_baseline(manifests, tmp_path):
    config = small_config(manifests, output_dir=str(tmp_path), max_epochs=1)
    trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, **PLAIN_TRAINER)
    module = EarTeacherLightningModule(config)
    trainer.fit(module, datamodule=EarDataModule(config))
    assert module.baseline == {} and trainer.callback_metrics["train/loss"] > 0


def test_a_plain_trainer_ends_a_run_that_collapses(manifests, tmp_path, monkeypatch):
    monkeypatch.setattr(collapse, "FALLEN_RANK", 1e9)  # whatever it is, it counts as fallen
    fit_plainly(manifests, tmp_path, max_epochs=1)
    with pytest.raises(EarTeachError, match=r"epoch 1: the embeddings collapse: effective rank .*--metric-weight"):
        fit_plainly(manifests, tmp_path, max_epochs=1, fail_on_collapse=True)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_plain_trainer_skips_steps_without_a_finite_loss_and_the_third_ends_it(
    manifests, tmp_path, monkeypatch, steps
):
    original, calls = TeacherModel.embed_with_maps, 0

    def broken(self, images):
        nonlocal calls
        if self.training and torch.is_grad_enabled():
            calls += 1
            if 2 <= calls < 2 + steps:
                return original(self, torch.full_like(images, float("inf")))
        return original(self, images)

    monkeypatch.setattr(TeacherModel, "embed_with_maps", broken)
    if steps == 2:
        _, module = fit_plainly(manifests, tmp_path, max_epochs=2)
        assert module.guard.nonfinite_steps == []
        assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())
    else:
        with pytest.raises(EarTeachError, match="the 3rd such step in a row; no checkpoint was saved before"):
            fit_plainly(manifests, tmp_path, max_epochs=2)


# What reads a tensor's values on the host: on a GPU, the host then waits for all queued work.
READS = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
}


class HostReads(TorchDispatchMode):
    """Notes the operations that read a tensor's values on the host, with the lines that asked for them."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):  # of which a CPU dispatches nothing
            original = getattr(torch.Tensor, name)
            self.patch.setattr(torch.Tensor, name, lambda *args, name=name, of=original: self._note(name) or of(*args))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def _note(self, what):
        lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "ear_teacher_cli" in f.filename]
        self.found.append(f"{what} at {lines[-1] if lines else '?'}")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        indices = args[1] if operation is torch.ops.aten.index.Tensor else ()
        by_condition = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if operation._schema.name in READS or by_condition:
            self._note(operation)
        return operation(*args, **kwargs or {})


EVERYTHING = dict(
    backbone="test_efficientnet",
    views=2,
    augment=True,
    augmentation="strong",
    decoder_input="map",
    metric_loss="arcface",
    contrastive_weight=1.0,
    consistency_weight=1.0,
    anchor_weight=1.0,
    pretrained=True,
    ema_decay=0.9,
    gradient_clip_val=1.0,
)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("recipe", [dict(metric_loss="arcface"), EVERYTHING], ids=["original", "everything"])
def test_no_training_step_waits_for_a_gpu_before_its_backward_pass(
    manifests, tmp_path, monkeypatch, recipe, accumulated
):
    reads, steps = HostReads(), []
    original, backward = EarTeacherLightningModule.training_step, EarTeacherLightningModule.backward

    def watched(self, batch, batch_idx):
        steps.append(batch_idx)
        with reads:
            return original(self, batch, batch_idx)

    def watched_backward(self, loss, *args, **kwargs):
        with reads:
            backward(self, loss, *args, **kwargs)

    monkeypatch.setattr(EarTeacherLightningModule, "training_step", watched)
    monkeypatch.setattr(EarTeacherLightningModule, "backward", watched_backward)
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), tmp_path / "start.safetensors")
    options = dict(pretrained_path=str(tmp_path / "start.safetensors"), output_dir=str(tmp_path), max_epochs=1)
    train(small_config(manifests, batch_size=4, accumulate_grad_batches=accumulated, **options | recipe), QUIET)
    asked = [] if accumulated == 1 else ["guards.py"] * len(steps)  # accumulated batches have to be asked about at once
    assert len(steps) > 3 and [found.split("/")[-1].split(":")[0] for found in reads.found] == asked, reads.found


def test_a_plain_trainer_stops_at_too_many_unreadable_images(ears, tmp_path):
    copy = with_bad_image(ears, tmp_path)
    paths = ["--train-metadata", str(copy / "train_teacher.npy"), "--val-metadata", str(copy / "val_teacher.npy")]
    with pytest.raises(EarTeachError, match="1 of 24 images are unreadable"):
        fit_plainly(paths, tmp_path, max_epochs=1)


def test_the_outcome_has_the_embeddings_of_the_best_epoch(manifests, tmp_path):
    config = small_config(manifests, output_dir=str(tmp_path), max_epochs=3)
    outcome = train(config, QUIET)
    assert outcome.best_embeddings.epoch == read_checkpoint(outcome.best).epoch
    assert len(outcome.best_embeddings.embeddings) == len(outcome.data.val_set)
    assert outcome.config.experiment_dir == outcome.experiment and outcome.logger.log_dir and outcome.module.baseline


def test_the_original_arguments_make_a_module():
    assert EarDataModule(batch_size=32, num_workers=4).config.batch_size == 32
    assert EarTeacherLightningModule(learning_rate=1e-4, max_epochs=100).model.embedding_dim == 768


def test_the_sampler_is_a_permutation_shared_among_ranks():
    whole = EpochSampler(10, seed=1, shuffle=True)
    whole.set_epoch(3)
    ranks = [EpochSampler(10, seed=1, shuffle=True, rank=r, world=2) for r in range(2)]
    for sampler in ranks:
        sampler.set_epoch(3)
    order = list(whole)
    assert sorted(draw.index for draw in order) == list(range(10))
    assert [draw for pair in zip(*ranks, strict=True) for draw in pair] == order
    other = EpochSampler(10, seed=1, shuffle=True)
    other.set_epoch(4)
    assert list(other) != order


def test_an_experiment_name_with_a_slash_is_refused(manifests):
    with pytest.raises(UsageError, match="plain folder name"):
        small_config(manifests, experiment_name="../x")


def test_hflip_alone_flips_and_does_nothing_else():
    from ear_teacher_cli.data.augment import Augment
    from ear_teacher_cli.data.preprocessing import preprocessing_of

    plain = preprocessing_of("test_convnext", 64, 0.1, True)
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert torch.equal(Augment(plain, policy=False, hflip=1.0)(pixels, 5), pixels.flip(2))
    assert torch.equal(Augment(plain, policy=False, hflip=0.0)(pixels, 5), pixels)
    varied = Augment(plain)
    assert torch.equal(varied(pixels, 5), varied(pixels, 5)) and not torch.equal(varied(pixels, 5), varied(pixels, 6))


def test_crops_of_another_kind_than_the_models_are_refused(manifests, tmp_path):
    datamodule = EarDataModule(
        train_metadata=manifests[1],
        val_metadata=manifests[3],
        image_size=64,
        num_workers=0,
        pad=False,
        backbone="test_convnext",
    )
    model = EarTeacherLightningModule(pretrained=False, backbone="test_convnext", image_size=64)
    trainer = pl.Trainer(max_epochs=1, **PLAIN_TRAINER)
    with pytest.raises(EarTeachError, match="are not the model's"):
        trainer.fit(model, datamodule=datamodule)


def test_validation_without_a_readable_image_is_our_error(ears, tmp_path):
    copy = shutil.copytree(ears, tmp_path / "ears")
    for name in ("bad.jpg", "worse.jpg"):
        (copy / name).write_bytes(b"no")
    (copy / "val.csv").write_text("image_path\nbad.jpg\nworse.jpg\n")
    paths = ["--train-metadata", str(copy / "train_teacher.npy"), "--val-metadata", str(copy / "val.csv")]
    with pytest.raises(EarTeachError, match="validation images"):
        train(small_config(paths, output_dir=str(tmp_path), max_epochs=1, max_bad=1.0), QUIET)


def test_a_wrapped_sampler_is_left_alone_by_lightning():
    from torch.utils.data import DistributedSampler

    assert isinstance(EpochSampler(10, seed=1, shuffle=True), DistributedSampler)


def test_a_module_from_a_checkpoint_keeps_its_weights_in_a_new_fit(run, manifests, tmp_path):
    """Fitted anew it starts from what it learned, not from the pretrained file, and makes its own classes."""
    content = read_checkpoint(run / "checkpoints" / "last.ckpt").content
    content["hyper_parameters"] |= {"pretrained": True, "pretrained_path": str(tmp_path / "not there.pth")}
    torch.save(content, tmp_path / "x.ckpt")
    model = EarTeacherLightningModule.load_from_checkpoint(tmp_path / "x.ckpt")
    options = dict(backbone="test_convnext", image_size=64, batch_size=8, num_workers=0)
    other = EarDataModule(
        train_metadata=manifests[3], val_metadata=manifests[3], allow_overlap=True, **options
    )  # 8 images: 2 classes, not 6
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0, **PLAIN_TRAINER)
    trainer.fit(model, datamodule=other)
    for name, tensor in read_checkpoint(run / "checkpoints" / "last.ckpt").model_state.items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    assert len(model.prototypes) == 2


@pytest.mark.slow
@pytest.mark.skipif(" " in tempfile.gettempdir(), reason="torch's inductor does not compile in a folder with a space")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="torch 2.15 writes C++ without its vectors that does not compile",
)
def test_a_compiled_model_learns_the_same_to_rounding(manifests, tmp_path, earteach):
    # classes that no rounding moves (an image between two clusters may go to either), and small steps: Adam's first
    # ones make much of gradients that are nothing but rounding
    words = ["train", *manifests, *SMALL, "--pseudo-classes", "fixed", "--learning-rate", "1e-5"]
    words += ["--num-collage-samples", 8]  # batches of one size, so that nothing is compiled twice
    words += ["--max-epochs", 1, "--output-dir", tmp_path, "--experiment-name"]
    assert earteach(*words, "plain").code == 0
    assert earteach(*words, "compiled", "--compile").code == 0
    plain, compiled = (read_epochs(tmp_path / name) for name in ("plain", "compiled"))
    for name in ("train/loss", "val/recon_loss", "val/psnr"):
        assert float(compiled[0][name]) == pytest.approx(float(plain[0][name]), rel=0.01), name
    weights = [
        read_checkpoint(run_folder.last_checkpoint(tmp_path / name)).backbone_state for name in ("plain", "compiled")
    ]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.slow
def test_a_missing_compiler_is_one_line(manifests, tmp_path):
    words = ["train", *manifests, *SMALL, "--max-epochs", 1, "--output-dir", tmp_path, "--compile"]
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    command = [sys.executable, "-m", "ear_teacher_cli", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"\nearteach: --compile: needs a working compiler[^\n]*\n$", done.stderr), done.stderr


@pytest.mark.slow
def test_folders_of_identities_give_classes_and_a_monitor(ears, tmp_path, earteach):
    rows = read_table(ears / "eval.csv")
    for number, row in enumerate(rows):
        folder = tmp_path / "crops" / row["identity"]
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(ears / row["image_path"]) as photo:
            box = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
            photo.convert("RGB").crop(box).save(folder / f"{number}.png")
    crops = tmp_path / "crops"
    said = earteach(
        "train", "--train-metadata", crops, "--val-metadata", crops, "--output-dir", tmp_path / "o", "--max-epochs", "1",
        *SMALL, "--pseudo-classes", "identity", "--monitor", "val/rank1", "--report", "--allow-overlap",
    )  # fmt: skip
    assert said.code == 0, said.err
    people = len({row["identity"] for row in rows})
    assert f"{people} pseudo-classes (identity: the names of the folders)" in said.err
    assert "best-epoch_0001-val_rank1" in said.err and "rank-1" in said.err
    assert '<th class="number">baseline</th>' in (tmp_path / "o" / "ear_teacher" / "report.html").read_text()

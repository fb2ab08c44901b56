"""Training: exact on resume, complete in what it writes, honest about bad pictures."""

import csv
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import SMALL, small_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ear_teacher_cli import EarDataModule, EarTeacherLightningModule
from ear_teacher_cli.commands.train import resume, train
from ear_teacher_cli.core import runs
from ear_teacher_cli.core.checkpoint import read_checkpoint
from ear_teacher_cli.core.schedule import rate_at
from ear_teacher_cli.data.dataset import EpochSampler
from ear_teacher_cli.errors import EarTeachError, WordsError
from ear_teacher_cli.talk import Talk

QUIET = Talk(quiet=True)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights_of(experiment: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(experiment / "checkpoints" / "last.ckpt").content["state_dict"]


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights_of(first), weights_of(second)
    assert set(a) == set(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def copy_back_to(run: Path, epoch: int, into: Path) -> Path:
    """A copy of a run as if it had been killed after `epoch`: its periodic checkpoint is the last one."""
    copy = shutil.copytree(run, into / "copy")
    for path in (copy / "checkpoints").iterdir():
        if path.name != f"epoch_{epoch:04d}.ckpt":
            path.unlink()
    return copy


def test_everything_the_seed_promises_is_written(run):
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert "last.ckpt" in names and "epoch_0005.ckpt" in names
    assert len([n for n in names if re.fullmatch(r"best-epoch_\d{4}-val_loss_[\d.]+\.ckpt", n)]) == 3
    collages = run / "version_0" / "reconstruction_collages"
    assert sorted(p.name for p in collages.iterdir()) == [f"epoch_{i:04d}.png" for i in range(7)] + ["progress.gif"]
    with Image.open(collages / "progress.gif") as gif:
        assert gif.n_frames == 7
    assert 'backbone = "test_convnext"' in (run / "config.toml").read_text()
    rows = read_table(run / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]


SEED_METRICS = [
    "train/loss",
    "train/recon_loss",
    "train/metric_loss",
    "train/lr",
    "val/loss",
    "val/recon_loss",
    "val/metric_loss",
]


def test_tensorboard_holds_every_metric_of_the_seed_and_the_collage(run):
    events = EventAccumulator(str(run / "version_0"), size_guidance={"images": 0}).Reload()
    assert set(SEED_METRICS) <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["reconstruction_collage"]
    assert [event.step for event in events.Images("reconstruction_collage")] == list(range(7))
    rows = read_table(run / "metrics.csv")
    assert set(SEED_METRICS) <= set(rows[0])
    assert float(rows[-1]["val/loss"]) == pytest.approx(events.Scalars("val/loss")[-1].value, rel=1e-4)


def test_the_loss_is_what_the_weights_say(run):
    for row in read_table(run / "metrics.csv"):
        for split in ("train", "val"):
            total = float(row[f"{split}/recon_loss"]) + 0.1 * float(row[f"{split}/metric_loss"])
            assert float(row[f"{split}/loss"]) == pytest.approx(total, rel=1e-3)


def test_it_learns_to_reconstruct(run):
    rows = read_table(run / "metrics.csv")
    assert float(rows[-1]["val/psnr"]) > float(rows[0]["val/psnr"]) + 0.5


def test_the_best_checkpoints_are_the_three_lowest_validation_losses(run):
    losses = sorted(float(row["val/loss"]) for row in read_table(run / "metrics.csv"))
    kept = sorted(float(re.search(r"loss_([\d.]+)\.ckpt", p.name)[1]) for p in (run / "checkpoints").glob("best-*"))
    assert kept == pytest.approx(losses[:3], abs=1e-4)
    assert str(runs.best_checkpoint(run)).endswith(f"{kept[0]:.4f}.ckpt")


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
        }


def test_classes_belong_to_pictures_and_live_in_the_checkpoint(run):
    first, last = (
        read_checkpoint(run / "checkpoints" / name).content["pseudo_classes"]
        for name in ("epoch_0005.ckpt", "last.ckpt")
    )
    assert torch.equal(first["labels"], last["labels"]) and len(first["labels"]) == 24
    assert first["count"] == 6 and set(first["labels"].tolist()) == set(range(6))


def test_a_run_is_the_same_twice_and_with_more_workers(run, manifests, tmp_path):
    again = train(small_config(manifests, output_dir=str(tmp_path), max_epochs=6, num_workers=2), QUIET)
    assert_same_weights(run, again.experiment)


def test_resumed_is_uninterrupted_bit_for_bit(run, tmp_path):
    copy = copy_back_to(run, 5, tmp_path)
    outcome = resume(copy, QUIET)
    assert outcome.epochs == 6
    assert_same_weights(run, copy)
    assert (copy / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_resume_is_exact_with_augmentation_stochastic_depth_and_a_new_round_of_classes(manifests, tmp_path):
    options = dict(augment=True, hflip=0.5, cluster_every=3, max_epochs=7, backbone="test_convnext2")
    whole = train(small_config(manifests, output_dir=str(tmp_path), experiment_name="whole", **options), QUIET)
    classes = [
        read_checkpoint(p).content["pseudo_classes"]["round"]
        for p in (whole.experiment / "checkpoints" / n for n in ("epoch_0005.ckpt", "last.ckpt"))
    ]
    assert classes == [1, 1]
    copy = copy_back_to(whole.experiment, 5, tmp_path)
    resume(copy, QUIET)
    assert_same_weights(whole.experiment, copy)


def test_a_finished_run_says_so_and_does_nothing(run, earteach):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    said = earteach("resume", run)
    assert said.code == 0 and "finished, all 6 epochs are done" in said.err
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_resume_to_more_epochs(run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "moved")
    said = earteach("resume", copy, "--max-epochs", 7)
    assert said.code == 0, said.err
    assert "restored last.ckpt: epoch 6 of 6, step 18" in said.err and "6 pseudo-classes (round 0)" in said.err
    assert read_checkpoint(copy / "checkpoints" / "last.ckpt").epoch == 7
    assert [row["epoch"] for row in read_table(copy / "metrics.csv")] == list("1234567")
    assert earteach("resume", copy, "--max-epochs", 3).code == 2
    # the memory of the three best moved with the folder
    assert len(list((copy / "checkpoints").glob("best-*"))) == 3


def test_resume_refuses_a_changed_manifest(run, ears, tmp_path, earteach):
    copy = copy_back_to(run, 5, tmp_path)
    path = copy / "checkpoints" / "epoch_0005.ckpt"
    content = read_checkpoint(path).content
    content["hyper_parameters"]["train_metadata"] = str(ears / "eval.csv")
    torch.save(content, path)
    said = earteach("resume", copy)
    assert said.code == 1 and "manifest has changed" in said.err


def interrupted(words: list, when: str, patience: float = 120) -> tuple[int, str]:
    """Start `earteach`, send Ctrl-C as soon as `when` is said; (exit code, everything said)."""
    said, deadline = "", time.monotonic() + patience
    with subprocess.Popen(
        [sys.executable, "-m", "ear_teacher_cli", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for line in process.stderr:
            said += line
            if re.match(when, line) and process.poll() is None:
                process.send_signal(signal.SIGINT)
                when = "never again"
            assert time.monotonic() < deadline
    return process.returncode, said


def test_ctrl_c_then_resume_is_the_uninterrupted_run(run, manifests, tmp_path, earteach):
    words = ["train", *manifests, *SMALL, "--max-epochs", 6, "--output-dir", tmp_path]
    code, said = interrupted(words, "epoch 2/6: train")
    assert code == 130, said
    assert "Traceback" not in said and f"earteach resume {tmp_path}" in said
    folder = tmp_path / "ear_teacher"
    assert not list(folder.rglob("*.part"))
    said = earteach("resume", folder)
    assert said.code == 0 and "restored last.ckpt" in said.err
    assert_same_weights(run, folder)


def test_ctrl_c_before_the_first_epoch_is_done_loses_nothing(run, manifests, tmp_path, earteach):
    words = ["train", *manifests, *SMALL, "--max-epochs", 6, "--output-dir", tmp_path]
    code, said = interrupted(words, "data:")
    assert code == 130, said
    folder = tmp_path / "ear_teacher"
    if not folder.exists():  # so early that nothing was written: the same words start it
        assert earteach(*words).code == 0
    else:
        assert earteach("resume", folder).code == 0
    assert_same_weights(run, folder)


def test_two_processes_find_the_same_classes_and_resume_as_one(run, manifests, tmp_path, earteach):
    """DistributedDataParallel over gloo on the CPU: the code path of several GPUs."""
    words = ["train", *manifests, *SMALL, "--batch-size", 4, "--max-epochs", 1, "--output-dir", tmp_path]
    words += ["--devices", 2, "--accelerator", "cpu"]
    command = [sys.executable, "-m", "ear_teacher_cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("epoch 1/1: train") == 1
    one, two = (read_checkpoint(p / "checkpoints" / "last.ckpt").content for p in (run, tmp_path / "ear_teacher"))
    assert torch.equal(one["pseudo_classes"]["labels"], two["pseudo_classes"]["labels"])
    assert two["global_step"] == 3  # 24 pictures, 2 x 4 at a time
    said = earteach("resume", tmp_path / "ear_teacher", "--devices", 1, "--max-epochs", 2)
    assert said.code == 0 and "2 epochs" in said.err, said.err


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


def with_bad_picture(ears: Path, into: Path) -> Path:
    copy = shutil.copytree(ears, into / "ears")
    victim = copy / "images" / "p000" / "00.jpg"
    victim.write_bytes(victim.read_bytes()[:500])
    return copy


def test_a_bad_picture_is_skipped_and_listed(ears, tmp_path):
    copy = with_bad_picture(ears, tmp_path)
    paths = ["--train-metadata", str(copy / "train_teacher.npy"), "--val-metadata", str(copy / "val_teacher.npy")]
    outcome = train(small_config(paths, output_dir=str(tmp_path), max_epochs=2, max_bad=0.1), QUIET)
    rows = read_table(outcome.experiment / "bad_images.csv")
    assert [(row["split"], row["row"], row["reason"]) for row in rows] == [("train", "0", "truncated")]
    labels = read_checkpoint(outcome.experiment / "checkpoints" / "last.ckpt").content["pseudo_classes"]["labels"]
    assert labels[0] == -1 and (labels[1:] >= 0).all()


def test_too_many_bad_pictures_stop_the_run_naming_one(ears, tmp_path):
    copy = with_bad_picture(ears, tmp_path)
    paths = ["--train-metadata", str(copy / "train_teacher.npy"), "--val-metadata", str(copy / "val_teacher.npy")]
    with pytest.raises(EarTeachError, match=r"train_teacher\.npy row 0 .*1 of 24 pictures are bad.*--max-bad"):
        train(small_config(paths, output_dir=str(tmp_path), max_epochs=2), QUIET)


def test_a_wrong_root_is_one_line_before_anything_is_written(manifests, tmp_path, earteach):
    said = earteach("train", *manifests, *SMALL, "--root-dir", tmp_path, "--output-dir", tmp_path / "out")
    assert said.code == 1 and "none of its pictures is under" in said.err and "--root-dir" in said.err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_known_before_the_first_epoch(manifests, tmp_path, earteach):
    (tmp_path / "out").write_text("a file")
    said = earteach("train", *manifests, *SMALL, "--output-dir", tmp_path / "out")
    assert said.code == 1 and "--output-dir" in said.err and "epoch 1" not in said.err


@pytest.mark.parametrize(
    "changes",
    [
        {"metric_loss": "cosface"},
        {"metric_loss": "none"},
        {"pseudo_classes": "instance"},
        {"pseudo_classes": "fixed"},
        {"pad": False},
    ],
)
def test_every_kind_of_run_trains(manifests, tmp_path, changes):
    outcome = train(small_config(manifests, output_dir=str(tmp_path), max_epochs=1, **changes), QUIET)
    row = read_table(outcome.experiment / "metrics.csv")[0]
    assert ("val/metric_loss" in row) == (changes.get("metric_loss") != "none")
    assert float(row["train/loss"]) > 0


def test_dry_run_writes_nothing_and_prints_a_config_that_config_reads_back(manifests, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    said = earteach("train", *manifests, *SMALL, "--dry-run", "--seed", 7)
    assert said.code == 0 and "nothing was written" in said.err and "one step forward and back" in said.err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c.toml").write_bytes(said.out)
    again = earteach("train", "--config", "c.toml", "--dry-run", "--learning_rate", "5e-4")
    assert again.code == 0
    assert again.out.decode() == said.out.decode().replace("learning_rate = 0.001", "learning_rate = 0.0005")


def test_the_seeds_python_example_works(manifests, tmp_path, monkeypatch):
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
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=datamodule)
    assert trainer.callback_metrics["val/loss"] > 0
    trainer.save_checkpoint("x.ckpt")
    back = EarTeacherLightningModule.load_from_checkpoint("x.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_seeds_own_arguments_make_a_module():
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
    with pytest.raises(WordsError, match="plain folder name"):
        small_config(manifests, experiment_name="../x")


def test_a_stray_checkpoint_is_not_resumed_into_the_folder_it_lies_in(run, tmp_path, earteach):
    (tmp_path / "config.toml").write_text("mine = true\n")
    shutil.copy(run / "checkpoints" / "epoch_0005.ckpt", tmp_path / "x.ckpt")
    said = earteach("resume", tmp_path / "x.ckpt")
    assert said.code == 2 and "give the experiment folder" in said.err
    assert (tmp_path / "config.toml").read_text() == "mine = true\n" and len(list(tmp_path.iterdir())) == 2


def test_an_earlier_checkpoint_does_not_mix_two_branches(run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "copy")
    said = earteach("resume", copy / "checkpoints" / "epoch_0005.ckpt", "--max-epochs", 8)
    assert said.code == 2 and "has gone on to 6" in said.err


def test_resume_elsewhere_says_where_the_paths_start(run, tmp_path, monkeypatch, earteach):
    copy = copy_back_to(run, 5, tmp_path)
    path = copy / "checkpoints" / "epoch_0005.ckpt"
    content = read_checkpoint(path).content
    content["hyper_parameters"]["train_metadata"] = "data/gone.npy"
    torch.save(content, path)
    said = earteach("resume", copy)
    assert said.code == 1 and "the folder where it was trained" in said.err


def test_hflip_alone_flips_and_does_nothing_else():
    from ear_teacher_cli.data.augment import Augment
    from ear_teacher_cli.data.pixels import preprocessing_of

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
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(EarTeachError, match="are not the model's"):
        trainer.fit(model, datamodule=datamodule)


def test_validation_without_a_readable_picture_is_our_error(ears, tmp_path):
    copy = shutil.copytree(ears, tmp_path / "ears")
    (copy / "bad.jpg").write_bytes(b"no")
    (copy / "val.csv").write_text("image_path\nbad.jpg\n")
    paths = ["--train-metadata", str(copy / "train_teacher.npy"), "--val-metadata", str(copy / "val.csv")]
    with pytest.raises(EarTeachError, match="validation pictures"):
        train(small_config(paths, output_dir=str(tmp_path), max_epochs=1, max_bad=1.0), QUIET)


def test_a_schedule_goes_on_from_the_same_epoch_on_other_devices(run, tmp_path, manifests):
    """Half the steps an epoch (as on twice the devices): the learning rate follows the epoch, not the step."""
    copy = copy_back_to(run, 5, tmp_path)
    path = copy / "checkpoints" / "epoch_0005.ckpt"
    content = read_checkpoint(path).content
    content["hyper_parameters"]["batch_size"] = 4  # 6 steps an epoch instead of 3
    torch.save(content, path)
    resume(copy, QUIET)
    rates = [float(row["train/lr"]) for row in read_table(copy / "metrics.csv")]
    whole = [float(row["train/lr"]) for row in read_table(run / "metrics.csv")]
    assert rates[-1] == pytest.approx(1e-3 * rate_at(35, 7, 36), rel=1e-3)  # the last of 6 x 6 steps
    assert whole[-1] == pytest.approx(1e-3 * rate_at(17, 3, 18), rel=1e-3)


def test_a_wrapped_sampler_is_left_alone_by_lightning():
    from torch.utils.data import DistributedSampler

    assert isinstance(EpochSampler(10, seed=1, shuffle=True), DistributedSampler)

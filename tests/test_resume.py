"""Stopped and resumed is the uninterrupted run: after Ctrl-C, elsewhere, on other devices."""

import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import SMALL, metrics_of, read_epochs, small_config

from ear_teacher_cli.console import Console
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.quality.reconstruction import REFERENCES
from ear_teacher_cli.training.optimisation import rate_at
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)


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


@pytest.mark.slow
def test_a_run_is_the_same_twice_and_with_more_workers(run, manifests, tmp_path):
    again = train(small_config(manifests, output_dir=str(tmp_path), max_epochs=6, num_workers=2), QUIET)
    assert_same_weights(run, again.experiment)


@pytest.mark.slow
def test_resumed_is_uninterrupted_bit_for_bit(run, tmp_path):
    copy = copy_back_to(run, 5, tmp_path)
    outcome = resume(copy, QUIET)
    assert outcome.epochs == 6
    assert_same_weights(run, copy)
    assert metrics_of(copy) == metrics_of(run)


@pytest.mark.slow
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
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    said = earteach("resume", run)
    assert said.code == 0 and "finished, all 6 epochs are done" in said.err
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}


@pytest.mark.slow
def test_resume_to_more_epochs(run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "moved")
    said = earteach("resume", copy, "--max-epochs", 7)
    assert said.code == 0, said.err
    assert "restored: last.ckpt: epoch 6 of 6, step 18" in said.err and "6 pseudo-classes (round 0)" in said.err
    assert read_checkpoint(copy / "checkpoints" / "last.ckpt").epoch == 7
    assert [row["epoch"] for row in read_epochs(copy)] == list("1234567")
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
    with forked.Popen([sys.executable, "-m", "ear_teacher_cli", *words], stderr=forked.PIPE, text=True) as process:
        for line in process.stderr:
            said += line
            if re.match(when, line) and process.poll() is None:
                process.send_signal(signal.SIGINT)
                when = "never again"
            assert time.monotonic() < deadline
    return process.returncode, said


@pytest.mark.slow
def test_ctrl_c_then_resume_is_the_uninterrupted_run(run, manifests, tmp_path, earteach):
    words = ["train", *manifests, *SMALL, "--max-epochs", 6, "--output-dir", tmp_path]
    code, said = interrupted(words, "epoch 2/6: train")
    assert code == 130, said
    assert "Traceback" not in said and f"earteach resume {shlex.quote(str(tmp_path / 'ear_teacher'))}" in said
    folder = tmp_path / "ear_teacher"
    assert not list(folder.rglob("*.part"))
    said = earteach("resume", folder)
    assert said.code == 0 and "restored: last.ckpt" in said.err
    assert_same_weights(run, folder)


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_processes_find_the_same_classes_and_resume_as_one(run, manifests, tmp_path, earteach):
    """DistributedDataParallel over gloo on the CPU: the code path of several GPUs."""
    words = ["train", *manifests, *SMALL, "--batch-size", 4, "--max-epochs", 1, "--output-dir", tmp_path]
    # the whole recipe: two views, averages, whitening on one rank, held-out embeddings gathered from both
    words += ["--devices", 2, "--accelerator", "cpu", "--preset", "recommended", "--ema-decay", 0.9]
    command = [sys.executable, "-m", "ear_teacher_cli", *map(str, words)]
    done = forked.run(command)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("epoch 1/1: train") == 1
    one, two = (read_checkpoint(p / "checkpoints" / "last.ckpt").content for p in (run, tmp_path / "ear_teacher"))
    assert torch.equal(one["pseudo_classes"]["labels"], two["pseudo_classes"]["labels"])
    assert two["global_step"] == 3  # 24 images, 2 x 4 at a time
    assert two["whitening"]["mean"].isfinite().all() and two["earteach"]["start"]["effective_rank"] > 1
    for name in REFERENCES:  # each process measured half of the images
        assert two["earteach"]["start"][name] == pytest.approx(one["earteach"]["start"][name], rel=1e-5), name
    said = earteach("resume", tmp_path / "ear_teacher", "--devices", 1, "--max-epochs", 2)
    assert said.code == 0 and "2 epochs" in said.err, said.err


def test_a_stray_checkpoint_is_not_resumed_into_the_folder_it_lies_in(run, tmp_path, earteach):
    (tmp_path / "config.toml").write_text("mine = true\n")
    shutil.copy(run / "checkpoints" / "epoch_0005.ckpt", tmp_path / "x.ckpt")
    said = earteach("resume", tmp_path / "x.ckpt")
    assert said.code == 2 and "give the experiment folder" in said.err
    assert (tmp_path / "config.toml").read_text() == "mine = true\n" and len(list(tmp_path.iterdir())) == 2


def test_an_earlier_checkpoint_does_not_mix_two_branches(run, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "copy")
    said = earteach("resume", copy / "checkpoints" / "epoch_0005.ckpt", "--max-epochs", 8)
    assert said.code == 2 and "has reached 6" in said.err


def test_resume_elsewhere_says_where_the_paths_start(run, tmp_path, monkeypatch, earteach):
    copy = copy_back_to(run, 5, tmp_path)
    path = copy / "checkpoints" / "epoch_0005.ckpt"
    content = read_checkpoint(path).content
    content["hyper_parameters"]["train_metadata"] = "data/gone.npy"
    torch.save(content, path)
    said = earteach("resume", copy)
    assert said.code == 1 and "the folder where it was trained" in said.err


@pytest.mark.slow
def test_a_schedule_goes_on_from_the_same_epoch_on_other_devices(run, tmp_path, manifests):
    """Half the steps an epoch (as on twice the devices): the learning rate follows the epoch, not the step."""
    copy = copy_back_to(run, 5, tmp_path)
    path = copy / "checkpoints" / "epoch_0005.ckpt"
    content = read_checkpoint(path).content
    content["hyper_parameters"]["batch_size"] = 4  # 6 steps an epoch instead of 3
    torch.save(content, path)
    resume(copy, QUIET)
    rates = [float(row["train/lr"]) for row in read_epochs(copy)]
    whole = [float(row["train/lr"]) for row in read_epochs(run)]
    assert rates[-1] == pytest.approx(1e-3 * rate_at(35, 7, 36), rel=1e-3)  # the last of 6 x 6 steps
    assert whole[-1] == pytest.approx(1e-3 * rate_at(17, 3, 18), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"num_workers": 2, "augment": True}])
def test_resume_is_exact_with_worker_processes(manifests, tmp_path, changes):
    options = dict(max_epochs=7, batch_size=4, **changes)
    whole = train(small_config(manifests, output_dir=str(tmp_path), experiment_name="whole", **options), QUIET)
    copy = copy_back_to(whole.experiment, 5, tmp_path)
    resume(copy, QUIET)
    assert_same_weights(whole.experiment, copy)

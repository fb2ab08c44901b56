"""Checkpoints are written in the background: whole, in order, as they were when they were saved."""

import threading

import pytest
import torch
from conftest import read_epochs, small_config
from test_resume import assert_same_weights

from ear_teacher_cli import EarTeacherLightningModule
from ear_teacher_cli.console import Console
from ear_teacher_cli.errors import EarTeachError
from ear_teacher_cli.model.checkpoint import read_torch
from ear_teacher_cli.training import checkpoints
from ear_teacher_cli.training.checkpoints import BackgroundCheckpointIO
from ear_teacher_cli.training.run import train

QUIET = Console(quiet=True)


def content(step: int, value: float = 0.0) -> dict:
    """What a file of this step holds."""
    return {"global_step": step, "epoch": 0, "earteach": {}, "weights": [torch.full((3,), value)]}


@pytest.fixture
def files():
    made = BackgroundCheckpointIO()
    yield made
    made.teardown()


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this event is set."""
    write, release = checkpoints.write_checkpoint, threading.Event()

    def waiting(checkpoint, path):
        assert release.wait(60)
        write(checkpoint, path)

    monkeypatch.setattr(checkpoints, "write_checkpoint", waiting)
    yield release
    release.set()


def test_the_file_holds_what_was_saved_although_training_went_on(files, held, tmp_path):
    saved = content(1, 5.0)
    files.save_checkpoint(saved, str(tmp_path / "a.ckpt"))
    saved["weights"][0].fill_(6.0)
    saved["global_step"] = 2
    assert not (tmp_path / "a.ckpt").exists()
    held.set()
    files.finish()
    found = read_torch(tmp_path / "a.ckpt")
    assert found["weights"][0].tolist() == [5.0] * 3 and found["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_checkpoints_of_one_step_are_one_file(files, tmp_path):
    for name, step in (("a", 1), ("b", 1), ("c", 2)):
        files.save_checkpoint(content(step), str(tmp_path / name))
    files.finish()
    assert (tmp_path / "a").samefile(tmp_path / "b") and not (tmp_path / "b").samefile(tmp_path / "c")


def test_without_hard_links_every_file_is_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "link_file", lambda existing, path: False)
    for name in ("a", "b"):
        files.save_checkpoint(content(1, 2.0), str(tmp_path / name))
    files.finish()
    assert not (tmp_path / "a").samefile(tmp_path / "b")
    assert read_torch(tmp_path / "b")["weights"][0].tolist() == [2.0] * 3


def test_an_old_checkpoint_is_removed_after_the_new_one_is_complete(files, held, tmp_path):
    (tmp_path / "old").write_bytes(b"x")
    files.save_checkpoint(content(1), str(tmp_path / "new"))
    files.remove_checkpoint(str(tmp_path / "old"))
    assert (tmp_path / "old").exists() and not (tmp_path / "new").exists()
    held.set()
    files.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_nothing_is_removed_after_a_checkpoint_that_could_not_be_written(files, held, tmp_path, monkeypatch):
    def fails(checkpoint, path):
        held.wait(60)
        raise EarTeachError("disk: is full")

    monkeypatch.setattr(checkpoints, "write_checkpoint", fails)
    (tmp_path / "old").write_bytes(b"x")
    files.save_checkpoint(content(1), str(tmp_path / "new"))
    files.remove_checkpoint(str(tmp_path / "old"))
    held.set()
    with pytest.raises(EarTeachError, match="disk: is full"):
        files.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_tensors_with_the_same_memory_are_written_once(files, tmp_path):
    weight = torch.rand(1000)
    saved = content(1) | {"a": {"w": weight, "transposed": weight.view(10, 100).T}, "b": {"w": weight.detach()}}
    files.save_checkpoint(saved, str(tmp_path / "x"))
    files.finish()
    found = read_torch(tmp_path / "x")
    assert torch.equal(found["b"]["w"], weight) and torch.equal(found["a"]["transposed"], weight.view(10, 100).T)
    assert found["a"]["w"].data_ptr() == found["b"]["w"].data_ptr()
    assert (tmp_path / "x").stat().st_size < 3 * weight.nbytes


def test_a_copy_is_of_the_same_kind(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    made = checkpoints.copied({"state": state, "list": [1, (state["weight"],)]})
    assert type(made["state"]) is type(state) and made["state"]._metadata == state._metadata
    assert list(made["state"]) == list(state) and made["list"][1][0] is made["state"]["weight"]
    assert made["state"]["weight"].data_ptr() != state["weight"].data_ptr()


def test_what_is_written_is_forgotten(files, tmp_path):
    files.save_checkpoint(content(1), str(tmp_path / "a"))
    files.wait()
    assert files._copy is not None  # for another file of the same step
    files.raise_error()
    assert files._copy is None


def test_one_checkpoint_at_most_waits_in_memory(files, held, tmp_path):
    files.save_checkpoint(content(1), str(tmp_path / "a"))
    second = threading.Thread(target=files.save_checkpoint, args=(content(2), str(tmp_path / "b")))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # it waits for the first
    held.set()
    second.join(60)
    files.finish()
    assert not second.is_alive() and {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("call", ["save_checkpoint", "raise_error", "finish"])
def test_an_error_is_raised_by_the_next_call(files, tmp_path, monkeypatch, call):
    def fails(checkpoint, path):
        raise EarTeachError("disk: is full")

    monkeypatch.setattr(checkpoints, "write_checkpoint", fails)
    files.save_checkpoint(content(1), str(tmp_path / "a"))
    files.wait()
    with pytest.raises(EarTeachError, match="disk: is full"):
        getattr(files, call)(*((content(2), str(tmp_path / "b")) if call == "save_checkpoint" else ()))
    files.finish()  # and once


def test_a_run_trains_on_while_its_checkpoint_is_written_and_ends_with_it_complete(manifests, tmp_path, monkeypatch):
    whole = train(small_config(manifests, output_dir=str(tmp_path / "whole"), max_epochs=2), QUIET).experiment
    write, release, meanwhile = checkpoints.write_checkpoint, threading.Event(), []
    original = EarTeacherLightningModule.training_step

    def waiting(checkpoint, path):
        if checkpoint["epoch"] == 0:
            assert release.wait(60)
        write(checkpoint, path)

    def step(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 1:
            meanwhile.append((tmp_path / "slow" / "ear_teacher" / "checkpoints" / "last.ckpt").exists())
            release.set()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(checkpoints, "write_checkpoint", waiting)
    monkeypatch.setattr(EarTeacherLightningModule, "training_step", step)
    outcome = train(small_config(manifests, output_dir=str(tmp_path / "slow"), max_epochs=2), QUIET)
    assert meanwhile == [False]
    assert read_epochs(outcome.experiment) == read_epochs(whole)
    assert_same_weights(whole, outcome.experiment)


def test_a_disk_that_fills_up_ends_the_run_at_the_next_step(manifests, tmp_path, monkeypatch):
    def fails(checkpoint, path):
        raise EarTeachError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(checkpoints, "write_checkpoint", fails)
    with pytest.raises(EarTeachError, match="No space left on device"):
        train(small_config(manifests, output_dir=str(tmp_path), max_epochs=50), QUIET)
    rows = read_epochs(tmp_path / "ear_teacher")
    assert len(rows) == 1

"""SIGTERM and Ctrl-C save in the middle of an epoch; one run at a time; what a killed run leaves is found and used."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, metrics_of, read_table, small_config
from test_resume import assert_same_weights

from ear_teacher_cli.console import Console
from ear_teacher_cli.data.dataset import EpochSampler
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.training import interruption
from ear_teacher_cli.training.callbacks import FitWhitening
from ear_teacher_cli.training.module import EarTeacherLightningModule
from ear_teacher_cli.training.pseudo_labels import PseudoLabels
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)
RECIPES = {
    "plain": dict(max_epochs=3),
    # two views, a moving average, whitening, augmentation in two processes, a new round of classes
    "whole": dict(
        max_epochs=3, views=2, augment=True, contrastive_weight=1.0, ema_decay=0.9, whiten=True, num_workers=2,
        cluster_every=1, monitor="val/retrieval",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, manifests, tmp_path_factory):
    """(options, the uninterrupted run) of 3 epochs of 3 steps."""
    options, outputs = RECIPES[request.param], tmp_path_factory.mktemp("whole")
    return options, train(small_config(manifests, output_dir=str(outputs), **options), QUIET).experiment


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("owner", "method", "call", "left"),
    [
        (EarTeacherLightningModule, "training_step", 1, (0, 1)),  # epochs and steps done when it stops
        (EarTeacherLightningModule, "training_step", 5, (1, 2)),
        (EarTeacherLightningModule, "training_step", 6, (1, 2)),  # the epoch's last: taken again, and validated
        (EarTeacherLightningModule, "validation_step", 2, (1, 2)),
        (FitWhitening, "fit", 1, (0, 2)),
        (PseudoLabels, "make_round", 2, (1, 0)),
        (EarTeacherLightningModule, "on_save_checkpoint", 2, (1, 0)),  # saving is finished first
    ],
)
def test_a_signal_saves_and_resume_is_the_uninterrupted_run(
    recipe, manifests, tmp_path, monkeypatch, number, owner, method, call, left
):
    options, whole = recipe
    calls = 0
    original = getattr(owner, method)

    def with_signal(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    if method in ("fit", "make_round") and not options.get("whiten"):
        pytest.skip("this recipe has none, or but one")
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, with_signal)
        outcome = train(small_config(manifests, output_dir=str(tmp_path), **options), QUIET)
    assert outcome.interrupted == 128 + number
    assert multiprocessing.active_children() == []  # no loader is left over for the garbage collector to wait for
    checkpoint = read_checkpoint(tmp_path / "ear_teacher" / "checkpoints" / "last.ckpt")
    assert (checkpoint.epoch, checkpoint.steps_done) == left
    assert resume(outcome.experiment, QUIET).epochs == 3
    assert_same_weights(whole, outcome.experiment)
    assert metrics_of(outcome.experiment) == metrics_of(whole)


@pytest.mark.slow
def test_an_epoch_of_two_processes_is_gone_on_with_by_one(manifests, tmp_path, monkeypatch):
    """The rest of the epoch is what two processes would have had left, not a row twice and none left out."""
    original, calls = EarTeacherLightningModule.training_step, []

    def with_signal(self, *arguments):
        calls.append(1)
        if len(calls) == 16:  # 12 steps an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EarTeacherLightningModule, "training_step", with_signal)
        config = small_config(manifests, output_dir=str(tmp_path), max_epochs=3, batch_size=2)
        folder = train(config, QUIET).experiment
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    assert (checkpoint.epoch, checkpoint.steps_done) == (1, 4)
    # the same file, as if each step had been that of two processes
    checkpoint.content["hyper_parameters"]["devices"] = 2
    torch.save(checkpoint.content, path)
    drawn, draws = [], EpochSampler.__iter__

    def recorded(sampler):
        for draw in draws(sampler):
            if sampler.shuffle and sampler.epoch == 1:
                drawn.append(draw)
            yield draw

    monkeypatch.setattr(EpochSampler, "__iter__", recorded)
    console = Console()
    said = []
    monkeypatch.setattr(console, "info", said.append)
    assert resume(folder, console, devices=1).epochs == 3
    assert any("within an epoch by 2 process(es); the rest of the epoch is divided among 1" in line for line in said)
    order = EpochSampler(24, config.seed, shuffle=True)
    order.set_epoch(1)
    whole_epoch = list(draws(order))
    assert [whole_epoch.index(draw) for draw in drawn] == list(range(4 * 2 * 2, 24))  # steps, processes, batch size
    steps = [int(row["step"]) for row in read_table(folder / "metrics.csv")]
    assert steps == [0, 12, 12 + 4 + len(drawn) // 2, 12 + 4 + len(drawn) // 2 + 12]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="loaders are forked where they are to inherit the patch")
@pytest.mark.parametrize("fatal", [1, 3])  # the first training loader is the clustering's, the third the first epoch's
def test_a_loader_that_dies_of_the_same_signal_does_not_make_a_stop_an_error(manifests, tmp_path, monkeypatch, fatal):
    """torch lets a loader die of SIGTERM until its worker_init_fn is called."""
    from ear_teacher_cli.data import datamodule

    started = multiprocessing.Value("i", 0)
    original = datamodule.leave_stopping_to_the_parent

    def killed(worker: int) -> None:
        with started.get_lock():
            started.value += 1
            number = started.value
        if number == fatal:
            os.kill(os.getppid(), signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        original(worker)

    monkeypatch.setattr(datamodule, "leave_stopping_to_the_parent", killed)
    words = ["train", *manifests, *SMALL, "--num-workers", "1", "--max-epochs", "1", "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["earteach", *words])
    from ear_teacher_cli.cli.app import main

    with pytest.raises(SystemExit) as stopped:
        main()
    assert started.value >= fatal and stopped.value.code == 128 + signal.SIGTERM
    assert multiprocessing.active_children() == []


def test_ctrl_c_that_falls_into_a_destructor_still_stops_the_command(earteach, monkeypatch, tmp_path):
    """Python cannot raise out of a __del__: it reports the KeyboardInterrupt, and would continue."""
    import time

    from ear_teacher_cli.data import audit

    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    def interrupted(*args, **options):
        Interrupted()
        time.sleep(10)
        raise AssertionError("the interrupt was lost")

    monkeypatch.setattr(audit, "validate_data", interrupted)
    began, before = (
        time.monotonic(),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # tests before may change it
    try:
        result = earteach("validate-data", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 130 and result.err == "" and time.monotonic() - began < 5


SCRIPT = """
import sys
from ear_teacher_cli import EarDataModule
data = EarDataModule(train_metadata=sys.argv[1], val_metadata=sys.argv[2], num_workers=2, batch_size=4, image_size=64)
data.setup("fit")
print([batch["nothing"] for batch in data.train_dataloader()])  # Python keeps the iterator for its last traceback
"""


@pytest.mark.slow
def test_a_script_that_fails_between_batches_ends(manifests):
    """Its workers ignore SIGTERM, with which multiprocessing ends them, to wait for them then."""
    words = [sys.executable, "-c", SCRIPT, manifests[1], manifests[3]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("KeyError: 'nothing'") == 1, done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr


def test_a_checkpoint_in_memory_shares_what_the_run_shares_and_nothing_with_it():
    state = torch.nn.BatchNorm1d(2).state_dict()
    made = interruption._copied({"state_dict": state, "learning_state": {"weight": state["weight"].detach()}})
    copy = made["state_dict"]
    assert type(copy) is type(state) and copy._metadata == state._metadata and list(copy) == list(state)
    assert copy["weight"] is made["learning_state"]["weight"]  # written once
    assert all(torch.equal(copy[name], state[name]) for name in state)
    assert copy["weight"].data_ptr() != state["weight"].data_ptr()

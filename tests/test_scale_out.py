"""Several processes, started by torchrun: one result, also when one of them is killed. Two cores are enough."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import SMALL, read_table

from ear_teacher_cli.distributed import Ranks
from ear_teacher_cli.model.checkpoint import read_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # torchrun's choice, and part of what the last bits depend on


def start(processes: int, *words) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    command = list(map(str, [sys.executable, *launch, "-m", "ear_teacher_cli", *words]))
    popen = subprocess.Popen if launch else forked.Popen
    return popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def said(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its children


def rank_of(launcher: int, rank: int) -> int:
    """The process of this rank, a child of torchrun's."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are found by /proc, which this system has not")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher
            if mine and f"LOCAL_RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"torchrun has no process of rank {rank}")


@pytest.mark.parametrize(("items", "batch", "world"), [(61, 8, 3), (5, 8, 3), (64, 8, 4), (1, 1, 2)])
def test_ranks_share_whole_batches_without_gap_or_overlap(items, batch, world):
    blocks = [Ranks(rank, world).block(items, batch) for rank in range(world)]
    assert [i for block in blocks for i in block] == list(range(items))
    assert all(block.start % batch == 0 for block in blocks if block)


@pytest.fixture
def many(ears, tmp_path) -> Path:
    """600 rows, one of which names no image."""
    lines = (ears / "eval.csv").read_text().splitlines()
    rows = lines[1:] * 50
    rows[77] = "images/nobody.jpg" + "," * lines[0].count(",")
    path = tmp_path / "many.csv"
    path.write_text("\n".join([lines[0], *rows]) + "\n")
    return path


@pytest.mark.slow
def test_embed_of_several_processes_is_that_of_one_also_after_a_kill(many, ears, run, tmp_path):
    words = ["embed", many, "--root-dir", ears, "--weights", run, "--batch-size", 8, "--num-workers", 0]

    def output(name):
        return [(tmp_path / name).with_suffix(suffix).read_bytes() for suffix in (".npy", ".csv", ".json")]

    one = start(1, *words[:2], tmp_path / "one.npy", *words[2:])
    assert said(one).count("599 rows of 64, 1 skipped") == 1
    three = [*words[:2], tmp_path / "three.npy", *words[2:]]
    killed = start(3, *three)
    folder = tmp_path / ".three.npy.unfinished"
    until = time.monotonic() + 120
    while len(list(folder.glob("*.shard"))) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(rank_of(killed.pid, 1), signal.SIGKILL)
    said(killed)
    before = {path.name: path.read_bytes() for path in folder.glob("*.shard")}
    assert killed.returncode != 0 and not (tmp_path / "three.npy").exists() and before
    again = [sys.executable, "-m", "ear_teacher_cli", *three]
    code, text = forked.ranks(again, 3)
    assert code == 2 and text.count("continue with --resume, or start again with --overwrite") == 1, text
    assert {path.name: path.read_bytes() for path in folder.glob("*.shard")} == before
    other = shutil.copytree(folder, tmp_path / ".two.npy.unfinished")
    code, text = forked.ranks([*again, "--resume"], 3)
    assert code == 0 and text.count("599 rows of 64, 1 skipped") == 1, text
    assert output("three") == output("one") and not folder.exists()
    two = ["embed", many, tmp_path / "two.npy", *words[2:], "--resume"]  # also with another number of processes
    code, text = forked.ranks([sys.executable, "-m", "ear_teacher_cli", *two], 2)
    assert code == 0 and text.count("599 rows of 64, 1 skipped") == 1, text
    assert output("two") == output("one") and not other.exists()
    again = [sys.executable, "-m", "ear_teacher_cli", *three, "--resume", "--no-normalize"]
    code, text = forked.ranks(again, 2)
    assert "nothing unfinished" in text and code == 2  # and the finished one is not replaced
    assert output("three") == output("one")
    # plain numpy, as a user would: the rule is for the package's own readers
    assert np.load(tmp_path / "three.npy", allow_pickle=False).shape == (599, 64)  # noqa: TID251


@pytest.mark.slow
def test_training_by_torchrun_and_from_two_processes_to_one_and_back(manifests, tmp_path):
    words = [*SMALL, "--batch-size", 4, "--accelerator", "cpu", "--output-dir", tmp_path]
    train = ["train", *manifests, *words, "--max-epochs", 2]
    text = said(start(2, *train, "--devices", 2, "--strategy", "ddp", "--experiment-name", "two"))
    assert text.count("done: 2 epochs") == 1 and "Traceback" not in text, text
    assert "2 epochs" in said(start(1, *train, "--experiment-name", "one"))
    two, one = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("two", "one"))
    assert two.content["pseudo_classes"]["labels"].equal(one.content["pseudo_classes"]["labels"])
    before = [read_table(tmp_path / name / "metrics.csv")[0] for name in ("two", "one")]
    for name in before[0].keys() - {"epoch", "step"}:  # the same weights, measured by two processes and by one
        if before[0][name]:
            assert float(before[0][name]) == pytest.approx(float(before[1][name]), rel=1e-4), name
    assert "3 epochs" in said(start(1, "resume", tmp_path / "two", "--devices", 1, "--max-epochs", 3))
    back = [sys.executable, "-m", "ear_teacher_cli", "resume", tmp_path / "two", "--devices", 2, "--max-epochs", 4]
    code, text = forked.ranks(back, 2)
    assert code == 0 and text.count("done: 4 epochs") == 1, text
    assert [row["epoch"] for row in read_table(tmp_path / "two" / "metrics.csv")] == list("01234")


@pytest.mark.parametrize(
    ("environment", "words", "told"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, [], "--devices: 1 on 1 node"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, ["--devices", 3], "but 2 were started"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, [], "but 4 were started"),
        ({}, ["--num-nodes", 2], "start with torchrun or srun"),
    ],
)
def test_as_many_processes_as_were_started(manifests, tmp_path, earteach, monkeypatch, environment, words, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = earteach("train", *manifests, *SMALL, "--output-dir", tmp_path, "--accelerator", "cpu", *words)
    assert found.code == 2 and told in found.err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_can_be_resumed(manifests, tmp_path):
    words = [*SMALL, "--batch-size", 4, "--accelerator", "cpu", "--output-dir", tmp_path, "--max-epochs", 40]
    process = start(2, "train", *manifests, *words, "--devices", 2)
    text = ""
    for line in process.stderr:
        text += line
        if line.startswith("epoch 2/40: train"):
            os.kill(rank_of(process.pid, 1), signal.SIGKILL)
            break
    text += said(process)
    assert process.returncode != 0 and "earteach: another process of this run ended" in text, text
    text = said(start(1, "resume", tmp_path / "ear_teacher", "--devices", 1, "--max-epochs", 3))
    assert re.search("restored: last.ckpt: epoch [12] of", text) and "3 epochs" in text, text

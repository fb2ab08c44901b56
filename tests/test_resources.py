"""What a run says of the machine: memory, waiting for data, the time of its operations."""

import json
import subprocess
import sys
import time

import pytest
import pytorch_lightning as pl
import torch
from conftest import read_table, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ear_teacher_cli import platform
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.dataset import EarDataset
from ear_teacher_cli.training.run import train

QUIET = Console(quiet=True)


@pytest.mark.slow
def test_waiting_for_data_and_memory_are_logged(manifests, tmp_path, monkeypatch, capsys):
    config = small_config(manifests, output_dir=str(tmp_path), experiment_name="fast", max_epochs=1)
    fast = train(config, Console()).experiment
    original = EarDataset.__getitem__

    def slow(dataset, draw):
        time.sleep(0.15)
        return original(dataset, draw)

    with monkeypatch.context() as patch:
        patch.setattr(EarDataset, "__getitem__", slow)
        waiting = train(small_config(manifests, output_dir=str(tmp_path), max_epochs=1), QUIET).experiment
    shares = [float(read_table(run / "metrics.csv")[1]["machine/data_wait"]) for run in (fast, waiting)]
    assert 0 <= shares[0] < 50 < shares[1] < 100
    peak = float(read_table(fast / "metrics.csv")[1]["machine/peak_memory"])
    assert 0.1 < peak <= platform.peak_memory() / 1e9 + 1e-3  # logged in float32
    assert "waiting for data" in capsys.readouterr().err
    events = EventAccumulator(str(fast / "version_0")).Reload()
    assert {"machine/data_wait", "machine/peak_memory"} <= set(events.Tags()["scalars"])


def test_peak_memory_is_that_of_the_process():
    program = (
        "from ear_teacher_cli.platform import peak_memory\nbefore = peak_memory()\nblock = b'x' * 320_000_000\n"
        "del block\nprint(before, peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 1e6 < before < 3e8 <= after - before < 6e8


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 6])  # 12 steps, and 4
def test_a_profile_has_the_operations_of_a_step(manifests, tmp_path, capsys, batch_size):
    config = small_config(
        manifests, output_dir=str(tmp_path), max_epochs=1, batch_size=batch_size, profile=True, metric_loss="none"
    )
    folder = train(config, Console()).experiment
    table, trace = (folder / "profile.txt").read_text(), json.loads((folder / "profile-trace.json").read_text())
    assert "convolution" in table and "# of Calls" in table
    names = {event.get("name") for event in trace["traceEvents"]}
    assert any("convolution" in str(name) for name in names)
    steps = 5 if batch_size == 2 else 2
    assert f"profile of {steps} steps: " in capsys.readouterr().err


@pytest.mark.slow
def test_memory_of_a_gpu_is_that_of_the_epoch(monkeypatch):
    from ear_teacher_cli.training.resources import Resources

    logged, resets = {}, []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)

    class Module(pl.LightningModule):
        device = torch.device("cuda")

        def log_dict(self, found):
            logged.update(found)

    measured = Resources()
    measured.on_train_epoch_start(None, Module())
    measured.on_train_epoch_end(None, Module())
    assert logged["machine/peak_memory"] == 3.0 and resets == [torch.device("cuda")]

"""--batch-size auto: below the limit of memory, said, and kept; what --dry-run says of a step."""

import subprocess
import sys

import pytest
import torch
from conftest import SMALL, small_config

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.config_files import from_dict, read_toml
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.errors import ConfigError, UsageError
from ear_teacher_cli.training import batch_size
from ear_teacher_cli.training.batch_size import Memory, extrapolated, find_batch_size
from ear_teacher_cli.training.module import EarTeacherLightningModule
from ear_teacher_cli.training.step_trial import one_step, trial_batch

QUIET = Console(quiet=True)
FIXED, EACH = 2e8, 1e7  # bytes of a pretended step, and of each of its images


@pytest.fixture
def pretended(monkeypatch):
    """Steps that take FIXED + EACH * images bytes of a limit; the sizes that were tried."""
    tried = []

    def of_step(self, module, batch, classes):
        size = len(batch["index"])
        tried.append(size)
        if FIXED + EACH * size > self.real:  # memory runs out, without having been foreseen
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return FIXED + EACH * size

    def limited_to(limit, real=float("inf")):
        monkeypatch.setattr(
            Memory,
            "__init__",
            lambda self, config, kept: vars(self).update(device=torch.device("cpu"), limit=limit, real=real),
        )
        monkeypatch.setattr(Memory, "of_step", of_step)
        return tried

    return limited_to


@pytest.mark.parametrize("limit", [5e8, 1e9, 2e9, 7e9])
def test_the_largest_batch_below_the_limit_is_found_without_passing_it(manifests, pretended, limit):
    tried = pretended(limit)
    config = find_batch_size(small_config(manifests, batch_size="auto"), 10**6, 8, 0.0, QUIET)
    module = EarTeacherLightningModule(config)
    moments = 8 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    most = (limit - FIXED - moments) / EACH
    assert most - 8 < config.batch_size <= most and config.batch_size % 8 == 0
    assert max(tried) <= most and tried == [4 * 2**i for i in range(len(tried))]


@pytest.mark.parametrize(
    ("images", "limit", "size", "why"),
    [
        (800, 1e12, 48, "which leaves 16 batches an epoch"),
        (24, 1e12, 4, "the smallest that is tried"),
        (10**6, 1e12, 1024, "the largest there is"),
        (10**6, 1e9, 72, "the largest that fits"),
    ],
)
def test_what_limits_the_batch_is_said(manifests, pretended, capsys, images, limit, size, why):
    pretended(limit)
    config = find_batch_size(small_config(manifests, batch_size="auto"), images, 8, 0.0, Console())
    assert config.batch_size == size and f"batch size: {size}, {why}; a step needs" in capsys.readouterr().err


def test_a_size_that_ran_out_of_memory_is_not_the_result(manifests, pretended):
    """Another process takes memory meanwhile: the limit is not what there really is."""
    tried = pretended(3.8e9, real=1.2e9)
    config = find_batch_size(small_config(manifests, batch_size="auto"), 10**6, 8, 0.0, QUIET)
    assert tried[-1] == 128 and 64 <= config.batch_size < 128


@pytest.mark.parametrize(("limit", "real"), [(1e9, 1e8), (1e8, float("inf"))])
def test_too_little_memory_for_any_batch_is_said(manifests, pretended, limit, real):
    pretended(limit, real)
    with pytest.raises(ConfigError, match="batch_size: not even 4 images fit"):
        find_batch_size(small_config(manifests, batch_size="auto"), 1000, 8, 0.0, QUIET)


def test_what_auto_cannot_do_is_said(manifests, monkeypatch):
    with pytest.raises(ConfigError, match="batch_size: auto tries one device"):
        find_batch_size(small_config(manifests, batch_size="auto", devices=2), 1000, 8, 0.0, QUIET)
    data = EarDataModule(small_config(manifests, batch_size="auto"))
    data.setup("fit")
    with pytest.raises(ConfigError, match="batch_size: auto is found by `earteach train` only"):
        data.train_dataloader()
    monkeypatch.setattr(batch_size, "peak_memory", lambda: 0.0)
    with pytest.raises(ConfigError, match="batch_size: auto cannot measure memory"):
        find_batch_size(small_config(manifests, batch_size="auto"), 1000, 8, 0.0, QUIET)


def test_auto_is_a_value_of_files_and_of_python_and_nothing_else_is(tmp_path):
    (tmp_path / "mine.toml").write_text('batch-size = "auto"\n')
    values = read_toml(tmp_path / "mine.toml")
    assert TrainConfig(**values) == TrainConfig(batch_size="auto") == from_dict(values, "mine").__class__(**values)
    (tmp_path / "mine.toml").write_text("batch-size = -1\n")
    with pytest.raises(UsageError, match="batch_size"):
        read_toml(tmp_path / "mine.toml")
    for wrong in ("most", 0, 1, 2.5):
        with pytest.raises(ConfigError, match="batch_size"):
            TrainConfig(batch_size=wrong)
    with pytest.raises(ConfigError, match="max_epochs"):
        TrainConfig(max_epochs="auto")


PROGRAM = """
import sys
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.platform import peak_memory
from ear_teacher_cli.training import batch_size
from ear_teacher_cli.training.module import EarTeacherLightningModule
from ear_teacher_cli.training.step_trial import one_step, trial_batch

config = TrainConfig(backbone="test_convnext", image_size=160, pretrained=False, batch_size="auto", seed=1)
module = EarTeacherLightningModule(TrainConfig(backbone="test_convnext", image_size=160, pretrained=False))
one_step(module, trial_batch(module.config, 2), 8)
start = peak_memory()
batch_size.free_memory = lambda: 2e9
limit = batch_size.SHARE * (start + batch_size.free_memory())
found = batch_size.find_batch_size(config, 10**6, 8, 0.0, Console())
one_step(EarTeacherLightningModule(found), trial_batch(found, found.batch_size), 8)
print(found.batch_size, start, limit, peak_memory())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak memory of a process")
def test_a_batch_of_the_size_that_is_found_really_fits():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, start, limit, peak = map(float, done.stdout.split())
    assert "batch size: " in done.stderr and size > 8
    assert start < peak < 1.1 * limit and peak - start > 0.5 * (limit - start)


def test_a_line_through_the_last_two_trials():
    assert extrapolated([(4, 9.0), (8, 10.0), (16, 12.0)], 32) == 16.0
    assert extrapolated([(4, 9.0), (8, 9.0)], 64) == 72.0  # an earlier peak hides how it grows


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_trial_is_in_the_precision_of_the_run(manifests, precision):
    module = EarTeacherLightningModule(small_config(manifests, precision=precision))
    kinds = set()
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(lambda part, given, found: kinds.add(found.dtype))
    assert one_step(module, trial_batch(module.config, 4), 8) > 0
    assert kinds == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}


@pytest.mark.slow
def test_the_size_that_is_found_is_kept_in_the_config(manifests, tmp_path, earteach):
    words = [*manifests, *SMALL, "--batch-size", "auto", "--max-epochs", 1, "--output-dir", tmp_path]
    said = earteach("train", *words)
    assert said.code == 0 and "batch size: 4, the smallest that is tried" in said.err, said.err
    assert read_toml(tmp_path / "ear_teacher" / "config.toml")["batch_size"] == 4
    said = earteach("train", *words, "--dry-run")
    assert "batch_size = 4\n" in said.out.decode() and "one training step (32-true): loss" in said.err
    assert "GB of memory; loading a batch" in said.err

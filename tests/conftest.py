"""Shared by the tests: small drawn ears, a way to say commands, and one small trained run."""

import csv
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

# Small models gain nothing from threads, and processes that share the cores lose much. Set before torch is imported; the
# processes that tests start have it too. Results of one thread count are compared with those of the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

from ear_teacher_cli.config import PRESETS
from ear_teacher_cli.platform import STOP_SIGNALS

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub
# Python leaves SIGINT ignored where it was when it started (a shell's background job, nohup, some CI runners), and so
# would every process that a test starts: Ctrl-C would reach nobody.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in [name for name in os.environ if name.startswith("EARTEACH_")]:
    del os.environ[name]
# The same examples in every run, so that a run that fails can be repeated; `make fuzz` searches for others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("searching", print_blob=True)
hypothesis.settings.load_profile("repeatable")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

BACKBONE = "test_convnext"  # timm's own ConvNeXt for tests: 207,128 parameters
# One view, nothing frozen, reconstruction and k-means classes: the short way for tests that are not of the recipe.
PLAIN = {**PRESETS["original"], "pad": True, "margin_warmup_epochs": 5, "gradient_clip_val": 0.0}
PLAIN_WORDS = ["--preset", "original", "--pad", "--margin-warmup-epochs", "5", "--gradient-clip-val", "0"]
SMALL = [
    "--backbone",
    BACKBONE,
    "--image-size",
    "64",
    "--no-pretrained",
    "--batch-size",
    "8",
    "--num-workers",
    "0",
    "--learning-rate",
    "1e-3",
    "--num-collage-samples",
    "4",
    "--no-report",
    *PLAIN_WORDS,
]


# How far float32 results of one model may be apart, as a share of the largest number, where the memory layout, the number
# of threads, the batch size or the processor differs. Measured on embeddings and feature maps of four models
# (test_convnext, convnext_atto, convnext_tiny, tf_efficientnet_lite0) with ONEDNN_MAX_CPU_ISA from SSE41 to AVX512, both
# layouts, one and two threads: at most 4e-6. On one machine, with the same layout, threads and batches, results are equal
# to the bit, in other processes too.
ROUNDING = 1e-5


def apart(found, expected) -> float:
    """The largest |found - expected| as a share of the largest |expected|; infinite where shapes differ or a number is
    not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@dataclass(frozen=True)
class Said:
    code: int
    out: bytes
    err: str


def pytest_collection_modifyitems(items):
    """What needs a trained model is slow, whoever needs it first; the rest that is slow says so itself. Files with long
    tests go first: several workers then end at about the same time."""
    long = [
        f"test_{name}.py"
        for name in ("scale_out", "faults", "properties", "interruption", "examples", "platform", "resume", "students")
    ]
    items.sort(key=lambda item: long.index(item.path.name) if item.path.name in long else len(long))
    trained = {"run", "whitened", "recommended", "recipe", "from_pretrained", "opened", "killed", "folder"}
    for item in items:
        if trained & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def earteach(capfdbinary, monkeypatch):
    """`earteach('embed', 'x', 'y.npy')` -> Said(exit code, stdout, stderr), in this process."""
    from ear_teacher_cli.cli.app import main

    def say(*words) -> Said:
        monkeypatch.setattr(sys, "argv", ["earteach", *map(str, words)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # main sets its own, and signals
        signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        capfdbinary.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        assert b"Traceback" not in err or {"-v", "--verbose"} & set(words), err.decode()
        return Said(code, out, err.decode())

    return say


@pytest.fixture(scope="session")
def ears(tmp_path_factory) -> Path:
    """A folder of drawn ears: 11 people x 4 photos; 6 to train on, 2 to validate, 3 to evaluate."""
    from make_sample_ears import main

    folder = tmp_path_factory.mktemp("ears") / "drawn"
    words = [str(folder), "--people", "11", "--photos", "4", "--val-people", "2", "--eval-people", "3", "--seed", "1"]
    assert main(words) == 0
    return folder


@pytest.fixture(scope="session")
def manifests(ears) -> list[str]:
    return ["--train-metadata", str(ears / "train_teacher.npy"), "--val-metadata", str(ears / "val_teacher.npy")]


@pytest.fixture(scope="session")
def run(ears, manifests, tmp_path_factory) -> Path:
    """An experiment folder of a small run: 6 epochs on the drawn ears. Tests must not change it."""
    outputs = tmp_path_factory.mktemp("outputs")
    return trained(small_config(manifests, output_dir=str(outputs), max_epochs=6, report=True))


@pytest.fixture(scope="session")
def whitened(manifests, tmp_path_factory) -> Path:
    """An experiment folder with a whitening and two sets of weights. Tests must not change it."""
    from ear_teacher_cli.console import Console
    from ear_teacher_cli.training.run import train

    changes = {"whiten": True, "ema_decay": 0.9, "max_epochs": 2}
    config = small_config(manifests, output_dir=str(tmp_path_factory.mktemp("whitened")), **changes)
    return train(config, Console(quiet=True)).experiment


@pytest.fixture(scope="session")
def exports(whitened, tmp_path_factory) -> Path:
    """teacher.safetensors, teacher.onnx with maps, teacher/: of one checkpoint. Tests must not change them."""
    from ear_teacher_cli.command_config import ExportConfig
    from ear_teacher_cli.export.export import export_backbone

    folder = tmp_path_factory.mktemp("exports")
    export_backbone(whitened, folder / "teacher.safetensors")
    export_backbone(whitened, folder / "teacher.onnx", config=ExportConfig(features=True))
    options = ExportConfig(consent="drawn, nobody", license="MIT | of us")
    export_backbone(whitened, folder / "teacher", config=options)
    return folder


def trained(config) -> Path:
    """The experiment folder of a run, with what `earteach train` writes at its end."""
    from ear_teacher_cli.console import Console
    from ear_teacher_cli.report.write import write_final_outputs
    from ear_teacher_cli.training.run import train

    outcome = train(config, Console(quiet=True))
    write_final_outputs(outcome, Console(quiet=True))
    return outcome.experiment


def small_config(manifests: list[str], **changes):
    from ear_teacher_cli.config import TrainConfig

    options = PLAIN | dict(
        train_metadata=manifests[1],
        val_metadata=manifests[3],
        backbone=BACKBONE,
        image_size=64,
        pretrained=False,
        batch_size=8,
        num_workers=0,
        learning_rate=1e-3,
        num_collage_samples=4,
        report=False,
    )
    return TrainConfig(**options | changes)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_epochs(run: Path) -> list[dict[str, str]]:
    """metrics.csv without its row of before training, and without what depends on the machine."""
    return [row for row in metrics_of(run) if row["epoch"] != "0"]


def metrics_of(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the machine: waiting for data, and memory."""
    return [{k: v for k, v in row.items() if not k.startswith("machine/")} for row in read_table(run / "metrics.csv")]

"""Write the files of this folder anew, with version 0.1.0 of the package (README.md has the commands).

    PYTHONPATH=V010 python make.py V010 OUT

V010: a checkout of version 0.1.0. OUT: a new folder. Two properties keep the files small. Most hidden units of the
ConvNeXt blocks and most channels of the decoder are zero before training; AdamW leaves them at zero, because no gradient
reaches them, so their weights and moments compress to nothing. The photos are smaller than the drawing program
makes them.
"""

import contextlib
import csv
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ear_teacher_cli
from ear_teacher_cli import EarTeacherLightningModule

# By name: these are modules of version 0.1.0, which later versions need not have.
earteach = import_module("ear_teacher_cli.cli").main
Decoder = import_module("ear_teacher_cli.core.model").Decoder
SIZE = 32  # pixels
SMALLER = 3  # the photos are this many times smaller than the drawing program makes them
HIDDEN = 4  # hidden units of a ConvNeXt block that are not zero
CHANNELS = 4  # channels of a layer of the decoder that are not zero
COMPRESSED = (".ckpt", ".safetensors", ".onnx")
TRAIN = [
    *("--train-metadata", "ears/train_teacher.npy", "--val-metadata", "ears/val_teacher.npy"),
    *("--backbone", "test_convnext", "--pretrained-path", "start.safetensors", "--image-size", str(SIZE)),
    *("--batch-size", "4", "--max-epochs", "3", "--learning-rate", "1e-3", "--projection-dim", "8"),
    *("--ema-decay", "0.9", "--head-rate", "3", "--keep-start", "0.25"),
    *("--accelerator", "cpu", "--precision", "32-true", "--num-workers", "0", "--no-images", "--no-report"),
    *("--output-dir", "."),
]


def main(checkout: Path, out: Path) -> None:
    assert ear_teacher_cli.__version__ == "0.1.0", ear_teacher_cli.__version__
    out.mkdir()
    os.chdir(out)
    draw_ears(checkout / "examples" / "make_sample_ears.py")
    write_start(Path("start.safetensors"))
    prune_decoder()
    run("train", *TRAIN, "--experiment-name", "whole")
    stop_after_epoch(2)
    run("train", *TRAIN, "--experiment-name", "run", exit_code=128 + signal.SIGTERM)
    keep_of_run(Path("run"))
    shutil.copy("whole/metrics.csv", "metrics_of_3_epochs.csv")
    shutil.rmtree("whole")

    checkpoint = "run/checkpoints/last.ckpt"
    run("export-backbone", checkpoint, "teacher.safetensors")
    run("export-backbone", checkpoint, "teacher.onnx")
    run("export-backbone", checkpoint, "teacher", "--num-workers", "0", "--consent", "drawn", "--license", "MIT")
    weights = ("--weights", "teacher.safetensors", "--num-workers", "0")
    run("embed", "ears/eval.csv", "embeddings.npy", *weights)
    run("embed", "ears/eval.csv", "raw.npz", *weights, "--no-normalize")
    run("embed", "ears/eval.csv", "table.csv", *weights)
    run("evaluate", "embeddings.npy", "--json", "evaluation.json", "--bootstrap", "0")
    compress(Path())


def run(*words: str, exit_code: int = 0) -> None:
    """Run an `earteach` command in this process."""
    sys.argv = ["earteach", *words]
    code = 0
    try:
        earteach()
    except SystemExit as stop:
        code = stop.code or 0
    assert code == exit_code, (words, code)


def draw_ears(program: Path) -> None:
    """16 drawn photos of 4 people, and their lists."""
    people = ["--people", "4", "--photos", "4", "--val-people", "2", "--eval-people", "0", "--seed", "1"]
    subprocess.run([sys.executable, str(program), "ears", *people], check=True)
    for path in Path("ears/images").rglob("*.jpg"):
        with Image.open(path) as image:
            smaller = image.convert("RGB").reduce(SMALLER)
        smaller.save(path, quality=85)
    rows = [json.loads(line) for line in Path("ears/ears.jsonl").read_text(encoding="utf-8").splitlines()]
    Path("ears/ears.jsonl").unlink()
    for split in ("train", "val"):  # as the original package writes them
        chosen = [row for row in rows if row["split"] == split]
        manifest = {
            "image_paths": np.array([row["image_path"] for row in chosen], dtype=str),
            "bboxes": np.array([row["bbox"] for row in chosen], np.float32) / SMALLER,
        }
        np.save(f"ears/{split}_teacher.npy", manifest)
    with open("ears/eval.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image_path", "identity", "side", "x1", "y1", "x2", "y2"])
        for row in rows:
            if row["split"] == "val":
                box = np.array(row["bbox"], np.float32) / SMALLER
                table.writerow([row["image_path"], row["identity"], row["side"], *box.tolist()])


def write_start(path: Path) -> None:
    """Random weights to start from, mostly zero, whose blocks contribute to the output from the first step on."""
    torch.manual_seed(0)
    state = timm.create_model("test_convnext", num_classes=0).state_dict()
    for name, tensor in state.items():
        if name.endswith(("fc1.weight", "fc1.bias")):
            tensor[HIDDEN:] = 0
        elif name.endswith("fc2.weight"):
            tensor[:, HIDDEN:] = 0
        elif name.endswith("conv_dw.weight"):  # the maps of the stages that learn are no larger than 2 x 2
            centre = tensor[:, :, 2:5, 2:5].clone()
            tensor.zero_()[:, :, 2:5, 2:5] = centre
        elif name.endswith("gamma"):
            tensor.fill_(0.5)
    save_file(state, path)


def prune_decoder() -> None:
    """Let each new decoder begin with most of its channels at zero."""
    initialise = Decoder.__init__

    @torch.no_grad()
    def pruned(self, embedding_dim: int, image_size: int) -> None:
        initialise(self, embedding_dim, image_size)
        self.start.weight[CHANNELS:] = 0
        self.start.bias[CHANNELS:] = 0
        for layer in self.steps:
            if isinstance(layer, torch.nn.ConvTranspose2d):
                layer.weight[CHANNELS:] = 0
                layer.weight[:, CHANNELS:] = 0
            elif isinstance(layer, torch.nn.Conv2d):
                layer.weight[:, CHANNELS:] = 0

    Decoder.__init__ = pruned


def stop_after_epoch(epoch: int) -> None:
    """Let the first checkpoint of an epoch send SIGTERM to this process; the run saves the others, then ends."""
    save, sent = EarTeacherLightningModule.on_save_checkpoint, []

    def saved(self, checkpoint) -> None:
        save(self, checkpoint)
        if checkpoint["earteach"]["epochs_completed"] == epoch and not sent:
            sent.append(epoch)
            os.kill(os.getpid(), signal.SIGTERM)

    EarTeacherLightningModule.on_save_checkpoint = saved


def keep_of_run(folder: Path) -> None:
    """Remove all of an experiment folder that need not be kept."""
    kept = {folder / "config.toml", folder / "metrics.csv", folder / "checkpoints" / "last.ckpt"}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def compress(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix in COMPRESSED:
            packed = path.with_name(f"{path.name}.xz")
            packed.write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
            path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))

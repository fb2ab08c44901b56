"""Speed of `embed`, from the first image to the last, where the model is the bottleneck and where the images are.

Compared with upper bounds (the model alone on preloaded tensors, the decoder alone on all cores) and with the loop that a
user of timm would write: ImageDataset, timm's transform, a DataLoader with as many workers. If THINGSVISION_PYTHON names
the Python of an environment with thingsvision (`pip install thingsvision`, "pandas<3"), compared with that, too.
"""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
from bench import Line, Work, in_turn
from measure_images import SIDE, decode, timm_dataset
from photos import crops, enlarged, manifest_of
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ear_teacher_cli.console import Console
from ear_teacher_cli.embedding.embedder import embed_images, load_embedder
from ear_teacher_cli.platform import usable_cores

BATCH = 16
SCRIPT = Path(__file__).with_name("of_thingsvision.py")


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    images = BATCH * (2 if quick else 12)
    paths = crops(folder, images)[0]
    yield from _measure_model(folder, rounds, "test_convnext" if quick else "convnext_tiny", paths, "200 px crops")
    paths = enlarged(folder, "12 MP", BATCH * (2 if quick else 6))[0]
    yield from _measure_model(folder, rounds, "test_convnext", paths, "12 MP photos")


def _measure_model(folder: Path, rounds: int, model: str, paths: list[str], images: str) -> Iterator[Line]:
    workers, count = usable_cores(), len(paths)
    manifest = manifest_of(paths, [None] * count)
    torch.manual_seed(0)
    weights = folder / f"{model}.safetensors"
    save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
    embedder = load_embedder(str(weights), model, SIDE)
    dataset = timm_dataset(Path(paths[0]).parent)
    assert len(dataset) == count
    preloaded = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    backbone = timm.create_model(model, num_classes=0).eval()
    console = Console(quiet=True)

    def ours() -> None:
        rows = [embedder.unit_rows(v) for _, v, _ in embed_images(embedder, manifest, BATCH, workers, 0, console)]
        assert sum(map(len, rows)) == count

    def model_alone() -> None:
        for _ in range(count // BATCH):
            embedder(preloaded)

    def timm_loop() -> None:
        with torch.inference_mode():
            for batch, _ in DataLoader(dataset, BATCH, num_workers=workers):
                torch.nn.functional.normalize(backbone(batch), dim=1).numpy()

    def decoder_alone() -> None:
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            list(pool.map(decode, paths, chunksize=4))

    model_is_bottleneck = images == "200 px crops"
    functions = {"ours": ours, "timm": timm_loop, "bound": model_alone if model_is_bottleneck else decoder_alone}
    process = None
    if python := os.environ.get("THINGSVISION_PYTHON"):
        command = [python, SCRIPT, dataset.reader.root, model, BATCH, SIDE]
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        versions = process.stdout.readline().strip()
        functions["thingsvision"] = lambda: _run_thingsvision(process)
    seconds = in_turn(functions, rounds)
    work = Work("embedding", f"{model}, {images}, {workers} workers", count, "images")
    if model_is_bottleneck:
        yield work.compare(seconds, "bound", "the model alone on preloaded tensors", 0.95)
    else:
        yield work.compare(seconds, "bound", "Pillow's decoder alone, all cores", 0.9)
    yield work.compare(seconds, "timm", f"a loop with timm {timm.__version__} and DataLoader", 1.0)
    if process:
        process.communicate(timeout=60)
        yield work.compare(seconds, "thingsvision", versions, 1.0)


def _run_thingsvision(process: subprocess.Popen) -> float:
    """Let of_thingsvision.py embed the folder once, and return its seconds."""
    process.stdin.write("again\n")
    process.stdin.flush()
    return float(process.stdout.readline())

"""`embed` from the first image to the last, where the model is the bottleneck and where the images are.

Against the model alone on ready tensors and the decoder alone on all cores (the limits), and a loop as a user of timm
would write it: ImageDataset, timm's transform, a DataLoader with as many workers. Against thingsvision, too, where
THINGSVISION_PYTHON names the Python of an environment that has it (`pip install thingsvision`, "pandas<3").
"""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
from bench import Line, in_turn, rate, speed_up
from measure_pictures import SIDE, _decode, _of_timm
from photos import crops, drawn, enlarged
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ear_teacher_cli.console import Console
from ear_teacher_cli.embedding.embedder import embed_images, load_embedder
from ear_teacher_cli.platform import usable_cores

BATCH = 16
SCRIPT = Path(__file__).with_name("of_thingsvision.py")


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    cores = workers = usable_cores()
    quiet = Console(quiet=True)
    for name, kind in (("test_convnext" if quick else "convnext_tiny", "crops"), ("test_convnext", "12 MP")):
        count = BATCH * (2 if quick else 12 if kind == "crops" else 6)
        paths = crops(folder, count)[0] if kind == "crops" else enlarged(folder, kind, count)[0]
        manifest = replace(drawn(folder), root=Path(paths[0]).parent, paths=[Path(p).name for p in paths], boxes=[None] * count,
                           rows=range(count), identities=None, sides=None)  # fmt: skip
        torch.manual_seed(0)
        weights = folder / f"{name}.safetensors"
        save_file(timm.create_model(name, num_classes=0).state_dict(), weights)
        embedder = load_embedder(str(weights), name, SIDE)
        dataset = _of_timm(Path(paths[0]).parent)
        assert len(dataset) == count
        ready = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
        plain = timm.create_model(name, num_classes=0).eval()

        def ours(manifest=manifest, embedder=embedder, count=count) -> None:
            rows = [embedder.unit_rows(v) for _, v, _ in embed_images(embedder, manifest, BATCH, workers, 0, quiet)]
            assert sum(map(len, rows)) == count

        def forward(embedder=embedder, count=count, ready=ready) -> None:
            for _ in range(count // BATCH):
                embedder(ready)

        def users_loop(dataset=dataset, plain=plain) -> None:
            with torch.inference_mode():
                for images, _ in DataLoader(dataset, BATCH, num_workers=workers):
                    torch.nn.functional.normalize(plain(images), dim=1).numpy()

        def decoder(paths=paths) -> None:
            with ProcessPoolExecutor(cores, get_context("fork")) as pool:
                list(pool.map(_decode, paths, [None] * len(paths), chunksize=4))

        ways = {"ours": ours, "user": users_loop, "limit": forward if kind == "crops" else decoder}
        rival = os.environ.get("THINGSVISION_PYTHON")
        if rival:
            words = [rival, SCRIPT, dataset.reader.root, name, BATCH, SIDE]
            process = subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            versions = process.stdout.readline().strip()

            def thingsvision(process=process) -> float:
                process.stdin.write("again\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            ways["thingsvision"] = thingsvision
        seconds = in_turn(ways, rounds)
        if rival:
            process.communicate(timeout=60)
        what = f"{name}, {'200 px crops' if kind == 'crops' else kind + ' photos'}, {workers} workers"
        limit, aim = (
            ("the model alone on ready tensors", 0.95)
            if kind == "crops"
            else ("Pillow's decoder alone, all cores", 0.9)
        )
        mine = rate(seconds["ours"], count, "pictures")
        yield Line(
            "embedding",
            what,
            limit,
            speed_up(seconds, "ours", "limit"),
            aim,
            mine,
            rate(seconds["limit"], count, "pictures"),
        )
        theirs = f"a loop with timm {timm.__version__} and DataLoader"
        yield Line(
            "embedding",
            what,
            theirs,
            speed_up(seconds, "ours", "user"),
            1.0,
            mine,
            rate(seconds["user"], count, "pictures"),
        )
        if rival:
            faster = speed_up(seconds, "ours", "thingsvision")
            yield Line("embedding", what, versions, faster, 1.0, mine, rate(seconds["thingsvision"], count, "pictures"))

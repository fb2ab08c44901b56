"""How the memory of `embed` grows with its rows: everything but the images and the model, which are made up.

Peak of a process of its own that embeds 10,000 rows, and of one that embeds 1,000,000 of the same few files.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import Line
from photos import drawn

SCRIPT = """
import sys
import numpy as np, torch
from ear_teacher_cli.config import EmbedConfig
from ear_teacher_cli.embedding import writer as verb
from ear_teacher_cli.console import Console

def made_up(embedder, manifest, batch_size, workers, timeout, console, start):
    for first in range(start, len(manifest), batch_size):
        rows = list(range(first, min(first + batch_size, len(manifest))))
        yield rows, torch.ones(len(rows), 64), []

verb.embed_images = made_up
config = EmbedConfig(weights=sys.argv[3], backbone="test_convnext", image_size=64)
verb.embed(sys.argv[1], sys.argv[2], config, Console(quiet=True))
# not getrusage: its peak is that of the process that started this one, too
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
"""


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    import timm
    from safetensors.torch import save_file

    manifest = drawn(folder)
    weights = folder / "weights.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=0).state_dict(), weights)
    few, many = (1_000, 20_000) if quick else (10_000, 1_000_000)
    ratios, peaks = [], {}
    for _ in range(min(rounds, 2)):
        for rows in (few, many):
            source = folder / "ears" / f"{rows}.csv"
            with open(source, "w", encoding="utf-8") as file:
                file.write("image_path,x1,y1,x2,y2\n")
                lines = [f"{p},{','.join(map(str, b))}\n" for p, b in zip(manifest.paths, manifest.boxes, strict=True)]
                file.writelines(lines[i % len(lines)] for i in range(rows))
            out = folder / f"{rows}.npy"
            words = [sys.executable, "-c", SCRIPT, source, out, weights]
            done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
            peaks[rows] = float(done.stdout)
            for path in folder.glob(f"{rows}.*"):
                path.unlink()
        ratios.append(peaks[many] - peaks[few])
    yield Line("memory", f"embed, {many:,} rows", f"MB more than {few:,}", ratios, 300, f"{peaks[many]:.0f} MB", f"{peaks[few]:.0f} MB",
               more_is_better=False)  # fmt: skip

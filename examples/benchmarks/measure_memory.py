"""Growth of the memory of `embed` with the number of rows, without images and model, whose results are constants.

Measured as the difference in peak memory of two processes, one that embeds 10,000 rows and one that embeds 1,000,000, both
of the same few files.
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
from ear_teacher_cli.command_config import EmbedConfig
from ear_teacher_cli.embedding import writer
from ear_teacher_cli.console import Console

def constant_embeddings(embedder, manifest, batch_size, workers, timeout, console, images):
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        yield batch, torch.ones(len(batch), 64), []

writer.embed_images = constant_embeddings
config = EmbedConfig(weights=sys.argv[3], backbone="test_convnext", image_size=64)
writer.embed(sys.argv[1], sys.argv[2], config, Console(quiet=True))
# not getrusage, whose peak includes that of the parent process
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
"""


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
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
            command = [sys.executable, "-c", SCRIPT, source, out, weights]
            done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
            peaks[rows] = float(done.stdout)
            for path in folder.glob(f"{rows}.*"):
                path.unlink()
        ratios.append(peaks[many] - peaks[few])
    megabytes = [f"{peaks[rows]:.0f} MB" for rows in (many, few)]
    against = f"MB more than for {few:,}"
    yield Line("memory", f"embed, {many:,} rows", against, ratios, 300, *megabytes, more_is_better=False)

"""Memory of manifests: the peak of a process that reads one, and the growth of that of `embed` with the number of rows,
without images and model, whose results are constants.

The growth is the difference in peak memory of two processes, one that embeds 10,000 rows and one that embeds 1,000,000.
The lists have boxes, identities, sides, and paths of files that do not exist.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import Line

EMBED = """
import sys
import numpy as np, torch
from ear_teacher_cli.command_config import EmbedConfig
from ear_teacher_cli.embedding import writer
from ear_teacher_cli.console import Console

def constant_embeddings(embedder, manifest, batch_size, workers, timeout, console, images):
    for first in range(0, len(images), batch_size):
        batch = list(images[first : first + batch_size])
        yield batch, torch.ones(len(batch), 64), []

writer.embed_images = constant_embeddings
config = EmbedConfig(weights=sys.argv[3], backbone="test_convnext", image_size=64)
writer.embed(sys.argv[1], sys.argv[2], config, Console(quiet=True))
"""
READ = """
import sys
from ear_teacher_cli import platform
from ear_teacher_cli.data.manifest import read_manifest

platform.reuse_freed_memory()  # as every command does
read_manifest(sys.argv[1])
"""
# not getrusage, whose peak includes that of the parent process
PEAK = 'print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)'


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    import timm
    from safetensors.torch import save_file

    weights = folder / "weights.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=0).state_dict(), weights)
    few, many, most = (1_000, 20_000, 20_000) if quick else (10_000, 1_000_000, 10_000_000)
    ratios, peaks = [], {}
    for _ in range(min(rounds, 2)):
        for rows in (few, many):
            peaks[rows] = peak(EMBED, written(folder / "ears.csv", rows), folder / "out.npy", weights)
            for path in folder.glob("out.*"):
                path.unlink()
        ratios.append(peaks[many] - peaks[few])
    megabytes = [f"{peaks[rows]:.0f} MB" for rows in (many, few)]
    against = f"MB more than for {few:,}"
    yield Line("memory", f"embed, {many:,} rows", against, ratios, 200, *megabytes, more_is_better=False)
    total = peak(READ, written(folder / "ears.csv", most))
    yield Line(
        "memory", f"reading a CSV, {most:,} rows", "MB", [total], 2000, f"{total:.0f} MB", "", more_is_better=False
    )


def written(path: Path, rows: int) -> Path:
    """Write a list of two ears per image and ten per person, with paths of 42 characters; return its path."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_path,x1,y1,x2,y2,identity,side\n")
        for i in range(rows):
            person, side = f"p{i // 10:07d}", "left" if i % 2 else "right"
            image = f"photos/session_{i // 10 % 997:03d}/{person}/{i // 2:010d}.jpg"
            x, y = 17 * i % 2000 + 0.5, 31 * i % 2000 + 0.25
            file.write(f"{image},{x},{y},{x + 200},{y + 300},{person},{side}\n")
    return path


def peak(script: str, *arguments: Path) -> float:
    """Run a script in a process of its own; return its peak memory in MB."""
    command = [sys.executable, "-c", script + PEAK, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

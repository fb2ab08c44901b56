"""Speed of `validate-data`: compared with the decoder alone on all cores, and growth of its time with the rows."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from bench import Line, Work, in_turn
from photos import enlarged

from ear_teacher_cli.data.audit import _duplicate_rows
from ear_teacher_cli.data.crop import read_image
from ear_teacher_cli.data.image_checks import near_pairs
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.platform import usable_cores


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    cores = usable_cores()
    count = 128 if quick else 384
    paths, boxes = enlarged(folder, "2 MP", count)
    manifest = Path(paths[0]).parent / "list.csv"
    with open(manifest, "w", encoding="utf-8") as file:
        file.write("image_path,x1,y1,x2,y2\n")
        file.writelines(f"{Path(p).name},{','.join(map(str, box))}\n" for p, box in zip(paths, boxes, strict=True))
    pool = ProcessPoolExecutor(cores, get_context("spawn"))

    def ours() -> None:
        arguments = [manifest, "--num-workers", cores, "--json", "-"]
        command = [sys.executable, "-m", "ear_teacher_cli", "validate-data", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, check=True)
        assert json.loads(done.stdout)["pictures"] == count

    def decoder() -> None:
        list(pool.map(_decode, paths, chunksize=16))

    with pool:
        seconds = in_turn({"ours": ours, "decoder": decoder}, rounds)
    work = Work("validation", f"2 MP photos, {cores} cores, the whole command", count, "photos")
    yield work.compare(seconds, "decoder", "decoding alone, workers running", 0.9)
    few, many = (1_000, 10_000) if quick else (100_000, 1_000_000)
    files = {rows: _long_manifest(folder / f"{rows}.csv", rows) for rows in (few, many)}
    hashes = {rows: np.random.default_rng(0).integers(0, 2**63, (rows, 2)).tolist() for rows in (few, many)}

    def read(rows: int) -> None:
        _duplicate_rows([read_manifest(files[rows], folder)])

    def near(rows: int) -> None:
        list(near_pairs(a << 64 | b for a, b in hashes[rows]))

    for what, job in (("reading a CSV with duplicate rows", read), ("near duplicates among as many hashes", near)):
        seconds = in_turn({"few": lambda j=job: j(few), "many": lambda j=job: j(many)}, min(rounds, 2))
        ratios = [b / a / (many / few) for a, b in zip(seconds["few"], seconds["many"], strict=True)]
        what, against = f"{what}, {many:,} rows", f"{many // few} x the time of {few:,}"
        times = f"{min(seconds['many']):.1f} s", f"{min(seconds['few']):.2f} s"
        yield Line("validation", what, against, ratios, 1.5, *times, more_is_better=False)


def _decode(path: str) -> None:
    read_image(path)


def _long_manifest(path: Path, rows: int) -> str:
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_path,x1,y1,x2,y2\n")
        file.writelines(f"photos/{i:07d}.jpg,{i % 90}.5,{i % 70},{200 + i % 50},{250 + i % 40}\n" for i in range(rows))
    return str(path)

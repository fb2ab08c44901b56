"""Seconds of CPU before anything is done: of help, and of the libraries that a verb waits for."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import Line, in_turn

# Bytecode may be kept, as anybody's Python does: the first round compiles it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
HELP = (["--help"], ["validate-data", "--help"], ["train", "--help"])
MODULES = {
    "train": "ear_teacher_cli.training.run",
    "embed": "ear_teacher_cli.embedding.writer",
    "evaluate": "ear_teacher_cli.quality.evaluate",
    "validate_data": "ear_teacher_cli.data.audit",
}


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    earteach = [sys.executable, "-m", "ear_teacher_cli"]
    for words in HELP:
        seconds = in_turn(
            {
                "ours": cpu_of([*earteach, *words]),
                "python": cpu_of([sys.executable, "-c", "import rich.console, typer"]),
            },
            rounds,
        )
        yield Line("starting", f"earteach {' '.join(words)}", "seconds of CPU", seconds["ours"], 0.3, f"{min(seconds['ours']):.2f} s",
                   f"{min(seconds['python']):.2f} s for typer and rich", more_is_better=False)  # fmt: skip
    for verb in list(MODULES)[: 1 if quick else None]:
        libraries = {"train": "pytorch_lightning, timm", "embed": "torch, timm"}.get(verb, "numpy, PIL.Image")
        ways = {name: cpu_of([sys.executable, "-c", f"import {what}"]) for name, what in
                (("ours", MODULES[verb]), ("libraries", libraries))}  # fmt: skip
        seconds = in_turn(ways, min(rounds, 3))
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["libraries"], strict=True)]
        yield Line("starting", f"all that {verb.replace('_', '-')} imports", f"import {libraries}", ratios, None,
                   f"{min(seconds['ours']):.2f} s", f"{min(seconds['libraries']):.2f} s", more_is_better=False)  # fmt: skip


def cpu_of(command: list[str]) -> Callable[[], float]:
    def run() -> float:
        before = _children()
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
        return _children() - before

    return run


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

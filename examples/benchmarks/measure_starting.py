"""CPU seconds of starting up: of `--help`, and of the imports of a command compared with those of its libraries."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import Line, in_turn

# Python caches bytecode, as in normal use: the warm-up round compiles it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
HELP = (["--help"], ["validate-data", "--help"], ["train", "--help"])
# command -> (its module, libraries that it cannot do without)
IMPORTS = {
    "train": ("ear_teacher_cli.training.run", "pytorch_lightning, timm"),
    "embed": ("ear_teacher_cli.embedding.writer", "torch, timm"),
    "evaluate": ("ear_teacher_cli.quality.evaluate", "numpy, PIL.Image"),
    "validate-data": ("ear_teacher_cli.data.audit", "numpy, PIL.Image"),
}


def measure(folder: Path, rounds: int, quick: bool) -> Iterator[Line]:
    """Yield the rows of the table. `quick`: with tiny inputs."""
    earteach = [sys.executable, "-m", "ear_teacher_cli"]
    for arguments in HELP:
        functions = {
            "ours": cpu_seconds_of([*earteach, *arguments]),
            "libraries": cpu_seconds_of([sys.executable, "-c", "import rich.console, typer"]),
        }
        seconds = in_turn(functions, rounds)
        ours, libraries = (f"{min(seconds[name]):.2f} s" for name in ("ours", "libraries"))
        what, libraries = f"earteach {' '.join(arguments)}", f"{libraries} for typer and rich"
        yield Line("starting", what, "seconds of CPU", seconds["ours"], 0.3, ours, libraries, more_is_better=False)
    for command, (module, imported) in list(IMPORTS.items())[: 1 if quick else None]:
        functions = {
            "ours": cpu_seconds_of([sys.executable, "-c", f"import {module}"]),
            "libraries": cpu_seconds_of([sys.executable, "-c", f"import {imported}"]),
        }
        seconds = in_turn(functions, min(rounds, 3))
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["libraries"], strict=True)]
        ours, libraries = (f"{min(seconds[name]):.2f} s" for name in ("ours", "libraries"))
        what, against = f"all imports of {command}", f"import {imported}"
        yield Line("starting", what, against, ratios, None, ours, libraries, more_is_better=False)


def cpu_seconds_of(command: list[str]) -> Callable[[], float]:
    """Return a function that runs the command and returns its CPU seconds."""

    def run() -> float:
        before = _cpu_seconds_of_children()
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
        return _cpu_seconds_of_children() - before

    return run


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

"""Measure the speed of earteach against alternatives and against upper bounds.

    python bench.py                       # all parts that need no further software; about 20 minutes on two cores
    python bench.py images cache          # some of them
    python bench.py --rounds 7 --json out.json

Each row is the ratio of two times measured one after the other in every round (A B A B), or seconds or megabytes where
it says so: the median and the range over the rounds. Times on a shared machine vary by tens of percent; ratios of
measurements close in time do not.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ear_teacher_cli.cli.process import spin_briefly

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
PARTS = ("images", "cache", "step", "distilling", "embedding", "validation", "starting", "memory", "versions")


@dataclass
class Line:
    """A row of the table. `ours`, `other`: the two measurements as text."""

    part: str
    what: str
    against: str
    ratios: list[float]
    aim: float | None
    ours: str
    other: str
    more_is_better: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def as_row(self) -> str:
        """Return the row in Markdown."""
        aim = "" if self.aim is None else f"{self.aim:g}"
        met = self.aim is None or (self.median >= self.aim) == self.more_is_better
        ratio = f"{'' if met else 'not met: '}{self.median:.2f} [{min(self.ratios):.2f}, {max(self.ratios):.2f}]"
        return f"| {self.part} | {self.what} | {self.against} | {ratio} | {aim} | {self.ours} | {self.other} |"


@dataclass(frozen=True)
class Work:
    """What a set of timed functions does: `count` items of `unit`, described by `what`."""

    part: str
    what: str
    count: int
    unit: str

    def compare(self, seconds: dict[str, list[float]], other: str, against: str, aim: float | None = None) -> Line:
        """Return the row that compares the seconds of "ours" with those of `other`."""
        rates = [rate(seconds[name], self.count, self.unit) for name in ("ours", other)]
        return Line(self.part, self.what, against, speed_up(seconds, "ours", other), aim, *rates)


def in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time the functions in turn for `rounds` rounds after a warm-up round, and return the seconds of each.

    A function that returns a float has measured its seconds itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            returned = function()
            measured = returned if isinstance(returned, float) else time.perf_counter() - start
            if number:
                seconds[name].append(measured)
    return seconds


def speed_up(seconds: dict[str, list[float]], ours: str, other: str) -> list[float]:
    """Return how many times faster `ours` was than `other`, for each round."""
    return [b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]


def rate(seconds: list[float], items: int, unit: str) -> str:
    """Return the median rate as text, e.g. "30.4 images/s"."""
    return f"{items / statistics.median(seconds):.3g} {unit}/s"


def machine() -> str:
    """Describe the processor, the GPU and the versions of the libraries."""
    import numpy
    import PIL
    import torch

    import ear_teacher_cli

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return (
        f"{cores} cores of {name}, {gpu}; earteach {ear_teacher_cli.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Pillow {PIL.__version__}, numpy {numpy.__version__}"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure the parts, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use tiny inputs to check that the parts run")
    parser.add_argument("--json", metavar="FILE", help="write the values of every round")
    options = parser.parse_args(argv)
    spin_briefly()  # as the command does; all loops that are compared gain from it
    import torch  # after it: torch's threads read the setting when they are loaded

    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    print(f"{machine()}; {options.rounds} rounds\n", flush=True)
    print(
        "| part | what | against | ratio [range] | aim | earteach | the other |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    threads, lines = torch.get_num_threads(), []
    for part in options.parts or PARTS:
        torch.set_num_threads(threads)  # another part may have changed it
        measure: Callable[..., Iterator[Line]] = importlib.import_module(f"measure_{part}").measure
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(Path(folder), options.rounds, options.quick):
                print(line.as_row(), flush=True)
                lines.append(line)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

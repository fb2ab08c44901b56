"""Measure how fast earteach is, beside what it is compared with and beside the limit, in turn and in one run.

    python bench.py                       # every part that needs no other software; about 20 minutes on two cores
    python bench.py images cache        # some of them
    python bench.py --rounds 7 --json out.json

Every line is a ratio of two things timed one after the other, round by round (A B A B), or seconds or megabytes
where it says so: its median, and the range over the rounds. Times of shared machines wander by tens of percent; ratios of neighbours in time do not.
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

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
PARTS = ("pictures", "cache", "step", "embedding", "validation", "starting", "memory")


@dataclass
class Line:
    """One line of the table. `ours`, `other`: what each took or did, in words."""

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
        aim = "" if self.aim is None else f"{self.aim:g}"
        met = self.aim is None or (self.median >= self.aim) == self.more_is_better
        found = f"{'' if met else 'not met: '}{self.median:.2f} [{min(self.ratios):.2f}, {max(self.ratios):.2f}]"
        return f"| {self.part} | {self.what} | {self.against} | {found} | {aim} | {self.ours} | {self.other} |"


def in_turn(ways: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in every round, after one that warms up. A way may return seconds that it took itself."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            own = way()
            seconds = time.perf_counter() - start if own is None else own
            if number:
                found[name].append(seconds)
    return found


def speed_up(seconds: dict[str, list[float]], ours: str, other: str) -> list[float]:
    """How many times faster `ours` was than `other`, round by round."""
    return [b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]


def rate(seconds: list[float], items: int, unit: str) -> str:
    return f"{items / statistics.median(seconds):.3g} {unit}/s"


def machine() -> str:
    import numpy
    import PIL

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


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that everything runs; no figures to quote"
    )
    parser.add_argument("--json", metavar="FILE", help="write every round's figures")
    options = parser.parse_args(words)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    print(f"{machine()}; {options.rounds} rounds\n", flush=True)
    print(
        "| part | what | against | ratio [range] | aim | ours | the other |\n|---|---|---|---|---|---|---|", flush=True
    )
    threads, lines = torch.get_num_threads(), []
    for part in options.parts or PARTS:
        torch.set_num_threads(threads)  # a part may have chosen another number
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

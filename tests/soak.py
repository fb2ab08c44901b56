"""Kill `earteach` at random moments and check that nothing is lost or damaged.

    python tests/soak.py --kills 60                                                             # make soak

First a run, a collage, an export and embeddings are made without interruption, as the reference. Then each command is
started, killed (SIGKILL, SIGTERM or Ctrl-C at a random moment), continued, killed again, and so on until it finishes.
After every kill all files under final names must be complete, and no process may remain. At the end the weights,
metrics.csv, collage, export and embeddings must be bit-identical to the reference, and no temporary file may remain.

Processes are forked from this one, which has imported everything: they start in milliseconds, and most kills hit the work
instead of `import torch`.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

import ear_teacher_cli.training.run  # noqa: F401  (imported before the fork)
from ear_teacher_cli.cli.app import main as earteach
from ear_teacher_cli.model.checkpoint import read_checkpoint, read_safetensors

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from conftest import SMALL, metrics_of
from make_sample_ears import main as make_sample_ears

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIME_LIMIT = 300  # seconds after which a process counts as hanging
EXPERIMENT = "ear_teacher"
OUTPUTS = {  # command -> files that must be bit-identical to the reference
    "train": ["metrics.csv"],
    "collage": ["x.png"],
    "export-backbone": ["x.safetensors", "x.whitening.safetensors"],
    "embed": ["x.npy", "x.csv", "x.json"],
}


@dataclass
class Tally:
    """Counts and faults of a soak test."""

    kills: Counter = field(default_factory=Counter)  # (command, signal) -> kills
    finished: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """A command under test. `arguments`: output folder -> arguments. `seconds`: its duration without interruption."""

    name: str
    arguments: Callable[[Path], list]
    seconds: float
    reference: Path


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a forked process with a process group of its own, and return its process id."""
    sys.stdout.flush()
    ready, started = os.pipe()
    pid = os.fork()
    if pid:
        os.close(started)
        os.read(ready, 1)  # wait until the process has its group, which may be killed as a whole
        os.close(ready)
        return pid
    code = 1
    try:
        os.close(ready)
        os.setsid()
        os.close(started)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = work() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  (the process ends here)
        traceback.print_exc()
    finally:
        os._exit(int(code))


def run_earteach(arguments: list, log: Path) -> None:
    """Run `earteach` in this process, with stdout and stderr in a log."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["earteach", *map(str, arguments)]
    earteach()


def wait(pid: int, seconds: float) -> int | None:
    """Return the exit code of a process (negative for a signal), or None if it still runs after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def succeeds(work: Callable[[], object]) -> bool:
    """Return whether `work` succeeds in a process of its own."""
    return wait(fork(work), TIME_LIMIT) == 0


def processes_of(group: int) -> list[int]:
    """Return the ids of the processes of a group, except zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parts = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(parts[2]) == group and parts[0] != "Z":
                found.append(int(entry.name))
    return found


def read_all_files(folder: Path) -> None:
    """Read every file under a final name. Raises an exception if one is incomplete."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith(".") or any(part.startswith(".") for part in path.parent.parts):
            continue
        if path.suffix == ".ckpt":
            read_checkpoint(path)
        elif path.suffix == ".safetensors":
            read_safetensors(path)
        elif path.suffix in (".png", ".gif"):
            Image.open(path).load()
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            assert rows and all(None not in row and None not in row.values() for row in rows), path
        elif path.suffix == ".toml":
            tomllib.loads(path.read_text())
        elif path.suffix == ".npy":
            assert len(path.read_bytes()) > 128, path


def require_same_weights(first: Path, second: Path) -> None:
    """Assert that the last checkpoints of two runs have equal weights."""
    a, b = (read_checkpoint(path / "checkpoints" / "last.ckpt").content["state_dict"] for path in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill_until_done(command: Command, folder: Path, rng: random.Random, tally: Tally, most: int) -> bool:
    """Start a command, kill and continue it `most` times at random moments, and let it finish.

    Add to `tally`. Return False on a fault.
    """
    log = folder / "log.txt"
    log.touch()  # a process may be killed before it opens it
    arguments, kills = command.arguments(folder), 0
    while True:
        pid = fork(lambda arguments=arguments: run_earteach(arguments, log))
        code = wait(pid, rng.uniform(0, command.seconds * 0.8) if kills < most else TIME_LIMIT)
        fault = None
        if code is None and kills == most:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            fault = f"hung after {kills} kills"
        elif code is None:
            number = rng.choice(SIGNALS)
            kills += 1
            tally.kills[command.name, number.name] += 1
            code = _kill(pid, number, to_group=number is signal.SIGINT or rng.random() < 0.5)
            if code not in (-number, 128 + number, 0):
                fault = f"exit code {code} after {number.name}; {log.read_text()[-2000:]}"
        elif code != 0:
            fault = f"exit code {code} without a kill; {log.read_text()[-600:]}"
        fault = fault or _fault_after(pid, folder, finished=code == 0)
        if fault:
            tally.faults.append(f"{command.name}: {fault}")
            return False
        if code == 0:
            tally.finished[command.name] += 1
            return True
        arguments = arguments_to_continue(command, folder)


def _kill(pid: int, number: signal.Signals, to_group: bool) -> int | None:
    """Send a signal to a process, or to its group as a terminal or a scheduler does. Return the exit code."""
    if to_group:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)
    return wait(pid, TIME_LIMIT)


def _fault_after(pid: int, folder: Path, finished: bool) -> str | None:
    """Describe what is wrong after the process of a command has ended, or return None."""
    end = time.monotonic() + 30
    while processes_of(pid) and time.monotonic() < end:
        time.sleep(0.1)
    log = (folder / "log.txt").read_text(errors="replace")
    if processes_of(pid):
        return "child processes remain"
    if "Traceback" in log:
        return f"a traceback; {log[-2000:]}"
    if not succeeds(lambda: read_all_files(folder)):
        return "an incomplete file under a final name"
    temporary = [str(path) for path in folder.rglob("*") if path.name.endswith((".part", ".unfinished"))]
    if finished and temporary:
        return f"temporary files remain: {temporary}"
    return None


def measure(arguments: list, log: Path) -> float:
    """Run a command without interruption and return its duration in seconds."""
    start = time.monotonic()
    assert succeeds(lambda: run_earteach(arguments, log)), log.read_text(encoding="utf-8")
    return time.monotonic() - start


def make_reference(folder: Path, workers: int) -> list[Command]:
    """Run all commands without interruption in `folder`/reference, and return them."""
    ears, many = folder / "ears", folder / "many.csv"
    sizes = ["--people", "11", "--photos", "4", "--val-people", "2", "--eval-people", "3", "--seed", "1"]
    assert succeeds(lambda: make_sample_ears([str(ears), *sizes]))
    lines = (ears / "eval.csv").read_text().splitlines()
    many.write_text("\n".join([lines[0], *(lines[1:] * 40)]) + "\n")
    reference = folder / "reference"
    run = reference / EXPERIMENT
    train = [
        "train",
        "--train-metadata",
        ears / "train_teacher.npy",
        "--val-metadata",
        ears / "val_teacher.npy",
        *SMALL,
    ]
    train += ["--max-epochs", 6, "--preset", "recommended", "--ema-decay", 0.9, "--cluster-every", 2]
    train += ["--num-workers", workers]
    embed = ["--root-dir", ears, "--weights", run, "--batch-size", 8, "--num-workers", workers]
    made = reference / "made"
    made.mkdir(parents=True)
    commands = {
        "train": lambda out: [*train, "--output-dir", out],
        "collage": lambda out: ["collage", run, "-o", out / "x.png"],
        "export-backbone": lambda out: ["export-backbone", run, out / "x.safetensors"],
        "embed": lambda out: ["embed", many, out / "x.npy", *embed],
    }
    found = []
    for name, arguments in commands.items():
        seconds = measure(arguments(reference if name == "train" else made), reference / "log.txt")
        found.append(Command(name, arguments, seconds, run if name == "train" else made))
    return found


def soak(kills: int, seed: int, folder: Path, workers: int) -> Tally:
    """Repeat all commands until there are at least `kills` kills or a fault."""
    rng, tally = random.Random(seed), Tally()
    commands = make_reference(folder, workers)
    number = 0
    while sum(tally.kills.values()) < kills and not tally.faults:
        number += 1
        place = folder / f"{number}"
        for command in commands:
            out = place if command.name == "train" else place / command.name
            out.mkdir(parents=True, exist_ok=True)
            if kill_until_done(command, out, rng, tally, most=6 if command.name == "train" else 2):
                compare(command, out, tally)
        shutil.rmtree(place)
        print(f"round {number}: {sum(tally.kills.values())} kills, {len(tally.faults)} faults", flush=True)
    return tally


def content_of(path: Path) -> object:
    """The bytes of a file; of metrics.csv the rows without what depends on the machine."""
    return metrics_of(path.parent) if path.name == "metrics.csv" else path.read_bytes()


def compare(command: Command, out: Path, tally: Tally) -> None:
    """Add a fault for everything that differs from the reference."""
    if command.name == "train":
        out = out / EXPERIMENT
        if not succeeds(lambda: require_same_weights(command.reference, out)):
            tally.faults.append("train: the weights differ from the uninterrupted run's")
    for name in OUTPUTS[command.name]:
        if content_of(command.reference / name) != content_of(out / name):
            tally.faults.append(f"{command.name}: {name} differs from the uninterrupted one")


def arguments_to_continue(command: Command, out: Path) -> list:
    """Return the arguments with which a user continues the command after a kill."""
    first = command.arguments(out)
    if command.name == "train":
        return ["resume", out / EXPERIMENT] if (out / EXPERIMENT / "config.toml").exists() else first
    if command.name == "embed" and list(out.glob(".*.unfinished/state.json")):
        return [*first, "--resume"]
    return [*first, "--overwrite"]


def main(argv: list[str] | None = None) -> int:
    """Run the soak test and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="kills, at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that load images (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(options.kills, options.seed, Path(folder), options.workers)
    for name in tally.finished:
        kills = ", ".join(f"{tally.kills[name, number.name]} {number.name}" for number in SIGNALS)
        print(f"{name}: {kills}; finished {tally.finished[name]} times")
    print(f"{sum(tally.kills.values())} kills, {len(tally.faults)} lost")
    for fault in tally.faults:
        print(f"FAULT {fault}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Kill `earteach` at random moments, again and again, and look whether anything is lost.

    python tests/soak.py --kills 60                                                             # make soak

One uninterrupted run, collage, export and embed are made first. Then each is started and killed (SIGKILL, SIGTERM or
Ctrl-C, at a moment drawn from the whole of its life), gone on with, killed again, and so on until it is done. After
every kill all files under final names must be whole; at the end the weights, metrics.csv, collage, export and
embeddings must be those of the uninterrupted ones, to the bit, and no temporary file may be left, nor a process.

Processes are forked from one that has imported everything: a kill costs seconds, and most of them fall into work
instead of into `import torch`.
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
from ear_teacher_cli.cli.app import app
from ear_teacher_cli.model.checkpoint import read_checkpoint, read_safetensors

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from conftest import SMALL
from make_sample_ears import main as make_sample_ears

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 300  # seconds until something hangs


@dataclass
class Tally:
    kills: Counter = field(default_factory=Counter)  # (what, signal) -> kills
    finished: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def forked(work: Callable[[], object]) -> int:
    """Do it in a process (and a process group) of its own; its number."""
    sys.stdout.flush()
    ready, begun = os.pipe()
    number = os.fork()
    if number:
        os.close(begun)
        os.read(ready, 1)  # until it has its group, which may be killed as a whole
        os.close(ready)
        return number
    code = 1
    try:
        os.close(ready)
        os.setsid()
        os.close(begun)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = work() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  (the end of this process, whatever it is)
        traceback.print_exc()
    finally:
        os._exit(int(code))


def said(words: list, log: Path) -> Callable[[], None]:
    def work() -> None:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["earteach", *map(str, words)]
        app.main()

    return work


def ended(number: int, seconds: float) -> int | None:
    """Exit code, negative of a signal; None if it is still at work after so long."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def left_behind(group: int) -> list[int]:
    """Living processes of a group."""
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


def whole(folder: Path) -> int:
    """In a process of its own: 0 if every file under a final name is whole."""
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
    return 0


def same_weights(first: Path, second: Path) -> int:
    a, b = (read_checkpoint(path / "checkpoints" / "last.ckpt").content["state_dict"] for path in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return 0


def kill_until_done(
    what: str, first: list, folder: Path, seconds: float, chance: random.Random, tally: Tally, most: int
) -> bool:
    """Start it, and go on with it, each time killed at a random moment, `most` times; then let it finish. False on a
    fault."""
    words, kills = first, 0
    (folder / "log.txt").touch()  # a process may be killed before it opens it
    while True:
        number = forked(said(words, folder / "log.txt"))
        code = ended(number, chance.uniform(0, seconds * 0.8) if kills < most else PATIENCE)
        if code is None and kills == most:
            os.killpg(number, signal.SIGKILL)
            os.waitpid(number, 0)
            tally.faults.append(f"{what}: hung after {kills} kills")
            return False
        if code is None:
            sign = chance.choice(SIGNALS)
            if sign is signal.SIGINT or chance.random() < 0.5:
                os.killpg(number, sign)  # as a terminal and a scheduler do
            else:
                os.kill(number, sign)
            kills += 1
            tally.kills[what, sign.name] += 1
            code = ended(number, PATIENCE)
            if code not in (-sign, 128 + sign, 0):
                tally.faults.append(f"{what}: {sign.name} ended in {code}; {(folder / 'log.txt').read_text()[-2000:]}")
                return False
        elif code != 0:
            tally.faults.append(f"{what}: exit {code} without a kill; {(folder / 'log.txt').read_text()[-600:]}")
            return False
        until = time.monotonic() + 30
        while left_behind(number) and time.monotonic() < until:
            time.sleep(0.1)
        if left_behind(number):
            tally.faults.append(f"{what}: processes are left behind")
            return False
        if "Traceback" in (folder / "log.txt").read_text(errors="replace"):
            tally.faults.append(f"{what}: a traceback; {(folder / 'log.txt').read_text()[-2000:]}")
            return False
        if ended(forked(lambda: whole(folder)), PATIENCE) != 0:
            tally.faults.append(f"{what}: a half-written file under a final name")
            return False
        if code == 0:
            tally.finished[what] += 1
            if any(path.name.endswith(".part") or path.name.endswith(".unfinished") for path in folder.rglob("*")):
                tally.faults.append(f"{what}: temporary files are left: {[str(p) for p in folder.rglob('.*')]}")
                return False
            return True
        words = to_go_on(what, first, folder)


def timed(words: list, log: Path) -> float:
    start = time.monotonic()
    code = ended(forked(said(words, log)), PATIENCE)
    assert code == 0, log.read_text(encoding="utf-8")
    return time.monotonic() - start


def soak(kills: int, seed: int, folder: Path, workers: int) -> Tally:
    """`kills` kills at least."""
    chance, tally = random.Random(seed), Tally()
    ears = folder / "ears"
    words = [str(ears), "--people", "11", "--photos", "4", "--val-people", "2", "--eval-people", "3", "--seed", "1"]
    assert ended(forked(lambda: make_sample_ears(words)), PATIENCE) == 0
    many = folder / "many.csv"
    lines = (ears / "eval.csv").read_text().splitlines()
    many.write_text("\n".join([lines[0], *(lines[1:] * 40)]) + "\n")
    run = ["train", "--train-metadata", ears / "train_teacher.npy", "--val-metadata", ears / "val_teacher.npy", *SMALL,
           "--max-epochs", 6, "--preset", "recommended", "--ema-decay", 0.9, "--num-workers", workers,
           "--cluster-every", 2]  # fmt: skip
    reference = folder / "reference"
    reference.mkdir()
    log = reference / "log.txt"
    seconds = {"train": timed([*run, "--output-dir", reference], log)}
    experiment = reference / "ear_teacher"
    verbs = {
        "collage": lambda out: ["collage", experiment, "-o", out / "x.png"],
        "export-backbone": lambda out: ["export-backbone", experiment, out / "x.safetensors"],
        "embed": lambda out: ["embed", many, out / "x.npy", "--root-dir", ears, "--weights", experiment, "--batch-size", 8,
                              "--num-workers", workers],
    }  # fmt: skip
    made = reference / "made"
    made.mkdir()
    for verb, words_for in verbs.items():
        seconds[verb] = timed(words_for(made), log)
    number = 0
    while sum(tally.kills.values()) < kills and not tally.faults:
        number += 1
        place = folder / f"{number}"
        place.mkdir()
        starts = {"train": lambda out: [*run, "--output-dir", out], **verbs}
        for what, start in starts.items():
            out = place if what == "train" else place / what
            out.mkdir(exist_ok=True)
            most = 6 if what == "train" else 2
            if kill_until_done(what, start(out), out, seconds[what], chance, tally, most):
                compare(what, experiment if what == "train" else made, out, tally)
        shutil.rmtree(place)
        print(f"round {number}: {sum(tally.kills.values())} kills, {len(tally.faults)} faults", flush=True)
    return tally


def compare(what: str, wanted: Path, out: Path, tally: Tally) -> None:
    """Note what is not as the uninterrupted one made it."""
    if what == "train":
        found = out / "ear_teacher"
        if ended(forked(lambda: same_weights(wanted, found)), PATIENCE) != 0:
            tally.faults.append("train: other weights than the uninterrupted run's")
        wanted, out, names = wanted, found, ["metrics.csv"]
    else:
        names = {"collage": ["x.png"], "embed": ["x.npy", "x.csv", "x.json"]}.get(
            what, ["x.safetensors", "x.whitening.safetensors"]
        )
    for name in names:
        if (wanted / name).read_bytes() != (out / name).read_bytes():
            tally.faults.append(f"{what}: {name} is not the uninterrupted one's")


def to_go_on(what: str, first: list, out: Path) -> list:
    """What a user types after a kill."""
    if what == "train":
        return ["resume", out / "ear_teacher"] if (out / "ear_teacher" / "config.toml").exists() else first
    if what == "embed" and list(out.glob(".*.unfinished/state.json")):
        return [*first, "--resume"]
    return [*first, "--overwrite"]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="at least so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that load images (default: %(default)s)")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(options.kills, options.seed, Path(folder), options.workers)
    for what in tally.finished:
        each = ", ".join(f"{tally.kills[what, sign.name]} {sign.name}" for sign in SIGNALS)
        print(f"{what}: {each}; finished {tally.finished[what]} times")
    print(f"{sum(tally.kills.values())} kills, {len(tally.faults)} lost")
    for fault in tally.faults:
        print(f"FAULT {fault}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())

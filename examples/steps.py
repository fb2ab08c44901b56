"""What demo.py and students.py share: say a step, show a command as it would be typed, run it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

EXAMPLES = Path(__file__).resolve().parent
CTRL_C = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
NEW_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows: Ctrl-Break goes to a group of processes


class StepFailed(Exception):
    """A command ended with an exit code other than 0: `code`."""

    def __init__(self, command: str, code: int, errors: str = ""):
        super().__init__(f"{command}: exit code {code}")
        self.code, self.errors = code, errors


def step(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr, flush=True)


def enter_new_folder(name: str) -> None:
    """Make it and go into it. Exits with 1 if there is something of that name: it stays."""
    try:
        Path(name).mkdir()
    except FileExistsError:
        sys.exit(f"{name}: exists already; remove it, or name another folder")
    except OSError as error:
        sys.exit(f"{name}: cannot be made ({error.strerror}); name another folder")
    os.chdir(name)


def run(
    *words: object, interrupt_when: Callable[[], bool] | None = None, tee: str | None = None, keep_errors: bool = False
) -> None:
    """Run `earteach ...`, or `python ...`, with this interpreter. Raises StepFailed.

    `interrupt_when`: press Ctrl-C as soon as it is true, and take any exit code. `tee`: a file that gets what the command
    prints to stdout, too. `keep_errors`: what it prints to stderr is part of StepFailed.
    """
    shown = [str(word) for word in words]
    print(f"$ {shlex.join(shown)}", file=sys.stderr, flush=True)
    program = {"earteach": [sys.executable, "-m", "ear_teacher_cli"], "python": [sys.executable]}[shown[0]]
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = subprocess.Popen(
        [*program, *shown[1:]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE if tee else None,
        stderr=subprocess.PIPE if keep_errors else None,
        creationflags=NEW_GROUP if interrupt_when else 0,
    )
    with command as process:
        try:
            _follow(process, " ".join(shown[:2]), interrupt_when, tee, keep_errors)
        except KeyboardInterrupt:  # the terminal sends it to the command, too, unless that is in a group of its own
            if interrupt_when is not None and NEW_GROUP:
                process.send_signal(CTRL_C)
            process.wait()
            raise


def _follow(
    process: subprocess.Popen, name: str, interrupt_when: Callable[[], bool] | None, tee: str | None, keep_errors: bool
) -> None:
    errors = ""
    if tee:
        with open(tee, "w", encoding="utf-8") as file:
            _copy(process.stdout, [sys.stdout, file])
    if keep_errors:
        errors = _copy(process.stderr, [sys.stderr])
    if interrupt_when is not None:
        _interrupt(process, interrupt_when)
    elif process.wait() != 0:
        raise StepFailed(name, process.returncode, errors)


def _copy(source: IO[str] | None, targets: Sequence[IO[str]]) -> str:
    """Lines as they come, to all targets; returns them."""
    assert source is not None
    lines = []
    for line in source:
        lines.append(line)
        for target in targets:
            target.write(line)
            target.flush()
    return "".join(lines)


def _interrupt(process: subprocess.Popen, when: Callable[[], bool]) -> None:
    while process.poll() is None and not when():
        time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(CTRL_C)
    if process.wait() != 0:
        print(f"(stopped: exit code {process.returncode})", file=sys.stderr, flush=True)


def main(steps: Callable[[], None]) -> None:
    """Run `steps()`; a command that fails ends it with that command's exit code, Ctrl-C with 130."""
    try:
        steps()
    except StepFailed as failed:
        print(f"{failed}; what it printed tells why", file=sys.stderr)
        sys.exit(failed.code if failed.code > 0 else 1)
    except KeyboardInterrupt:
        sys.exit(130)

"""Print the steps of an example and run its commands; shared by demo.py and students.py."""

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
NEW_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows sends Ctrl-Break to a process group


class StepFailed(Exception):
    """A command ended with a non-zero exit code. `errors`: what it printed to stderr, if that was kept."""

    def __init__(self, command: str, code: int, errors: str = ""):
        super().__init__(f"{command}: exit code {code}")
        self.code, self.errors = code, errors


def step(text: str) -> None:
    """Print the title of a step."""
    print(f"\n== {text}", file=sys.stderr, flush=True)


def enter_new_folder(name: str) -> None:
    """Make a folder and change into it. Exit with 1 if the name exists or the folder cannot be made."""
    try:
        Path(name).mkdir()
    except FileExistsError:
        sys.exit(f"{name}: exists already; remove it, or give another folder")
    except OSError as error:
        sys.exit(f"{name}: cannot be made ({error.strerror}); give another folder")
    os.chdir(name)


def run(
    *command: object,
    interrupt_when: Callable[[], bool] | None = None,
    tee: str | None = None,
    keep_errors: bool = False,
) -> None:
    """Print a command `earteach ...` or `python ...` and run it with this interpreter.

    `interrupt_when`: send Ctrl-C as soon as it returns True, and accept any exit code. `tee`: also write stdout to this
    file. `keep_errors`: keep stderr for StepFailed. Raises StepFailed if the exit code is not 0.
    """
    shown = [str(argument) for argument in command]
    print(f"$ {shlex.join(shown)}", file=sys.stderr, flush=True)
    program = {"earteach": [sys.executable, "-m", "ear_teacher_cli"], "python": [sys.executable]}[shown[0]]
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = subprocess.Popen(
        [*program, *shown[1:]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE if tee else None,
        stderr=subprocess.PIPE if keep_errors else None,
        creationflags=NEW_GROUP if interrupt_when else 0,
    )
    with started as process:
        try:
            _follow(process, " ".join(shown[:2]), interrupt_when, tee, keep_errors)
        except KeyboardInterrupt:  # the terminal interrupts the command too, unless it is in another group
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
    """Copy lines to all targets as they arrive, and return them."""
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
        print(f"(interrupted: exit code {process.returncode})", file=sys.stderr, flush=True)


def main(steps: Callable[[], None]) -> None:
    """Run `steps()`. Exit with the code of a command that fails, or with 130 on Ctrl-C."""
    try:
        steps()
    except StepFailed as failed:
        print(f"{failed}; see its output above", file=sys.stderr)
        sys.exit(failed.code if failed.code > 0 else 1)
    except KeyboardInterrupt:
        sys.exit(130)

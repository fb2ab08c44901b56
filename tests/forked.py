"""Python processes forked from this one, which has imported torch already: half a second instead of six.

`Popen`, `run` and `ranks` take a Python command line and stand for `subprocess.Popen` and `subprocess.run`: a process of its own,
with its own signals, environment, folder and exit code. What they do not show is how Python starts and imports; tests of
that use subprocess. Where processes cannot be forked, subprocess is what they are.
"""

import gc
import io
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Sequence

import torch

PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired


class _Forked:
    """The part of subprocess.Popen that the tests use; stdin is empty, pipes are text."""

    def __init__(
        self, command: Sequence[object], *, env=None, cwd=None, stdout=None, stderr=None, start_new_session=False, **_
    ):
        import ear_teacher_cli.training.run  # noqa: F401  (what a command would take seconds to import)

        self.args, self.returncode = list(map(str, command)), None
        pipes = {number: os.pipe() for number, target in ((1, stdout), (2, stderr)) if target == PIPE}
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number, target in ((1, stdout), (2, stderr)):
                    if number in pipes:
                        os.dup2(pipes[number][1], number)
                    elif target == DEVNULL:
                        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
                if start_new_session:
                    os.setsid()
                code = _python(self.args[1:], env, cwd)
            finally:
                os._exit(code)
        for _, end in pipes.values():
            os.close(end)
        self.stdout, self.stderr = (
            open(pipes[number][0], encoding="utf-8", errors="replace") if number in pipes else None for number in (1, 2)
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Raises TimeoutExpired, having killed the process."""
        texts: dict[int, str] = {}
        pipes = {number: pipe for number, pipe in ((1, self.stdout), (2, self.stderr)) if pipe}
        readers = [
            threading.Thread(target=lambda n=number, p=pipe: texts.__setitem__(n, p.read()), daemon=True)
            for number, pipe in pipes.items()
        ]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except TimeoutExpired:
            self.kill()
            raise
        for reader in readers:
            reader.join(timeout)
        for pipe in pipes.values():
            pipe.close()
        return texts.get(1), texts.get(2)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in (self.stdout, self.stderr):
            if pipe:
                pipe.close()
        self.wait()


def _python(words: list[str], env: dict[str, str] | None, cwd: object) -> int:
    """What `python WORDS` does, here; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.process._children.clear()  # those of the process that this one was forked from
    gc.freeze()  # unreachable objects of that process stay: the destructor of a loader's iterator fails in another one
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    warnings.resetwarnings()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.unraisablehook = sys.__unraisablehook__  # not pytest's
    sys.stdin = open(os.devnull, encoding="utf-8")
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            main.__spec__ = None
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (as Python does)
        traceback.print_exc()
        code = 1
    multiprocessing.util._exit_function()
    sys.stdout.flush()
    return code


_CAN_FORK = hasattr(os, "fork") and torch.get_num_threads() == 1


def _start(command: Sequence[object], **options) -> subprocess.Popen:
    return subprocess.Popen(list(map(str, command)), **options)


Popen = _Forked if _CAN_FORK else _start


def run(command: Sequence[object], *, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """As subprocess.run(command, capture_output=True, text=True), with a time limit."""
    if not _CAN_FORK:
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, **options)
    with Popen(command, stdout=PIPE, stderr=PIPE, **options) as process:
        out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ranks(command: Sequence[object], world: int, *, timeout: float = 300) -> tuple[int, str]:
    """Run it in `world` processes that know of each other as torchrun tells them. (the worst exit code, stderr of all)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in map(str, range(world)):
        mine = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world),
            "TORCHELASTIC_RUN_ID": "x",
        }
        environment = {**os.environ, **address, **mine, "LOCAL_WORLD_SIZE": str(world)}
        started.append(Popen(command, env=environment, stderr=PIPE, text=True))
    try:
        texts = [process.communicate(timeout=timeout)[1] or "" for process in started]
    finally:
        for process in started:
            process.kill()
    return max(abs(process.wait()) for process in started), "".join(texts)

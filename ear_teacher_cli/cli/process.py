"""The process of a command: its signals, its exit code, and the end of its children."""

import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import typer

from .. import library_messages, platform
from ..errors import Stopped
from ..files import printable

INTERRUPTED = 130  # exit code after Ctrl-C
_SPINS = "20000"  # about a millisecond; 1,000 made training steps of the smallest model 1.2 times as long
_AGAIN_S = 0.05  # until a signal that was lost is sent again: by then the __del__ is over


@dataclass
class Lifetime:
    """The stop signals that reached this process, and the exit code that they mean."""

    signals: list[int] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether a stop signal (SIGTERM, SIGHUP; not Ctrl-C) was received."""
        return bool(self.signals)

    def exit_code(self, otherwise: Any) -> Any:
        """Return the exit code of the first stop signal, else `otherwise`."""
        return 128 + self.signals[0] if self.signals else otherwise


def spin_briefly() -> None:
    """Let threads of torch that wait for each other sleep soon, unless the environment says how they wait. Call it
    before torch is imported.

    By default those of GNU's OpenMP (torch on Linux) spin for many milliseconds, on cores that other processes need.
    Results do not depend on it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


@contextmanager
def lifetime() -> Iterator[Lifetime]:
    """Raise Stopped where a stop signal arrives; at the end kill the children, as one may hang in a decoder."""
    life, process = Lifetime(), os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() == process:  # not in a loader that was just forked
            life.signals.append(number)
            raise Stopped(number)

    def unraisable(what: Any) -> None:
        error = what.exc_value
        if isinstance(error, KeyboardInterrupt):  # a signal's, in a __del__ for example, which cannot pass it on
            number = error.exit_code - 128 if isinstance(error, Stopped) else signal.SIGINT
            again = threading.Timer(_AGAIN_S, platform.signal_main_thread, (number,))
            again.daemon = True
            again.start()
        elif not _is_half_built_loader(what):
            sys.__unraisablehook__(what)

    platform.reuse_freed_memory()
    spin_briefly()
    sys.unraisablehook = unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows, or a locale, may hold few characters
            stream.reconfigure(errors="backslashreplace")
    platform.handle_stop_signals(stop, but=(signal.SIGINT,))  # for which Python raises KeyboardInterrupt
    try:
        yield life
    finally:
        sys.unraisablehook = lambda what: None  # half-built objects may raise while they are destroyed
        platform.ignore_stop_signals()
        library_messages.show(False)
        with platform.child_exits_unnoticed():
            for child in multiprocessing.active_children():
                child.kill()
                child.join(10)
        # from here on a stop signal ends the process at once
        platform.handle_stop_signals(signal.SIG_DFL, ignored_too=True)


def _is_half_built_loader(what: Any) -> bool:
    """Return whether the error comes from a loader whose making a signal interrupted."""
    name = getattr(what.object, "__qualname__", "")
    return isinstance(what.exc_value, AttributeError) and name == "_MultiProcessingDataLoaderIter.__del__"


def fail(message: str, code: int, error: BaseException) -> NoReturn:
    """Print an error as one line, below its traceback if --verbose was given, and exit."""
    if library_messages.are_shown():
        traceback.print_exception(error)
    typer.echo(f"earteach: {printable(message)}", err=True)
    sys.exit(code)


def drop_stdout() -> NoReturn:
    """Exit quietly after the reader of a pipe (`| head`) has closed it; what is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)

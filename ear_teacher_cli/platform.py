"""Everything that differs between operating systems: signals, locks, shared memory, and what the machine has.

Linux, macOS and Windows. No other module imports what only some of them have, or asks which one it runs on. A feature
that a system lacks is left out there (a time limit on decoders, say), and the docstring of the function says so.
"""

import ctypes
import errno
import os
import re
import shlex
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

# Windows neither removes nor replaces a file that a process has open.
OPEN_FILES_CAN_BE_REMOVED = os.name != "nt"
# Elsewhere than on Linux memory that processes share has limits of its own, and outlives a process that is killed.
MEMORY_IS_SHARED_FREELY = hasattr(os, "memfd_create")

# Signals ---------------------------------------------------------------------------------------------------------------

# Ctrl-C; what schedulers send before they kill; a terminal that closes; on Windows Ctrl-Break and a closing console.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)


def handle_stop_signals(handler: Any, *, but: tuple[int, ...] = (), ignored_too: bool = False) -> None:
    """Set the handler of every stop signal `but` some. A signal that was ignored when the process started (nohup, a
    shell's background job) stays ignored unless `ignored_too`."""
    for number in STOP_SIGNALS:
        if number not in but and (ignored_too or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """For a process that works for another one: Ctrl-C reaches them all, and the other one decides when this one ends."""
    handle_stop_signals(signal.SIG_IGN, ignored_too=True)


def _in_main_thread() -> bool:
    """Only there handlers of signals can be set, and are they called."""
    return threading.current_thread() is threading.main_thread()


def interrupts_ignored() -> AbstractContextManager[None]:
    """Ignore Ctrl-C for the few milliseconds in which processes are started, which inherit that: while Python starts and
    imports, it would print a traceback. Windows does not let them inherit it."""
    return _handled("SIGINT", signal.SIG_IGN)


def child_exits_unnoticed() -> AbstractContextManager[None]:
    """Without torch's handler, which raises an error when a DataLoader's worker is killed. Windows has none."""
    return _handled("SIGCHLD", signal.SIG_DFL)


@contextmanager
def _handled(name: str, handler: Any) -> Iterator[None]:
    """Set the handler of a signal for a while, where the system has it and this thread may."""
    if not hasattr(signal, name) or not _in_main_thread():
        yield
        return
    number = getattr(signal, name)
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def cpu_time_limit(seconds: float, error: Callable[[], BaseException]) -> Iterator[None]:
    """Raise `error()` in the body once it has computed for `seconds`. Only in a main thread; Windows has no such timer,
    and there the body may take any time."""
    if not hasattr(signal, "setitimer") or not _in_main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise error()

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# Files -----------------------------------------------------------------------------------------------------------------


def open_own_file(path: str | Path, flags: int = 0, mode: int = 0o600) -> int:
    """Open a file for reading and writing, without following a link or waiting for a FIFO. Returns a file descriptor.
    Raises OSError."""
    flags |= sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    return os.open(path, flags | os.O_RDWR, mode)


def open_photograph(path: str) -> int:
    """Open for reading without waiting for a FIFO's writer. Returns a file descriptor. Raises OSError, ValueError."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def is_plain_file(handle: int) -> bool:
    """Whether it is a regular file with one name."""
    status = os.fstat(handle)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def is_private_file(handle: int) -> bool:
    """Whether it is a plain file of this user's; Windows does not say whose it is."""
    return is_plain_file(handle) and (not hasattr(os, "geteuid") or os.fstat(handle).st_uid == os.geteuid())


def make_private(handle: int) -> None:
    """Let this user alone read and write the file. On Windows the folder's rights hold."""
    if hasattr(os, "fchmod"):
        os.fchmod(handle, 0o600)


def bytes_on_disk(status: os.stat_result) -> int:
    """What a file takes, without its holes where the system counts them."""
    return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes from `offset`. Where there is no pread the file's position moves: one thread at a time."""
    if hasattr(os, "pread"):
        return os.pread(handle, count, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, count)


def write_at(handle: int, data: bytes, offset: int) -> None:
    """Write at `offset`, in one call where the system has pwrite. Raises OSError, also if not all of it was written."""
    if hasattr(os, "pwrite"):
        written = os.pwrite(handle, data, offset)
    else:
        os.lseek(handle, offset, os.SEEK_SET)
        written = os.write(handle, data)
    if written != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def quoted(word: str) -> str:
    """A word as it can be typed in this system's shell: sh, or on Windows both cmd and PowerShell (where `%NAME%` in a
    word would still be replaced by cmd)."""
    if os.name != "nt":
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w.:\\/-]+", word) else f'"{word}"'


# Locks -----------------------------------------------------------------------------------------------------------------

_locked: set[int] = set()  # file descriptors with a lock


def lock(handle: int) -> bool:
    """Lock an open file against other processes until `unlock_and_close`, or until this process ends. Returns False if
    another one has the lock; True too on a file system, or a system, without locks."""
    from filelock import lock_descriptor

    try:
        if not lock_descriptor(handle, blocking=False):
            return False
    except OSError:
        return True
    _locked.add(handle)
    return True


def unlock_and_close(handle: int) -> None:
    """Close what `lock` was called for."""
    _locked.discard(handle)
    os.close(handle)


def claim(handle: int) -> None:
    """Keep `remove_unclaimed` from removing an open file, until it is closed; several processes may claim one file. On
    Windows nothing needs to be done: an open file cannot be removed."""
    with suppress(ImportError, OSError):  # a system, or a file system, without locks
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH)


def remove_unclaimed(path: str | Path) -> bool:
    """Remove a file unless a process has claimed it, it is a link, or the file system has no locks that would tell.
    Returns whether it is gone."""
    try:
        if OPEN_FILES_CAN_BE_REMOVED:
            with _nobody_claims(open_own_file(path)) as free:
                if free:
                    os.unlink(path)
        else:
            os.unlink(path)
    except OSError:
        pass
    return not os.path.lexists(path)


def remove_unclaimed_folder(path: Path, marker: str) -> None:
    """Remove a folder unless a process has claimed it (where a folder cannot be opened: the file `marker` in it).
    Raises OSError."""
    if OPEN_FILES_CAN_BE_REMOVED:
        with _nobody_claims(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)
    else:
        (path / marker).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _nobody_claims(handle: int) -> Iterator[bool]:
    """Whether no other process has claimed an open file, which none does in the body. Closes it."""
    from filelock import lock_descriptor

    try:
        try:
            free = lock_descriptor(handle, blocking=False)
        except OSError:  # no locks here: it may be in use
            free = False
        yield free
    finally:
        os.close(handle)


def _forget_locks() -> None:
    """In a forked process: its copies of the descriptors would keep the locks when the parent has died."""
    for handle in _locked:
        with suppress(OSError):
            os.close(handle)
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# Memory that processes share -------------------------------------------------------------------------------------------


class SharedMemory:
    """`size` zero bytes that other processes of this run can open by `name`, until `close`.

    On Linux an anonymous file (memfd), which is bound by free memory alone and not by the size of /dev/shm (64 MB in a
    container); elsewhere a block of multiprocessing.shared_memory.
    """

    def __init__(self, size: int):
        """Raises OSError."""
        self._block: shared_memory.SharedMemory | None = None
        self._handle: int | None = None
        if MEMORY_IS_SHARED_FREELY:
            self._handle = os.memfd_create("earteach")
            os.ftruncate(self._handle, size)
            self.name = f"/proc/{os.getpid()}/fd/{self._handle}"
        else:
            self._block = shared_memory.SharedMemory(create=True, size=max(1, size))
            self.name = _BLOCK + self._block.name

    def close(self) -> None:
        """Free it, once no process has it open."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._block is not None:
            self._block.close()
            with suppress(OSError):
                self._block.unlink()
            self._block = None


_BLOCK = "block:"


class SharedBytes:
    """Bytes at offsets of a SharedMemory or of a file, both by name. Every process opens its own."""

    def __init__(self, name: str):
        """Raises OSError; of a file also if it is not this user's own, or a link."""
        self._block: shared_memory.SharedMemory | None = None
        self._handle: int | None = None
        if name.startswith(_BLOCK):
            self._block = shared_memory.SharedMemory(name=name.removeprefix(_BLOCK))
        elif name.startswith("/proc/"):  # a link by nature, to what has no name
            self._handle = os.open(name, os.O_RDWR)
        else:
            self._handle = open_private_file(name)

    def read(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes. Raises OSError."""
        if self._block is not None:
            return bytes(self._block.buf[offset : offset + count])
        assert self._handle is not None
        return read_at(self._handle, count, offset)

    def write(self, data: bytes, offset: int) -> None:
        """Raises OSError (no room)."""
        if self._block is not None:
            if offset + len(data) > self._block.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._block.buf[offset : offset + len(data)] = data
            return
        assert self._handle is not None
        write_at(self._handle, data, offset)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._block is not None:
            self._block.close()
            self._block = None


def open_private_file(path: str | Path, flags: int = 0) -> int:
    """A file that this user alone may read. Raises OSError if it is not this user's own, or a link."""
    handle = open_own_file(path, flags)
    if not is_private_file(handle):
        os.close(handle)
        raise OSError(errno.EPERM, f"{path} is not a file of this user's own")
    make_private(handle)
    return handle


# What the machine has --------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """CPU cores this process may use (fewer than the machine's in a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Bytes of memory that can be had without swapping; in a container, of its share."""
    free = _physical_memory() / 2  # where the system does not say what is free
    with suppress(OSError, IndexError, ValueError):
        free = int(Path("/proc/meminfo").read_text("ascii").split("MemAvailable:")[1].split()[0]) * 1024.0
    for group in _control_groups():
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError, IndexError):  # "max" is no number, and no limit
                room = int((group / most).read_text("ascii")) - int((group / used).read_text("ascii"))
                cached = int((group / "memory.stat").read_text("ascii").split("inactive_file ")[1].split()[0])
                free = min(free, room + cached)  # what only caches files is given back when asked for
    return max(0.0, free)


def _physical_memory() -> float:
    if hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    windows = getattr(ctypes, "windll", None)
    if windows is None:
        return 2.0**32

    class MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("total", "free", "page_total", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return 2.0 * status.free  # halved by the caller, to what is free now


def _control_groups() -> list[Path]:
    """Folders that limit this process, of cgroups version 2 and 1, from its own upwards."""
    found = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds == "" or "memory" in kinds.split(","):
                top = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
                below = top / name.lstrip("/")
                found += [below, *(folder for folder in below.parents if folder.is_relative_to(top))]
    return found

"""Everything that differs between Linux, macOS and Windows: signals, locks, shared memory, free memory.

No other module imports what only some systems have, or checks which system it runs on. Where a system lacks a feature
(a time limit on decoders, for example), the function works without it, and its docstring says so.
"""

import _thread
import ctypes
import errno
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

# Windows neither removes nor replaces a file that a process has open.
OPEN_FILES_CAN_BE_REMOVED = os.name != "nt"
# Other systems than Linux limit shared memory, and keep it after the process that made it was killed.
MEMORY_IS_SHARED_FREELY = hasattr(os, "memfd_create")

# Signals ---------------------------------------------------------------------------------------------------------------

# Ctrl-C; SIGTERM of schedulers; a terminal that closes; on Windows Ctrl-Break and a console that closes.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)


def handle_stop_signals(handler: Any, *, but: tuple[int, ...] = (), ignored_too: bool = False) -> None:
    """Set the handler of every stop signal except those in `but`. A signal that was ignored when the process started
    (nohup, a background job of a shell) stays ignored unless `ignored_too`."""
    for number in STOP_SIGNALS:
        if number not in but and (ignored_too or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """Ignore stop signals in a worker process: Ctrl-C reaches all processes, and the parent ends its workers."""
    handle_stop_signals(signal.SIG_IGN, ignored_too=True)


def signal_main_thread(number: int) -> None:
    """Send a signal to the main thread, where it also ends a system call (on Windows the call ends by itself first)."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


def _in_main_thread() -> bool:
    """Return whether this is the main thread: only there can handlers of signals be set, and are they called."""
    return threading.current_thread() is threading.main_thread()


def interrupts_ignored() -> AbstractContextManager[None]:
    """Ignore Ctrl-C while child processes start, which inherit this: a Python that is still importing would print a
    traceback. Windows processes do not inherit it."""
    return _handled("SIGINT", signal.SIG_IGN)


def child_exits_unnoticed() -> AbstractContextManager[None]:
    """Disable torch's handler, which raises an error when a DataLoader worker is killed. Windows has no such signal."""
    return _handled("SIGCHLD", signal.SIG_DFL)


@contextmanager
def _handled(name: str, handler: Any) -> Iterator[None]:
    """Set the handler of a signal in the body, where the system has the signal and this thread may set it."""
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
    """Raise `error()` in the body once it has used `seconds` of CPU time. Without effect outside the main thread, and on
    Windows, which has no such timer."""
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
    """Open a file for reading and writing without following a symbolic link or blocking on a FIFO. Return a file
    descriptor. Raises OSError."""
    flags |= sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    return os.open(path, flags | os.O_RDWR, mode)


def open_photograph(path: str) -> int:
    """Open a file for reading without blocking on a FIFO. Return a file descriptor. Raises OSError, ValueError."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def is_plain_file(handle: int) -> bool:
    """Return whether an open file is a regular file without further hard links."""
    status = os.fstat(handle)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def is_private_file(handle: int) -> bool:
    """Return whether an open file is a plain file that belongs to this user; Windows does not tell the owner."""
    return is_plain_file(handle) and (not hasattr(os, "geteuid") or os.fstat(handle).st_uid == os.geteuid())


def make_private(handle: int) -> None:
    """Let only this user read and write an open file. On Windows the permissions of the folder apply."""
    if hasattr(os, "fchmod"):
        os.fchmod(handle, 0o600)


def bytes_on_disk(status: os.stat_result) -> int:
    """Return the bytes that a file occupies, without its holes where the system counts them."""
    return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Return up to `count` bytes from `offset`. Without pread (Windows) the file position moves: not thread-safe."""
    if hasattr(os, "pread"):
        return os.pread(handle, count, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, count)


def write_at(handle: int, data: bytes, offset: int) -> None:
    """Write at `offset`, in one call where the system has pwrite. Raises OSError, also if only a part was written."""
    if hasattr(os, "pwrite"):
        written = os.pwrite(handle, data, offset)
    else:
        os.lseek(handle, offset, os.SEEK_SET)
        written = os.write(handle, data)
    if written != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def quoted(word: str) -> str:
    """Return a word quoted for this system's shell: sh, or on Windows both cmd and PowerShell (cmd still replaces
    `%NAME%`)."""
    if os.name != "nt":
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w.:\\/-]+", word) else f'"{word}"'


# Locks -----------------------------------------------------------------------------------------------------------------

# Errors of locking on a file system, or a system, without locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def claim(handle: int) -> None:
    """Keep `remove_unclaimed` from removing an open file until it is closed; several processes may claim one file. On
    Windows an open file cannot be removed anyway."""
    with suppress(ImportError, OSError):  # Windows, or a file system without locks
        import fcntl  # filelock has no shared locks on a file descriptor

        fcntl.flock(handle, fcntl.LOCK_SH)


def remove_unclaimed(path: str | Path) -> bool:
    """Remove a file unless a process has claimed it, it is a symbolic link, or the file system has no locks. Return
    whether the file no longer exists."""
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
    """Remove a folder unless a process has claimed it (on Windows, which cannot open folders: the file `marker` in it).
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
    """Yield whether no other process has claimed an open file, and let none claim it in the body. Close it."""
    from filelock import lock_descriptor

    try:
        try:
            free = lock_descriptor(handle, blocking=False)
        except OSError:  # no locks here: it may be in use
            free = False
        yield free
    finally:
        os.close(handle)


# Memory that processes share -------------------------------------------------------------------------------------------


class SharedMemory:
    """`size` zero bytes that other processes of this run can open by `name` until `close`.

    On Linux an anonymous file (memfd), which only free memory limits, not the size of /dev/shm (64 MB in a container);
    elsewhere a block of multiprocessing.shared_memory.
    """

    def __init__(self, size: int):
        """Allocate the memory. Raises OSError."""
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
        """Free the memory as soon as no other process has it open."""
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
    """Access by offset to a SharedMemory or a file, opened by name in each process."""

    def __init__(self, name: str):
        """Open it. Raises OSError; for a file also if it belongs to another user or is a symbolic link."""
        self._block: shared_memory.SharedMemory | None = None
        self._handle: int | None = None
        if name.startswith(_BLOCK):
            self._block = shared_memory.SharedMemory(name=name.removeprefix(_BLOCK))
        elif name.startswith("/proc/"):  # the symbolic link to a memfd
            self._handle = os.open(name, os.O_RDWR)
        else:
            self._handle = open_private_file(name)

    def read(self, count: int, offset: int) -> bytes:
        """Return up to `count` bytes from `offset`. Raises OSError."""
        if self._block is not None:
            assert self._block.buf is not None
            return bytes(self._block.buf[offset : offset + count])
        assert self._handle is not None
        return read_at(self._handle, count, offset)

    def write(self, data: bytes, offset: int) -> None:
        """Write at `offset`. Raises OSError, also if there is not enough room."""
        if self._block is not None:
            assert self._block.buf is not None
            if offset + len(data) > self._block.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._block.buf[offset : offset + len(data)] = data
            return
        assert self._handle is not None
        write_at(self._handle, data, offset)

    def close(self) -> None:
        """Close it in this process; the memory or file stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._block is not None:
            self._block.close()
            self._block = None


def open_private_file(path: str | Path, flags: int = 0) -> int:
    """Open a file that only this user may read. Raises OSError if it belongs to another user or is a symbolic link."""
    handle = open_own_file(path, flags)
    if not is_private_file(handle):
        os.close(handle)
        raise OSError(errno.EPERM, f"{path} does not belong to this user, or has other names")
    make_private(handle)
    return handle


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # parameters of mallopt (malloc.h)
_REUSED = 2**30  # bytes; larger blocks are returned to the system at once


def reuse_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation; return whether it does.

    By default glibc returns blocks above 32 MB to the system, which zeroes their pages again in every training step: on
    two cores a quarter to two fifths of its time. Not on other C libraries, nor if the environment configures malloc.
    """
    chosen = any(name in os.environ for name in ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    try:
        if chosen or not os.confstr("CS_GNU_LIBC_VERSION"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
        kept = mallopt(_MMAP_THRESHOLD, _REUSED) or mallopt(_MMAP_MAX, 0)  # old versions refuse more than 32 MB
        return bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(kept)
    except (AttributeError, ValueError, OSError):  # not glibc
        return False


# What the machine has --------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use; in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> float:
    """Return the peak resident memory of this process in bytes; 0 where the system does not say (Windows)."""
    with suppress(OSError, IndexError, ValueError):  # getrusage's also has the peak of the parent process
        return int(Path("/proc/self/status").read_text("ascii").split("VmHWM:")[1].split()[0]) * 1024.0
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
    return 0.0


def free_memory() -> float:
    """Return the bytes of memory that are free without swapping, within the limit of the container."""
    free = _physical_memory() / 2  # where the system does not tell what is free
    with suppress(OSError, IndexError, ValueError):
        free = int(Path("/proc/meminfo").read_text("ascii").split("MemAvailable:")[1].split()[0]) * 1024.0
    for group in _control_groups():
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError, IndexError):  # "max" means no limit
                room = int((group / most).read_text("ascii")) - int((group / used).read_text("ascii"))
                cached = int((group / "memory.stat").read_text("ascii").split("inactive_file ")[1].split()[0])
                free = min(free, room + cached)  # the kernel frees its cache of files when memory is needed
    return max(0.0, free)


def _physical_memory() -> float:
    """Return the bytes of memory of the machine; on Windows twice what is free; 4 GiB if the system does not tell."""
    if hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    windows = getattr(ctypes, "windll", None)
    if windows is None:
        return 2.0**32

    class MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)]
        _fields_ += [(name, ctypes.c_uint64) for name in ("total", "free", *(f"other{i}" for i in range(5)))]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return 2.0 * status.free  # which the caller halves


def _control_groups() -> list[Path]:
    """Return the folders of the cgroups (version 2 and 1) that limit this process, from its own upwards."""
    found = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds == "" or "memory" in kinds.split(","):
                top = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
                below = top / name.lstrip("/")
                found += [below, *(folder for folder in below.parents if folder.is_relative_to(top))]
    return found

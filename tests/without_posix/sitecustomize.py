"""Python starts with this where the tests put its folder on PYTHONPATH: a simulation of Windows, for `ear_teacher_cli`.

- What Windows lacks is missing: modules (fcntl, resource, ...), signals (SIGHUP, SIGKILL, ...) and functions of os (fork,
  memfd_create, sched_getaffinity, ...). os.name is "nt". The standard library and others, which would ask sys.platform
  there, still see all of it; fcntl is hidden from all of them but filelock, which locks files on Windows, too.
- Processes are spawned, never forked.
- A file that this process has open or mapped cannot be removed or replaced by the package, a folder with one in it
  cannot be renamed, and os.rename replaces nothing.
- Only what is open for writing can be flushed to the disk.
- Files under /proc do not exist.

What cannot be simulated here: drive letters and backslashes as os.path has them, file names without case, the console.
"""

import builtins
import importlib.abc
import io
import multiprocessing.popen_fork
import os
import signal
import subprocess  # noqa: F401  (like popen_fork: before fcntl is gone)
import sys
import types

import filelock  # noqa: F401  (before fcntl is gone)

PACKAGE = f"{os.sep}ear_teacher_cli{os.sep}"
MODULES = {"fcntl", "resource", "termios", "pwd", "grp", "posix", "pty", "tty", "syslog"}
MISSING = {
    signal: {
        *("SIGHUP", "SIGKILL", "SIGCHLD", "SIGPROF", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGPIPE", "SIGSTOP"),
        *("setitimer", "getitimer", "ITIMER_PROF", "ITIMER_REAL", "alarm", "pause", "pthread_sigmask", "sigwait", "pthread_kill"),
    },
    os: {
        *("fork", "register_at_fork", "memfd_create", "sched_getaffinity", "sysconf", "geteuid", "getuid", "getgid", "chown"),
        *("fchmod", "pread", "preadv", "pwrite", "pwritev", "killpg", "getpgid", "setsid", "mkfifo", "statvfs", "posix_fallocate"),
        *("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "uname", "getloadavg", "wait", "waitpid", "sendfile"),
    },
}  # fmt: skip


def from_package(depth: int) -> bool:
    return PACKAGE in sys._getframe(depth + 1).f_code.co_filename


def hide(module: types.ModuleType, names: set[str], instead: dict[str, object]) -> None:
    """Names that the package does not find in a module, and others do; `instead`: other values that it finds."""
    names = {name for name in (*names, *instead) if name in vars(module)}
    hidden = {name: vars(module).pop(name) for name in names}

    class Partial(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            if name not in hidden:
                raise AttributeError(name)
            if not from_package(1):
                return hidden[name]
            if name in instead:
                return instead[name]
            raise AttributeError(f"Windows has no {module.__name__}.{name}")

    module.__class__ = Partial


class NoModule(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MODULES - {"posix"} and (name == "fcntl" or package_asked("importlib")):
            raise ModuleNotFoundError(f"Windows has no {name}", name=name)
        return None


def package_asked(through: str) -> bool:
    """Whether the package called what called this, itself or through modules whose file has `through` in its name."""
    frame = sys._getframe(2)
    while frame and through in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and PACKAGE in frame.f_code.co_filename


def is_open(path: str) -> bool:
    """Whether this process has a file at or below `path` open or mapped."""
    path = os.path.realpath(path)
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    with plain_open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        names += [line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")]
    return any(name == path or name.startswith(path + os.sep) for name in names)


def refuse_open_files(name: str, replaces: bool) -> None:
    original = getattr(os, name)

    def guarded(*arguments, **options):
        callers, frame = [], sys._getframe(1)
        while frame:
            callers.append(frame.f_code.co_filename)
            frame = frame.f_back
        ours = any(PACKAGE in caller for caller in callers) and not any(
            skipped in callers[0] for skipped in ("tempfile", "multiprocessing")
        )
        if ours and not options.get("dir_fd"):
            for path in arguments[: 2 if replaces else 1]:
                if os.path.lexists(path) and is_open(os.fspath(path)):
                    raise PermissionError(13, "simulated: another handle to it is open", os.fspath(path))
            if name == "rename" and os.path.lexists(arguments[1]):
                raise FileExistsError(17, "simulated: os.rename replaces nothing", os.fspath(arguments[1]))
        return original(*arguments, **options)

    setattr(os, name, guarded)


def refuse_to_flush_what_is_read_only() -> None:
    import fcntl  # noqa: TID251  (before it is taken away)

    fsync, flags = os.fsync, fcntl.fcntl

    def guarded(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        if flags(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "simulated: a file that is open for reading only cannot be flushed")
        return fsync(handle)

    os.fsync = guarded


def no_proc(original):
    def guarded(path, *arguments, **options):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc/") and package_asked("pathlib"):
            raise FileNotFoundError(2, "simulated: Windows has no /proc", os.fspath(path))
        return original(path, *arguments, **options)

    return guarded


refuse_to_flush_what_is_read_only()
plain_open = builtins.open
builtins.open = io.open = no_proc(io.open)
for module_name in MODULES - {"posix"}:
    sys.modules.pop(module_name, None)
sys.meta_path.insert(0, NoModule())
for name, replaces in {"unlink": False, "remove": False, "rmdir": False, "rename": True, "replace": True}.items():
    refuse_open_files(name, replaces)
hide(os, MISSING[os], {"name": "nt"})
hide(signal, MISSING[signal], {})
multiprocessing.set_start_method("spawn")

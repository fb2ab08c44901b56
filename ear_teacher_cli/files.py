"""Files that appear under their name only when complete, folders with one writer, text that is safe to print.

A process locks its temporary files. The system releases the locks of a process that ends, so a temporary file without
a lock was left by a killed process, and the next writer removes it. (Windows refuses to remove an open file instead.)
"""

import glob
import os
import re
import shutil
import socket
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from . import platform
from .errors import EarTeachError, UsageError


def refuse_existing(path: str | Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Check an output path before any work is done for it.

    Raises UsageError if it exists (without `overwrite`) or is one of the `inputs` (even with), EarTeachError if
    its folder cannot be written.
    """
    path = Path(path)
    for source in inputs:
        if source is not None and path.exists() and os.path.exists(source) and path.samefile(source):
            raise UsageError(
                f"{printable(path)}: is an input and would be replaced; choose another name for the output"
            )
    if path.is_dir():
        raise EarTeachError(f"{printable(path)}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{printable(path)}: exists already; choose another name or pass --overwrite")
    _require_writable(path.parent)
    return path


def refuse_existing_folder(path: str | Path, overwrite: bool) -> Path:
    """Check the path of an output folder before any work is done for it; an empty folder may exist.

    Raises UsageError if it exists (without `overwrite`) or is no folder, EarTeachError if its parent cannot be written.
    """
    if not str(path).strip() or Path(path).name in ("", "..") or Path(path).resolve() == Path.cwd():
        raise UsageError(f"{printable(path) or repr(path)}: give the folder a name of its own")
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{printable(path)}: is a file or a link; choose another name")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{printable(path)}: exists already; choose another name or pass --overwrite")
    _require_writable(path.parent)
    return path


def _require_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise EarTeachError(f"{printable(folder)}: no such folder; make it first (mkdir -p)")
    if not os.access(folder, os.W_OK):
        raise EarTeachError(f"{printable(folder)}: not writable; choose another place")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, else delete it.

    Raises EarTeachError if it cannot be written.
    """
    path = Path(path)
    remove_stale_temporaries(path.parent, glob.escape(path.name))
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
    except OSError as error:
        raise EarTeachError(f"{printable(path)}: cannot be written ({error.strerror})") from error
    temporary, claimed = Path(name), _Claim(handle)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600; give what open() would have given
        claimed.before_rename()
        os.replace(temporary, path)
    except OSError as error:
        raise EarTeachError(f"{printable(path)}: cannot be written ({error.strerror or error})") from error
    finally:
        claimed.before_rename()
        temporary.unlink(missing_ok=True)
        claimed.close()


def link_file(existing: Path, path: Path) -> bool:
    """Make `path` a second name (hard link) of the file `existing`, in the place of an earlier file; return whether the
    file system can."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        os.close(handle)
        os.unlink(name)
        os.link(existing, name)
    except OSError:
        return False
    try:
        os.replace(name, path)
    except OSError:
        return False
    finally:
        Path(name).unlink(missing_ok=True)  # os.replace does nothing if both are links to one file already
    return True


@contextmanager
def whole_folder(path: str | Path, files: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success rename it, else delete it.

    An earlier folder of that name is replaced once the new one is complete, and restored if that fails. Raises UsageError
    if it holds anything but `files`, EarTeachError if the folder cannot be written.
    """
    path = Path(path)
    strange = sorted(set(os.listdir(path)) - set(files)) if path.is_dir() else []
    if strange:
        raise UsageError(
            f"{printable(path)}: holds {printable(strange[0])}, which earteach did not write; name another folder"
        )
    remove_stale_temporaries(path.parent, glob.escape(path.name), files)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
        claimed = _Claim.of_folder(temporary)
    except OSError as error:
        raise EarTeachError(f"{printable(path)}: cannot be written ({error.strerror})") from error
    aside = temporary.with_suffix(".earlier")
    try:
        yield temporary
        for written in temporary.iterdir():
            if written.name != _LOCK:
                _flush_to_disk(written)
                written.chmod(0o666 & ~_umask())
        temporary.chmod(0o777 & ~_umask())
        claimed.before_rename()
        if path.is_dir():
            os.rename(path, aside)
        os.rename(temporary, path)
    except OSError as error:
        raise EarTeachError(f"{printable(path)}: cannot be written ({error.strerror or error})") from error
    finally:
        claimed.before_rename()
        if aside.is_dir() and not path.exists():
            os.rename(aside, path)
        for left in (temporary, aside):
            shutil.rmtree(left, ignore_errors=True)
        claimed.close()


class _Claim:
    """A lock that shows other processes that a temporary file or folder is in use."""

    def __init__(self, handle: int, marker: Path | None = None):
        self._handle: int | None = handle
        self._marker = marker
        platform.claim(handle)

    @classmethod
    def of_folder(cls, folder: Path) -> "_Claim":
        """Claim the folder itself, or a file in it where the system cannot open folders. Raises OSError."""
        if platform.OPEN_FILES_CAN_BE_REMOVED:
            return cls(os.open(folder, os.O_RDONLY))
        return cls(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), folder / _LOCK)

    def before_rename(self) -> None:
        """Release the claim where the system cannot rename or remove an open file."""
        if not platform.OPEN_FILES_CAN_BE_REMOVED:
            self.close()
            if self._marker is not None:
                self._marker.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the claim."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def remove_stale_temporaries(folder: Path, name: str = "*", files: Collection[str] | None = None) -> None:
    """Remove the temporary files of `name` (a glob pattern) that killed processes left in `folder`; with `files`, the
    temporary folders that hold nothing else."""
    for found in glob.glob(f".{name}.*{_PART}", root_dir=folder, include_hidden=True):
        stale = folder / found
        if not _RANDOM.search(found) or stale.is_symlink() or stale.is_dir() != (files is not None):
            continue  # not made by whole_file or whole_folder
        if files is None:
            platform.remove_unclaimed(stale)
            continue
        with suppress(OSError):  # another user's, or another process is removing it
            if set(os.listdir(stale)) <= {*files, _LOCK}:
                platform.remove_unclaimed_folder(stale, _LOCK)


class Writer:
    """What `only_writer` yields."""

    def __init__(self):
        self.removes = False

    def remove_folder(self) -> None:
        """Remove the folder at the end of `only_writer`: Windows cannot remove it while it is locked."""
        self.removes = True


@contextmanager
def only_writer(folder: Path) -> Iterator[Writer]:
    """Lock an existing `folder` against other writers. Raises EarTeachError, with the process and host of the other one,
    if it is locked."""
    from filelock import FileLock, Timeout

    path, writer = folder / _LOCK, Writer()
    # The file stays: without it two processes could each lock a file of this name.
    lock = FileLock(path, blocking=False, preserve_lock_file=True, on_acquired=partial(_write_holder, path))
    try:
        lock.acquire()
    except Timeout:
        holder = printable(_read_holder(path)) or "another process"
        raise EarTeachError(
            f"{printable(folder)}: {holder} is writing there; wait for it, or choose another name"
        ) from None
    except OSError as error:
        if error.errno not in platform.NO_LOCKS:
            raise EarTeachError(
                f"{printable(path)}: cannot be written ({error.strerror}); choose another place, or remove it if it is a link"
            ) from error
    try:
        yield writer
    finally:
        if writer.removes and platform.OPEN_FILES_CAN_BE_REMOVED:  # while no other process can begin to write there
            shutil.rmtree(folder)
        lock.release()
        if writer.removes and not platform.OPEN_FILES_CAN_BE_REMOVED:
            with suppress(OSError):  # another process has begun to write there
                shutil.rmtree(folder)


def _write_holder(path: Path, handle: int) -> None:
    """Write ` process 17 on host` into the lock file. The first byte is a blank: on Windows it cannot be read while the
    file is locked."""
    if not platform.is_plain_file(handle):
        raise EarTeachError(f"{printable(path)}: is not a regular file, or has other names; remove it")
    os.ftruncate(handle, 0)
    os.write(handle, f" process {os.getpid()} on {socket.gethostname()}".encode())


def _read_holder(path: Path) -> str:
    """Return `process 17 on host`, or nothing if the lock file cannot be read."""
    try:
        handle = platform.open_own_file(path)
    except OSError:
        return ""
    with open(handle, "rb", buffering=0) as file:
        file.seek(1)
        return file.read(200).decode("utf-8", "replace")


def has_writer(folder: Path) -> bool:
    """Return whether a process is the `only_writer` of a folder."""
    from filelock import FileLock, Timeout

    path = folder / _LOCK
    if not path.is_file():
        return False
    try:
        with FileLock(path, blocking=False, preserve_lock_file=True):
            return False
    except Timeout:
        return True
    except OSError:  # a link, another user's, or a file system without locks
        return False


def shell_word(name: object) -> str:
    """Return a path quoted for this system's shell."""
    return platform.quoted(printable(name))


_LOCK, _PART = ".lock", ".part"
_RANDOM = re.compile(r"\.[a-z0-9_]{8}\.part$")  # as tempfile names files


def printable(name: object) -> str:
    """Return `name` with control characters escaped: file names are untrusted, and terminals execute control codes."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSAFE else c for c in str(name))


def short_message(error: BaseException) -> str:
    """Return the message of a library's error on one short line, with the class where the message says too little."""
    text = printable(" ".join(str(error).split())[:100])
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else text


def escape_csv(text: str) -> str:
    """Return `text` for a CSV that is opened in a spreadsheet: printable, and with a quote before a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def unescape_csv(text: str) -> str:
    """Return what `escape_csv` was given, except that control characters stay escaped."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


_FORMULA = ("=", "+", "-", "@", "'=", "'+", "'-", "'@")  # the latter so that unescape_csv gives back what was there
# Control, format (bidirectional overrides), surrogate, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

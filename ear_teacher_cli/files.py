"""Files that appear under their name only when whole, folders with one writer, names that are safe to print.

What a killed process leaves is known by its lock: the system releases the locks of a dead process, so a temporary file
that nobody holds is nobody's, and the next writer removes it. (On Windows a file that is open cannot be removed, which
comes to the same.)
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
    """The same of a folder that is to be written whole: an empty one may be there."""
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
    """Yield a temporary path beside `path`; on success flush it to disk and rename, else delete it."""
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


@contextmanager
def whole_folder(path: str | Path, files: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success rename it, else delete it.

    An earlier folder of that name is replaced if it holds nothing but `files`: raises UsageError otherwise. It is there
    until the new one is whole, and comes back if the new one cannot take its place.
    """
    path = Path(path)
    strange = sorted(set(os.listdir(path)) - set(files)) if path.is_dir() else []
    if strange:
        raise UsageError(
            f"{printable(path)}: holds {printable(strange[0])}, too, which is not ours; name another folder"
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
    """Shows other processes that a temporary file or folder is being written, and is nobody's leftover."""

    def __init__(self, handle: int, marker: Path | None = None):
        self._handle: int | None = handle
        self._marker = marker
        platform.claim(handle)

    @classmethod
    def of_folder(cls, folder: Path) -> "_Claim":
        """By the folder itself, or by a file in it where a folder cannot be opened."""
        if platform.OPEN_FILES_CAN_BE_REMOVED:
            return cls(os.open(folder, os.O_RDONLY))
        return cls(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), folder / _LOCK)

    def before_rename(self) -> None:
        """Close it where an open file cannot be renamed or removed."""
        if not platform.OPEN_FILES_CAN_BE_REMOVED:
            self.close()
            if self._marker is not None:
                self._marker.unlink(missing_ok=True)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def remove_stale_temporaries(folder: Path, name: str = "*", files: Collection[str] | None = None) -> None:
    """Remove the temporary files of `name` (a pattern), in `folder`, that a killed process left; with `files`, the
    temporary folders that hold nothing else."""
    for found in glob.glob(f".{name}.*{_PART}", root_dir=folder, include_hidden=True):
        stale = folder / found
        if not _RANDOM.search(found) or stale.is_symlink() or stale.is_dir() != (files is not None):
            continue  # somebody's own
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
        """Remove the folder when the lock on it is released (before, it could not be removed everywhere)."""
        self.removes = True


@contextmanager
def only_writer(folder: Path) -> Iterator[Writer]:
    """Be the one process that writes into `folder`, which exists. Raises EarTeachError, naming the other, if there is one."""
    path = folder / _LOCK
    try:  # what a stranger's folder has under this name may point anywhere
        handle = platform.open_own_file(path, os.O_CREAT, 0o644)
    except OSError as error:
        raise EarTeachError(
            f"{printable(path)}: cannot be written ({error.strerror}); choose another place, or remove it if it is a link"
        ) from error
    writer = Writer()
    try:
        if not platform.is_plain_file(handle):
            raise EarTeachError(f"{printable(path)}: is no file of its own; remove it")
        if not platform.lock(handle):
            holder = printable(_read_holder(handle)) or "another process"
            raise EarTeachError(f"{printable(folder)}: {holder} is writing there; wait for it, or choose another name")
        os.ftruncate(handle, 0)
        os.write(handle, f" process {os.getpid()} on {socket.gethostname()}".encode())
        yield writer  # the file stays: removing it would let two processes hold two files of one name
    finally:
        try:
            if writer.removes and platform.OPEN_FILES_CAN_BE_REMOVED:
                shutil.rmtree(folder)
        finally:
            platform.unlock_and_close(handle)
        if writer.removes and not platform.OPEN_FILES_CAN_BE_REMOVED:
            with suppress(OSError):  # another process has begun to write there
                shutil.rmtree(folder)


def _read_holder(handle: int) -> str:
    """`process 17 on host`. The first byte is a blank, which Windows lets nobody read while the file is locked."""
    os.lseek(handle, 1, os.SEEK_SET)
    return os.read(handle, 200).decode("utf-8", "replace")


def has_writer(folder: Path) -> bool:
    """Whether a process is its `only_writer`."""
    try:
        handle = platform.open_own_file(folder / _LOCK)
    except OSError:  # no such file
        return False
    try:
        return not platform.lock(handle)
    finally:
        platform.unlock_and_close(handle)


def shell_word(name: object) -> str:
    """A path as it can be typed again."""
    return platform.quoted(printable(name))


_LOCK, _PART = ".lock", ".part"
_RANDOM = re.compile(r"\.[a-z0-9_]{8}\.part$")  # tempfile's way of naming


def printable(name: object) -> str:
    """`name` with control characters escaped: file names may come from anyone, and terminals obey them."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSAFE else c for c in str(name))


def short_message(error: BaseException) -> str:
    """What a library says, on one short line; a KeyError's text is no more than the key."""
    said = printable(" ".join(str(error).split())[:100])
    return f"{type(error).__name__} {said}".strip() if isinstance(error, KeyError) or not said else said


def escape_csv(text: str) -> str:
    """`text` for a CSV that people open in a spreadsheet: printable, and with a quote before what would be a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def unescape_csv(text: str) -> str:
    """What `cell` was given, except for control characters, which stay escaped."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


_FORMULA = ("=", "+", "-", "@", "'=", "'+", "'-", "'@")  # and what unescape_csv would take a quote from
# Control, format (bidirectional overrides), surrogate, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

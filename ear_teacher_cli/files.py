"""Files that appear under their name only when whole, and names that are safe to print."""

import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import EarTeachError, WordsError


def refuse_existing(path: str | Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Check an output path before any work is done for it.

    Raises WordsError if it exists (without `overwrite`) or is one of the `inputs` (even with), EarTeachError if
    its folder cannot be written.
    """
    path = Path(path)
    for source in inputs:
        if source is not None and path.exists() and os.path.exists(source) and path.samefile(source):
            raise WordsError(
                f"{printable(path)}: is an input and would be replaced; choose another name for the output"
            )
    if path.is_dir():
        raise EarTeachError(f"{printable(path)}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise WordsError(f"{printable(path)}: exists already; choose another name or pass --overwrite")
    folder = path.parent
    if not folder.is_dir():
        raise EarTeachError(f"{printable(folder)}: no such folder; make it first (mkdir -p)")
    if not os.access(folder, os.W_OK):
        raise EarTeachError(f"{printable(folder)}: not writable; choose another place")
    return path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename, else delete it."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise EarTeachError(f"{printable(path)}: cannot be written ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600; give what open() would have given
        os.replace(temporary, path)
    except OSError as error:
        raise EarTeachError(f"{printable(path)}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def printable(name: object) -> str:
    """`name` with control characters escaped: file names come from strangers, terminals obey them."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSAFE else c for c in str(name))


# Control, format (bidirectional overrides), surrogate, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

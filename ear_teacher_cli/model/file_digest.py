"""The digest of an exported file, kept in its own metadata: whether every byte is as export-backbone wrote it.

The golden batch does not detect this: changing one weight of millions moves its embeddings by less than rounding does.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import WeightsError
from ..files import printable

KEY = "file_sha256"  # the name of the entry in the metadata
BLANK = "0" * 64  # the placeholder while the digest is computed


@dataclass(frozen=True)
class FileDigest:
    """`recorded`: the digest in the file's metadata, None if there is none. `computed`: the digest of the file with
    BLANK in its place. `named`: whether the name of the entry occurs in the file, also where no digest follows it."""

    recorded: str | None
    computed: str
    named: bool

    @property
    def broken(self) -> bool:
        """Whether the bytes differ from those written; False, too, where no digest was recorded."""
        return self.named if self.recorded is None else self.recorded != self.computed

    def is_missing(self, entries: Collection[str], known: Collection[str]) -> bool:
        """Return whether the file was written without a digest. `entries`: the names in its metadata; `known`: those
        that export-backbone writes. Any other name may be a damaged KEY."""
        return self.recorded is None and not self.named and set(entries) <= set(known)


def write_digest(path: Path, separator: bytes) -> None:
    """Replace BLANK in the metadata of a file by the file's digest.

    `separator`: the bytes that the format has between the name of a metadata entry and its value.
    """
    data = path.read_bytes()
    entry = _find_entry(data, separator)
    assert entry is not None and entry[1] == BLANK.encode()
    with open(path, "r+b") as file:
        file.seek(entry.start(1))
        file.write(hashlib.sha256(data).hexdigest().encode())


def read_digest(path: Path, separator: bytes) -> FileDigest:
    """Read the recorded digest of an existing file and compute its actual one (a sha256 over the file).

    Raises WeightsError if the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{printable(path)}: cannot be read ({error.strerror or error}); check the path") from error
    entry = _find_entry(data, separator)
    if entry is None:
        return FileDigest(None, hashlib.sha256(data).hexdigest(), KEY.encode() in data)
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for part in (view[: entry.start(1)], BLANK.encode(), view[entry.end(1) :]):
            digest.update(part)
    return FileDigest(entry[1].decode(), digest.hexdigest(), True)


def require_intact(path: Path, separator: bytes) -> None:
    """Raise WeightsError if the recorded digest of an existing file shows that it was damaged or changed."""
    if path.is_file() and read_digest(path, separator).broken:
        raise WeightsError(
            f"{printable(path)}: is damaged or was changed: its bytes do not match its {KEY}; "
            "export it again, or use another copy"
        )


def _find_entry(data: bytes, separator: bytes) -> re.Match[bytes] | None:
    return re.search(re.escape(KEY.encode() + separator) + rb"([0-9a-f]{64})", data)

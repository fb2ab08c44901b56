"""The digest of an export's file, kept in its own metadata: whether every byte is as export-backbone wrote it.

The golden batch does not tell: one weight of millions, changed, moves its embeddings by less than rounding does.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import WeightsError
from ..files import printable

KEY = "file_sha256"
BLANK = "0" * 64  # what stands at its place while the digest is taken
# An entry of the metadata as the two formats store it: JSON, and a protobuf field (number 2, 64 bytes long).
_ENTRY = re.compile(KEY.encode() + rb'(?:":"|\x12\x40)([0-9a-f]{64})')


@dataclass(frozen=True)
class Seal:
    """`said`: the digest in the file's metadata, or None. `found`: the digest of the file, with BLANK in its place.
    `named`: whether the entry's name is anywhere in the file, although no digest follows it."""

    said: str | None
    found: str
    named: bool

    @property
    def broken(self) -> bool:
        """Whether bytes are other than were written. False, too, where no digest was written."""
        return self.named if self.said is None else self.said != self.found

    def is_missing(self, entries: Collection[str], known: Collection[str]) -> bool:
        """Whether the file was written without a digest. `entries`: the names in its metadata, `known`: those that
        export-backbone writes; another one may be the digest's own, damaged."""
        return self.said is None and not self.named and set(entries) <= set(known)


def seal(path: Path) -> None:
    """Write the digest over BLANK in an export's metadata."""
    data = path.read_bytes()
    found = _ENTRY.search(data)
    assert found is not None and found[1] == BLANK.encode()
    with open(path, "r+b") as file:
        file.seek(found.start(1))
        file.write(hashlib.sha256(data).hexdigest().encode())


def read_seal(path: Path) -> Seal:
    """Of a file that exists. The cost is a sha256 over the file. Raises WeightsError if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{printable(path)}: cannot be read ({error.strerror or error}); check the path") from error
    entry = _ENTRY.search(data)
    if entry is None:
        return Seal(None, hashlib.sha256(data).hexdigest(), KEY.encode() in data)
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for part in (view[: entry.start(1)], BLANK.encode(), view[entry.end(1) :]):
            digest.update(part)
    return Seal(entry[1].decode(), digest.hexdigest(), True)


def require_whole(path: Path) -> None:
    """Raise WeightsError if the file's digest says that it is damaged."""
    if path.is_file() and read_seal(path).broken:
        raise WeightsError(
            f"{printable(path)}: is damaged or was changed: its bytes are not those that its {KEY} is of; "
            "export it again, or use another copy"
        )

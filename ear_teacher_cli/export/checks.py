"""The result of `verify`: a list of checks; and the checks that several formats have in common."""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError
from ..files import printable
from ..model.export_format import ENTRIES, About, read_whitening
from ..model.file_digest import FileDigest
from ..model.golden import TOLERANCE

MARKS = {True: "ok", False: "WRONG", None: "-"}  # how `Check.passed` is printed


@dataclass(frozen=True)
class Check:
    """One check of an export. `passed` is None where an export of an older version has nothing to compare with."""

    what: str
    found: str
    passed: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values: `what` was checked (str), `found` (str), `passed` (bool; null: not checked)."""
        return asdict(self)


def check_digest(digest: FileDigest, entries: Collection[str]) -> Check:
    """Check that no byte of the file has changed. `entries`: the names in its metadata."""
    if digest.is_missing(entries, ENTRIES):
        missing = "not checked: written by an older earteach, without a digest of its bytes; export it again to add one"
        return Check("file", missing, None)
    if digest.recorded is None:
        return Check("file", "its metadata is damaged: it holds no digest of its bytes", False)
    if digest.broken:
        found = f"damaged or changed: its sha256 is {digest.computed[:16]}, not {digest.recorded[:16]}"
        return Check("file", found, False)
    return Check("file", f"every byte is unchanged, sha256 {digest.recorded[:16]}", True)


def check_fingerprint(recorded: str | None, computed: str) -> Check:
    """Check the fingerprint in the header against the one computed from weights and preprocessing."""
    if recorded is None:
        return Check("fingerprint", "none: written by an older earteach; export it again", False)
    same = recorded == computed
    return Check("fingerprint", computed if same else f"{computed}, but its header has {printable(recorded)}", same)


def check_golden(about: About, run: Callable[[np.ndarray], np.ndarray]) -> Check:
    """Embed the reference images with `run` (uint8 B,3,S,S -> float32 B,D) and compare with the expected embeddings."""
    if about.golden is None:
        return Check("golden batch", "none: written by an older earteach; export it again", False)
    difference = about.golden.difference(run(about.golden.pixels))
    count = len(about.golden.pixels)
    found = f"{count} drawn images, largest difference {difference:.2g} (at most {TOLERANCE:g})"
    return Check("golden batch", found, difference <= TOLERANCE)


def check_whitening(path: Path, about: About) -> list[Check]:
    """Check that the whitening beside an exported file is the one that belongs to it; no check if it has none."""
    if not about.whitening_sha256:
        return []
    try:
        matrix = read_whitening(path, about.whitening_sha256).matrix
    except WeightsError as error:
        return [Check("whitening", str(error).removeprefix(f"{printable(path)}: "), False)]
    assert matrix is not None
    rows, columns = matrix.shape
    return [Check("whitening", f"belongs to this export, {rows} x {columns}", rows == about.embedding_dim)]

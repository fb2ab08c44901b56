"""`verify`: check an export on this machine, and compare it with other weights of the same teacher."""

from pathlib import Path

import torch

from ..embedding.embedder import load_embedder
from ..errors import EarTeachError, ForeignWeightsError, UsageError, WeightsError
from ..files import printable
from ..model.export_format import PREPROCESS, WEIGHTS, is_export_folder
from ..model.golden import TOLERANCE, relative_difference
from . import FORMATS
from .checks import MARKS, Check
from .format import Format, Opened

__all__ = ["MARKS", "Check", "verify"]


def verify(source: str, against: str | None = None) -> list[Check]:
    """Check an export of any format in `FORMATS`; compare it with `against`, another form of the same teacher.

    `against`: an export, a checkpoint, a run folder or other weights that `load_embedder` takes.
    What can be read but is wrong becomes a check that did not pass. Raises UsageError if `source` is a file of another
    kind, WeightsError if it is not an export or cannot be read, EarTeachError if `against` cannot be compared with.
    """
    path = Path(source)
    format = _format_of(path)
    if format is None:
        if path.is_file():
            known = ", ".join(f"a {suffix}" for suffix in FORMATS if suffix.startswith("."))
            raise UsageError(f"{printable(path)}: not an export by its name; verify takes {known} or a folder")
        if path.is_dir():
            raise WeightsError(f"{printable(path)}: not an export (no {WEIGHTS} and {PREPROCESS} in it); name one")
        raise WeightsError(f"{printable(path)}: no such file; check the path")
    try:
        checks, opened = format.verify(path)
    except ForeignWeightsError as error:
        raise WeightsError(f"{error}; verify checks what export-backbone wrote") from error
    if against is not None and opened is not None:
        checks.append(_compare(opened, against))
    return checks


def _format_of(path: Path) -> Format | None:
    """Return the format of an export by its name; None if it is of none."""
    if path.is_dir():
        return FORMATS["folder"] if is_export_folder(path) else None
    return FORMATS.get(path.suffix) if path.suffix in FORMATS and path.is_file() else None


def _compare(opened: Opened, against: str) -> Check:
    """Compare the embeddings of the reference images, computed here by both."""
    golden = opened.about.golden
    if golden is None:
        raise EarTeachError("--against: the export has no golden batch to compare on; export it again")
    format = _format_of(Path(against))
    if format is not None:
        other = format.open(Path(against))
        fingerprint, run = other.fingerprint, other.run
    else:
        embedder = load_embedder(against, whiten=False)
        fingerprint, run = embedder.fingerprint, lambda pixels: embedder(torch.from_numpy(pixels)).numpy()
    what = f"against {printable(Path(against).name)}"
    if fingerprint != opened.about.fingerprint:
        return Check(what, f"another teacher: its fingerprint is {printable(fingerprint)}", False)
    difference = relative_difference(opened.run(golden.pixels), run(golden.pixels))
    return Check(what, f"computed here by both, largest difference {difference:.2g}", difference <= TOLERANCE)

"""What every export contains: a header with all that inference needs, as text in the metadata of the weights file.

The whitening, if the run fitted one, is a file of its own beside the export: timm opens a weights file only if it holds
nothing but the backbone.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.preprocessing import Preprocessing
from ..errors import ForeignWeightsError, WeightsError
from ..files import printable
from .checkpoint import read_safetensors
from .file_digest import BLANK, KEY
from .golden import Golden, golden_from
from .weights import State, sha256_of
from .whitening import Whitening

EXPORT_FORMAT = "1"
# Files of an exported folder.
WEIGHTS, CONFIG, PREPROCESS, FEATURES, CARD = (
    "model.safetensors",
    "config.json",
    "preprocess.json",
    "features.json",
    "README.md",
)
# Names of the entries of a header.
_PREPROCESSING = tuple(entry.name for entry in fields(Preprocessing))
ENTRIES = (
    *("architecture", "embedding_dim", *_PREPROCESSING, "source_sha256", "earteach", "earteach_export"),
    *("whitening_sha256", "fingerprint", "golden", KEY),
)


@dataclass(frozen=True)
class About:
    """The header of an export. `fingerprint` and `golden` are None in exports of versions that did not write them."""

    architecture: str
    embedding_dim: int
    preprocessing: Preprocessing
    fingerprint: str | None = None
    golden: Golden | None = None
    whitening_sha256: str | None = None


def is_export_folder(path: Path) -> bool:
    """Return whether `path` is a folder that looks like an exported one."""
    return (path / WEIGHTS).is_file() and (path / PREPROCESS).is_file()


def whitening_beside(export: Path) -> Path:
    """Return the path of the whitening that belongs to an exported file."""
    return export.with_suffix(".whitening.safetensors")


def header_of(about: About, source_sha256: str) -> dict[str, str]:
    """Return the metadata of an export as text, with the placeholder that `write_digest` fills.

    `source_sha256`: of the checkpoint that is exported.
    """
    values: dict[str, Any] = {"architecture": about.architecture, "embedding_dim": about.embedding_dim}
    values |= about.preprocessing.as_dict()
    values |= {"source_sha256": source_sha256, "earteach": __version__, "earteach_export": EXPORT_FORMAT}
    values |= {"whitening_sha256": about.whitening_sha256} if about.whitening_sha256 else {}
    values |= {"fingerprint": about.fingerprint} if about.fingerprint else {}
    values |= {"golden": about.golden.as_text()} if about.golden else {}
    values[KEY] = BLANK
    assert values.keys() <= set(ENTRIES)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def about_of(header: dict[str, str], where: str) -> About:
    """Parse the output of `header_of`.

    Raises ForeignWeightsError if the header is not one of an export, WeightsError if it is incomplete.
    """
    if header.get("earteach_export") != EXPORT_FORMAT:
        raise ForeignWeightsError(f"{where}: was not written by earteach export-backbone")
    try:
        values = {
            name: header[name] if name == "interpolation" else json.loads(header[name])
            for name in _PREPROCESSING
            if name in header or name != "mirror"
        }
        preprocessing, dim = Preprocessing.from_dict(values, where), int(header["embedding_dim"])
        golden = header.get("golden")
        return About(
            architecture=header["architecture"],
            embedding_dim=dim,
            preprocessing=preprocessing,
            fingerprint=header.get("fingerprint"),
            golden=golden_from(golden, preprocessing.image_size, dim, where) if golden else None,
            whitening_sha256=header.get("whitening_sha256"),
        )
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{where}: its header is incomplete or damaged ({error!r}); export it again") from error


def read_export(path: Path) -> tuple[About, State]:
    """Return the header of an exported .safetensors and its tensors under timm's names.

    Raises ForeignWeightsError if it is not an export, WeightsError if it is damaged.
    """
    state, header = read_safetensors(path)
    return about_of(header, printable(path)), state


def read_whitening(export: Path, sha256: str) -> Whitening:
    """Read the whitening of an export, which must have the `sha256` that the export's header names.

    Raises WeightsError if it is missing, damaged or belongs to another export.
    """
    path = whitening_beside(export)
    if not path.is_file():
        raise WeightsError(f"{printable(export)}: its whitening, {path.name}, is not beside it; copy it there, too")
    if sha256_of(path) != sha256:
        raise WeightsError(f"{printable(path)}: is damaged, or of another export than {export.name}; export both again")
    return whitening_of(read_safetensors(path)[0])


def whitening_of(tensors: dict[str, torch.Tensor]) -> Whitening:
    """Return the whitening with `mean` [D] and `matrix` [D, K]. Raises WeightsError if shapes or values are wrong."""
    mean, matrix = tensors.get("mean"), tensors.get("matrix")
    if mean is None or matrix is None or mean.ndim != 1 or matrix.ndim != 2 or len(mean) != len(matrix):
        raise WeightsError("whitening: needs a mean of D and a matrix of D x K values; export it again")
    if not (mean.isfinite().all() and matrix.isfinite().all()):
        raise WeightsError("whitening: holds NaN or infinity; export it again")
    return Whitening(mean.double().numpy(), matrix.double().numpy())

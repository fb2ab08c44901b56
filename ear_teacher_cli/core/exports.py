"""What an export is: a .safetensors whose header says all that inference needs, or a folder around one.

Its `whitening`, where the run fitted one, lies beside: timm opens weights only if nothing but the backbone is in them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.pixels import Preprocessing
from ..errors import ForeignWeightsError, WeightsError
from ..files import printable
from .checkpoint import read_safetensors
from .golden import Golden, golden_from
from .weights import State, sha256_of
from .whitening import Whitening

EXPORT_FORMAT = "1"
WEIGHTS, CONFIG, PREPROCESS, FEATURES, CARD = (
    "model.safetensors",
    "config.json",
    "preprocess.json",
    "features.json",
    "README.md",
)
FOLDER = (WEIGHTS, "model.whitening.safetensors", CONFIG, PREPROCESS, FEATURES, CARD)


@dataclass(frozen=True)
class About:
    """What an export says of itself. `fingerprint`, `golden`: None in exports older than these."""

    architecture: str
    embedding_dim: int
    preprocessing: Preprocessing
    fingerprint: str | None = None
    golden: Golden | None = None
    whitening_sha256: str | None = None


def is_export_folder(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and (path / PREPROCESS).is_file()


def whitening_beside(export: Path) -> Path:
    """Where the whitening of an export lies."""
    return export.with_suffix(".whitening.safetensors")


def header_of(about: About, source_sha256: str) -> dict[str, str]:
    """Metadata of an export, as text. `source_sha256`: of the checkpoint it was made from."""
    values: dict[str, Any] = {"architecture": about.architecture, "embedding_dim": about.embedding_dim}
    values |= about.preprocessing.as_dict()
    values |= {"source_sha256": source_sha256, "earteach": __version__, "earteach_export": EXPORT_FORMAT}
    values |= {"whitening_sha256": about.whitening_sha256} if about.whitening_sha256 else {}
    values |= {"fingerprint": about.fingerprint} if about.fingerprint else {}
    values |= {"golden": about.golden.as_text()} if about.golden else {}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def about_of(header: dict[str, str], where: str) -> About:
    """What `header_of` wrote. Raises ForeignWeightsError if it is not of an export, WeightsError if it is not whole."""
    if header.get("earteach_export") != EXPORT_FORMAT:
        raise ForeignWeightsError(f"{where}: was not written by earteach export-backbone")
    try:
        values = {
            name: header[name] if name == "interpolation" else json.loads(header[name])
            for name in ("image_size", "bbox_buffer", "pad", "interpolation", "mean", "std", "mirror")
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
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"{where}: its header is not whole ({error!r}); export it again") from error


def read_export(path: Path) -> tuple[About, State]:
    """What a .safetensors of ours says, and its tensors under timm's names."""
    state, header = read_safetensors(path)
    return about_of(header, printable(path)), state


def read_whitening(export: Path, sha256: str) -> Whitening:
    """The whitening of an export whose header names this sha256. Raises WeightsError if it is not beside it."""
    path = whitening_beside(export)
    if not path.is_file():
        raise WeightsError(f"{printable(export)}: its whitening, {path.name}, is not beside it; copy it there, too")
    if sha256_of(path) != sha256:
        raise WeightsError(f"{printable(path)}: is of another export than {export.name}; export both again")
    return whitening_of(read_safetensors(path)[0])


def whitening_of(tensors: dict[str, torch.Tensor]) -> Whitening:
    """From `mean` D and `matrix` D,K."""
    return Whitening(tensors["mean"].double().numpy(), tensors["matrix"].double().numpy())

"""What an export is: a .safetensors whose header says all that inference needs, or a folder around one.

Its `whitening`, where the run fitted one, lies beside: timm opens weights only if nothing but the backbone is in them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.preprocessing import Preprocessing, pretrained_cfg_of
from ..errors import ForeignWeightsError, WeightsError
from ..files import printable
from .checkpoint import read_safetensors
from .feature_maps import MapStatistics
from .file_digest import BLANK, KEY
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
# Names of the entries of a header.
_PREPROCESSING = tuple(entry.name for entry in fields(Preprocessing))
ENTRIES = (
    *("architecture", "embedding_dim", *_PREPROCESSING, "source_sha256", "earteach", "earteach_export"),
    *("whitening_sha256", "fingerprint", "golden", KEY),
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
    """Metadata of an export, as text, with room for the digest that `seal` writes. `source_sha256`: of the checkpoint
    it was made from."""
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
    """What `header_of` wrote. Raises ForeignWeightsError if it is not of an export, WeightsError if it is not whole."""
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
        raise WeightsError(f"{where}: its header is not whole ({error!r}); export it again") from error


def sidecars(about: About, maps: list[MapStatistics], images: int) -> dict[str, dict[str, Any]]:
    """What a folder's .json files hold: timm's config.json, preprocess.json, features.json.

    `num_classes` is 0 at both places of config.json: else timm looks for a classifier. The sha256 in features.json is of
    the rest of it: nothing else says whether the statistics are those that were measured.
    """
    published, preprocessing = pretrained_cfg_of(about.architecture), about.preprocessing
    config = {
        "architecture": about.architecture,
        "num_classes": 0,
        "num_features": about.embedding_dim,
        **({"model_args": sized(about)} if sized(about) else {}),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, preprocessing.image_size, preprocessing.image_size],
            "fixed_input_size": published.fixed_input_size,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "crop_pct": 1.0,  # no hidden centre crop: it would cut the helix off
            "crop_mode": "border" if preprocessing.pad else "squash",
            "first_conv": published.first_conv,
            "classifier": published.classifier,
        },
    }
    of_crops = {**preprocessing.as_dict(), "embedding_dim": about.embedding_dim, "fingerprint": about.fingerprint}
    features = {"pictures": images, "fingerprint": about.fingerprint, "maps": [asdict(stage) for stage in maps]}
    features["sha256"] = hashlib.sha256(json.dumps(features, sort_keys=True).encode()).hexdigest()
    # as they come back from JSON, so that what is read can be compared
    return json.loads(json.dumps({CONFIG: config, PREPROCESS: of_crops, FEATURES: features}))


def sized(about: About) -> dict[str, int]:
    """What timm must be told of the input's size: nothing, but of models that are built for one."""
    fixed = pretrained_cfg_of(about.architecture).fixed_input_size
    return {"img_size": about.preprocessing.image_size} if fixed else {}


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
        raise WeightsError(f"{printable(path)}: is damaged, or of another export than {export.name}; export both again")
    return whitening_of(read_safetensors(path)[0])


def whitening_of(tensors: dict[str, torch.Tensor]) -> Whitening:
    """From `mean` D and `matrix` D,K. Raises WeightsError."""
    mean, matrix = tensors.get("mean"), tensors.get("matrix")
    if mean is None or matrix is None or mean.ndim != 1 or matrix.ndim != 2 or len(mean) != len(matrix):
        raise WeightsError("whitening: is no mean of D and matrix of D x K numbers; export it again")
    if not (mean.isfinite().all() and matrix.isfinite().all()):
        raise WeightsError("whitening: holds NaN or infinity; export it again")
    return Whitening(mean.double().numpy(), matrix.double().numpy())

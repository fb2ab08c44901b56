"""A backbone ready to embed, from any kind of weights, with its preprocessing and its provenance."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..config import TrainConfig
from ..data.pixels import Preprocessing, normalise, preprocessing_of
from ..errors import EarTeachError, WeightsError, WordsError
from ..files import printable
from . import runs
from .checkpoint import read_checkpoint, read_safetensors, read_tensors
from .model import build_backbone, embedding_size
from .weights import Receipt, load_from_hub, load_state, sha256_of

EXPORT_FORMAT = "1"


@dataclass
class Embedder:
    """uint8 B,3,H,W -> float32 B,D, on `device`. `source` and `sha256` say which weights."""

    backbone: nn.Module
    architecture: str
    embedding_dim: int
    preprocessing: Preprocessing
    source: str
    sha256: str
    receipt: Receipt

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        device = next(self.backbone.parameters()).device
        return self.backbone(normalise(pixels.to(device), self.preprocessing)).float().cpu()


def load_embedder(weights: str | None, backbone: str | None = None, image_size: int | None = None) -> Embedder:
    """From a run folder, a checkpoint, an export, `timm:NAME`, or (with `backbone`) a plain state dict.

    None: the environment's EARTEACH_WEIGHTS, else the best checkpoint of the newest run. Raises EarTeachError.
    """
    # A run and an export know their size; only weights that say nothing may be given one.
    weights = weights or os.environ.get("EARTEACH_WEIGHTS") or _newest()
    if weights.startswith("timm:"):
        return _from_timm(weights.removeprefix("timm:"), image_size)
    path = Path(weights)
    if path.is_dir():
        path = runs.checkpoint_of(path, best=True)
    if backbone is not None:
        return _from_state_dict(path, backbone, image_size)
    if image_size is not None:
        raise WordsError(f"--image-size {image_size}: {printable(path)} carries its own; leave the option out")
    if path.suffix == ".safetensors":
        return _from_export(path)
    return _from_checkpoint(path)


def export_header(
    architecture: str, embedding_dim: int, preprocessing: Preprocessing, source_sha256: str
) -> dict[str, str]:
    """Metadata of an exported .safetensors: everything inference needs, as text."""
    about = {"architecture": architecture, "embedding_dim": embedding_dim, **preprocessing.as_dict()}
    about |= {"source_sha256": source_sha256, "earteach": __version__, "earteach_export": EXPORT_FORMAT}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def _from_export(path: Path) -> Embedder:
    state, header = read_safetensors(path)
    if header.get("earteach_export") != EXPORT_FORMAT:
        raise WeightsError(
            f"{printable(path)}: was not written by earteach export-backbone; say what it is with --backbone NAME"
        )
    try:
        about = {
            name: header[name] if name == "interpolation" else json.loads(header[name])
            for name in ("image_size", "bbox_buffer", "pad", "interpolation", "mean", "std")
        }
        preprocessing = Preprocessing.from_dict(about, printable(path))
        return _filled(header["architecture"], preprocessing, state, path, sha256_of(path))
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{printable(path)}: its header is not whole ({error!r}); export it again") from error


def _from_checkpoint(path: Path) -> Embedder:
    try:
        checkpoint = read_checkpoint(path)
    except WeightsError as error:
        if "is no checkpoint of earteach" in str(error):
            raise WeightsError(
                f"{printable(path)}: is no checkpoint of earteach; if it is a plain state dict, say of "
                "which model with --backbone NAME"
            ) from error
        raise
    return _filled(
        checkpoint.config.backbone, checkpoint.preprocessing, checkpoint.backbone_state, path, sha256_of(path)
    )


def _from_state_dict(path: Path, backbone: str, image_size: int | None) -> Embedder:
    """A plain state dict says nothing of its preprocessing: the defaults of training are used."""
    return _filled(backbone, _default_preprocessing(backbone, image_size), read_tensors(path), path, sha256_of(path))


def _from_timm(name: str, image_size: int | None) -> Embedder:
    preprocessing = _default_preprocessing(name, image_size)
    backbone = build_backbone(name, preprocessing.image_size)
    try:
        receipt = load_from_hub(backbone, name)
    except WeightsError as error:
        raise WeightsError(
            f"timm:{name}: not in the cache and the hub is out of reach; give --weights FILE with --backbone {name}"
        ) from error
    return _ready(backbone, name, preprocessing, receipt)


def _default_preprocessing(backbone: str, image_size: int | None) -> Preprocessing:
    return preprocessing_of(backbone, image_size or TrainConfig.image_size, TrainConfig.bbox_buffer, TrainConfig.pad)


def _filled(name: str, preprocessing: Preprocessing, state: dict, path: Path, sha256: str) -> Embedder:
    backbone = build_backbone(name, preprocessing.image_size)
    return _ready(backbone, name, preprocessing, load_state(backbone, name, state, printable(path), sha256))


def _ready(backbone: nn.Module, name: str, preprocessing: Preprocessing, receipt: Receipt) -> Embedder:
    dim = embedding_size(backbone, preprocessing.image_size)
    backbone.eval().requires_grad_(False)
    if torch.cuda.is_available():
        backbone.cuda()
    return Embedder(backbone, name, dim, preprocessing, receipt.source, receipt.sha256, receipt)


def _newest() -> str:
    output_dir = Path(TrainConfig.output_dir)
    run = runs.newest_run(output_dir)
    if run is None:
        raise EarTeachError(
            f"weights: none given, EARTEACH_WEIGHTS is not set and there is no run under {output_dir}/; "
            "pass --weights (a run, a checkpoint, an export, or timm:NAME)"
        )
    return str(run)

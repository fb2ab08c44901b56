"""A backbone ready to embed, from any kind of weights, with its preprocessing and its provenance."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from .. import __version__
from ..config import TrainConfig
from ..data.dataset import BadPicture, EarDataset, collate, leave_stopping_to_the_parent
from ..data.manifest import Manifest
from ..data.pixels import Preprocessing, normalise, preprocessing_of
from ..errors import EarTeachError, ForeignWeightsError, WeightsError, WordsError
from ..files import printable
from ..machine import usable_cores
from ..talk import Talk
from . import runs
from .checkpoint import read_checkpoint, read_safetensors, read_tensors
from .model import build_backbone, embedding_size
from .weights import Receipt, load_from_hub, load_state, sha256_of
from .whitening import Whitening

EXPORT_FORMAT = "1"


@dataclass
class Embedder:
    """uint8 B,3,H,W -> float32 B,D on the CPU, computed where the backbone lies. `source`, `sha256`: which weights.
    `whitening`: what the run fitted to its training embeddings, for the caller to apply; None if it did not."""

    backbone: nn.Module
    architecture: str
    embedding_dim: int
    preprocessing: Preprocessing
    source: str
    sha256: str
    receipt: Receipt
    whitening: Whitening | None = None

    def unit_rows(self, embeddings: torch.Tensor, whiten: bool = True) -> np.ndarray:
        """float32 B,D -> float32 rows of unit length, B,D, or B,K whitened where the run fitted a whitening."""
        rows = F.normalize(embeddings, dim=1).numpy()
        return self.whitening.apply(rows) if self.whitening and whiten else rows

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        device = next(self.backbone.parameters()).device
        images = normalise(pixels.to(device, non_blocking=True), self.preprocessing)
        return self.backbone(images.to(memory_format=torch.channels_last)).float().cpu()


def load_embedder(
    weights: str | None, backbone: str | None = None, image_size: int | None = None, whiten: bool = True
) -> Embedder:
    """From a run folder, a checkpoint, an export, `timm:NAME`, or (with `backbone`) a plain state dict.

    None: the environment's EARTEACH_WEIGHTS, else the best checkpoint of the newest run. Raises EarTeachError.
    """
    weights = weights or os.environ.get("EARTEACH_WEIGHTS") or _newest()
    if weights.startswith("timm:"):
        if backbone is not None:
            raise WordsError(
                f"--backbone {printable(backbone)}: {printable(weights)} says it already; leave the option out"
            )
        return _from_timm(weights.removeprefix("timm:"), image_size)
    path = Path(weights)
    if path.is_dir():
        path = runs.checkpoint_of(path, best=True)
    try:
        name, preprocessing, state, whitening = (
            _own_export(path, whiten) if path.suffix == ".safetensors" else _own_checkpoint(path)
        )
    except ForeignWeightsError as error:
        if backbone is None:
            raise WeightsError(
                f"{printable(path)}: is not of earteach; say of which model it is with --backbone NAME"
            ) from error
        name, preprocessing, state = backbone, _default_preprocessing(backbone, image_size), read_tensors(path)
        whitening = None
    else:
        if backbone not in (None, name) or image_size not in (None, preprocessing.image_size):
            raise WordsError(
                f"{printable(path)}: is of {name} at {preprocessing.image_size} px and says so; leave --backbone and --image-size out"
            )
    module = build_backbone(name, preprocessing.image_size)
    receipt = load_state(module, name, state, printable(path), sha256_of(path))
    return _ready(module, name, preprocessing, receipt, whitening)


def embed_pictures(
    embedder: Embedder,
    manifest: Manifest,
    batch_size: int,
    num_workers: int,
    load_timeout: int,
    talk: Talk,
    start: int = 0,
) -> Iterator[tuple[list[int], torch.Tensor | None, list[BadPicture]]]:
    """A batch at a time, in order, from the picture `start` on: indices B, embeddings float32 B,D (None if B is 0), and
    what could not be read."""
    workers = min(num_workers, usable_cores(), len(manifest) // batch_size)
    loader = DataLoader(
        EarDataset(manifest, embedder.preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_stopping_to_the_parent,
        sampler=range(start, len(manifest)),
        timeout=load_timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
    )
    if embedder.preprocessing.mirror:
        unknown = sum(manifest.side(i) is None for i in range(len(manifest)))
        if unknown:
            talk.warn(
                f"{unknown} of {len(manifest)} ears have no side, and these weights want right ears mirrored; they are "
                "embedded as they are. A manifest with a side column puts it right"
            )
    with talk.progress("embedding", len(manifest) - start, "pictures") as steps:
        for batch in loader:
            for bad in batch["bad"]:
                talk.warn(f"{manifest.where(bad.index)}: {printable(bad.detail)}; skipped")
            good = batch["index"].tolist()
            yield good, embedder(batch["pixels"]) if good else None, batch["bad"]
            steps.advance(len(good) + len(batch["bad"]))


def whitening_beside(export: Path) -> Path:
    """Where the whitening of an export lies: timm opens the export only if nothing but the backbone is in it."""
    return export.with_suffix(".whitening.safetensors")


def export_header(
    architecture: str,
    embedding_dim: int,
    preprocessing: Preprocessing,
    source_sha256: str,
    whitening_sha256: str | None = None,
) -> dict[str, str]:
    """Metadata of an exported .safetensors: everything inference needs, as text."""
    about = {"architecture": architecture, "embedding_dim": embedding_dim, **preprocessing.as_dict()}
    about |= {"source_sha256": source_sha256, "earteach": __version__, "earteach_export": EXPORT_FORMAT}
    about |= {"whitening_sha256": whitening_sha256} if whitening_sha256 else {}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def _own_export(path: Path, whiten: bool) -> tuple[str, Preprocessing, dict, Whitening | None]:
    state, header = read_safetensors(path)
    if header.get("earteach_export") != EXPORT_FORMAT:
        raise ForeignWeightsError(f"{printable(path)}: was not written by earteach export-backbone")
    try:
        about = {
            name: header[name] if name == "interpolation" else json.loads(header[name])
            for name in ("image_size", "bbox_buffer", "pad", "interpolation", "mean", "std", "mirror")
            if name in header or name != "mirror"
        }
        name, preprocessing = header["architecture"], Preprocessing.from_dict(about, printable(path))
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{printable(path)}: its header is not whole ({error!r}); export it again") from error

    whitening = (
        _exported_whitening(path, header["whitening_sha256"]) if whiten and "whitening_sha256" in header else None
    )
    return name, preprocessing, state, whitening


def _exported_whitening(export: Path, sha256: str) -> Whitening:
    path = whitening_beside(export)
    if not path.is_file():
        raise WeightsError(f"{printable(export)}: its whitening, {path.name}, is not beside it; copy it there, too")
    if sha256_of(path) != sha256:
        raise WeightsError(f"{printable(path)}: is of another export than {export.name}; export both again")
    return whitening_of(read_safetensors(path)[0])


def _own_checkpoint(path: Path) -> tuple[str, Preprocessing, dict, Whitening | None]:
    checkpoint = read_checkpoint(path)
    state = checkpoint.content.get("whitening")
    whitening = whitening_of(state) if state else None
    return checkpoint.config.backbone, checkpoint.preprocessing, checkpoint.backbone_state, whitening


def whitening_of(tensors: dict[str, torch.Tensor]) -> Whitening:
    """From `mean` D and `matrix` D,K."""
    return Whitening(tensors["mean"].double().numpy(), tensors["matrix"].double().numpy())


def _from_timm(name: str, image_size: int | None) -> Embedder:
    preprocessing = _default_preprocessing(name, image_size)
    backbone = build_backbone(name, preprocessing.image_size)
    receipt = load_from_hub(backbone, name, f"give --weights FILE with --backbone {name}")
    return _ready(backbone, name, preprocessing, receipt)


def _default_preprocessing(backbone: str, image_size: int | None) -> Preprocessing:
    return preprocessing_of(backbone, image_size or TrainConfig.image_size, TrainConfig.bbox_buffer, TrainConfig.pad)


def _ready(
    backbone: nn.Module, name: str, preprocessing: Preprocessing, receipt: Receipt, whitening: Whitening | None = None
) -> Embedder:
    dim = embedding_size(backbone, preprocessing.image_size)
    backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # what convolutions are fast in
    if torch.cuda.is_available():
        backbone.cuda()
    return Embedder(backbone, name, dim, preprocessing, receipt.source, receipt.sha256, receipt, whitening)


def _newest() -> str:
    output_dir = Path(TrainConfig.output_dir)
    run = runs.newest_run(output_dir)
    if run is None:
        raise EarTeachError(
            f"weights: none given, EARTEACH_WEIGHTS is not set and there is no run under {output_dir}/; "
            "pass --weights (a run, a checkpoint, an export, or timm:NAME)"
        )
    return str(run)

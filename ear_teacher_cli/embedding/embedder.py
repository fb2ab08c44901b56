"""Load a backbone with its preprocessing from any kind of weights, and embed images with it."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from .. import run_folder
from ..config import TrainConfig
from ..console import Console
from ..data.crop import ImageSource
from ..data.dataset import EarDataset, UnreadableImage, collate, leave_stopping_to_the_parent
from ..data.given_images import crops_given
from ..data.manifest import Manifest
from ..data.preprocessing import Preprocessing, normalise, preprocessing_of
from ..errors import ConfigError, EarTeachError, ForeignWeightsError, UsageError, WeightsError
from ..files import printable
from ..model.checkpoint import Checkpoint, read_checkpoint, read_tensors
from ..model.export_format import WEIGHTS, is_export_folder, read_export, read_whitening, whitening_of
from ..model.feature_maps import map_model
from ..model.teacher import build_backbone, embedding_size
from ..model.weights import Receipt, fingerprint, load_from_hub, load_state, sha256_of
from ..model.whitening import Whitening
from ..platform import usable_cores
from .files import Embeddings


@dataclass
class Embedder:
    """A backbone with its preprocessing. `embed` returns rows for images; a call runs the backbone alone on crops: uint8
    B,3,S,S -> raw float32 B,D on the CPU, computed on the device of the backbone (the GPU, if there is one).

    `source`, `sha256`: the file of the weights. `fingerprint`: of weights and preprocessing, the same in every form of
    one teacher (model/weights.py). `whitening`: the one that the run fitted to its training embeddings, or None.
    `precision`: one of config.PRECISIONS.
    """

    backbone: nn.Module
    architecture: str
    embedding_dim: int
    preprocessing: Preprocessing
    source: str
    sha256: str
    receipt: Receipt
    fingerprint: str
    whitening: Whitening | None = None
    precision: str = "32-true"

    def embed(
        self,
        images: ImageSource | Iterable[ImageSource],
        boxes: Any = None,
        *,
        sides: str | Iterable[str | None] | None = None,
        whiten: bool = True,
        normalize: bool = True,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Return float32 [N, D]: for each image, in order, the row that `earteach embed` writes for it.

        `images`: one or many paths, PIL images, or arrays uint8 H x W x 3 (RGB, upright); an iterator is read a batch at
        a time. `boxes`: x1, y1, x2, y2 in pixels of the upright image; for many images a list with a box or None for
        each; None: the images are crops. `sides`: 'left', 'right' or None, likewise; used only by weights that were
        trained with --side-policy mirror.
        `whiten`: apply the whitening of the run, if it has one; False: as `embed --no-whiten`. `normalize`: rows of unit
        length; False: raw embeddings, neither whitened nor of unit length, as `embed --no-normalize`.
        `batch_size`: crops in memory at a time. Raises ImageError for the first image or box that cannot be used, with
        its position from 0; EarTeachError if there are no images, or another number of boxes.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size: {batch_size} is less than 1; leave it out")
        if self.preprocessing.mirror and sides is None:
            warnings.warn(
                "these weights want right ears mirrored, and no sides were given: embedded unchanged; give sides=",
                stacklevel=2,
            )
        crops = crops_given(images, boxes, sides, preprocessing=self.preprocessing)
        rows = []
        while batch := list(islice(crops, batch_size)):
            vectors = self(torch.from_numpy(np.stack(batch)))
            rows.append(self.unit_rows(vectors, whiten) if normalize else vectors.numpy())
        return np.concatenate(rows)

    @property
    def row_dim(self) -> int:
        """Numbers in a row: fewer than the backbone's where whitening reduces them."""
        if self.whitening is None:
            return self.embedding_dim
        assert self.whitening.matrix is not None  # a run fits more than a mean
        return self.whitening.matrix.shape[1]

    def unit_rows(self, embeddings: torch.Tensor, whiten: bool = True) -> np.ndarray:
        """Return raw embeddings, float32 B,D, as rows of unit length: float32 B,D, or B,K whitened with the whitening of
        the run."""
        rows = F.normalize(embeddings, dim=1).numpy()
        return self.whitening.apply(rows) if self.whitening and whiten else rows

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return next(self.backbone.parameters()).device

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return raw embeddings, float32 B,D on the CPU, of crops uint8 B,3,S,S."""
        return self.launch(pixels)()

    @torch.inference_mode()
    def launch(self, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start embedding crops uint8 B,3,S,S; return a function that waits for their raw embeddings, float32 B,D on the
        CPU. On a GPU several may be under way: it computes while earlier results are copied and written."""
        device = self.device
        kind = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(self.precision)
        images = normalise(pixels.to(device, non_blocking=True), self.preprocessing)
        with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
            rows = self.backbone(images.to(memory_format=torch.channels_last)).float()
        if device.type != "cuda":
            return rows.cpu
        copied, host = torch.cuda.Event(), torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        copied.record()

        def wait() -> torch.Tensor:
            copied.synchronize()
            return host

        return wait


def load_embedder(
    path: str | Path | None, backbone: str | None = None, image_size: int | None = None, whiten: bool = True
) -> Embedder:
    """Return the Embedder of a run folder, a checkpoint, an export (.safetensors or folder), `timm:NAME`, or (with
    `backbone`, a name in timm, and `image_size` in pixels) a plain state dict. A .onnx is for onnxruntime instead.

    `path` None: the environment's EARTEACH_WEIGHTS, else the best checkpoint of the newest run. `whiten`: load the
    whitening that the run fitted, if any; False: its file is not needed, and all rows are raw. Raises EarTeachError.
    """
    if path is not None and not str(path):
        raise UsageError("weights: no path was given; name an export, a checkpoint or a run")
    weights = str(path) if path is not None else os.environ.get("EARTEACH_WEIGHTS") or _newest()
    return _embedder_of(weights, backbone, image_size, whiten)


def _embedder_of(weights: str, backbone: str | None, image_size: int | None, whiten: bool) -> Embedder:
    if weights.startswith("timm:"):
        if backbone is not None:
            raise UsageError(
                f"--backbone {printable(backbone)}: {printable(weights)} says it already; leave the option out"
            )
        return _from_timm(weights.removeprefix("timm:"), image_size)
    path = Path(weights)
    if is_export_folder(path):
        path = path / WEIGHTS
    elif path.is_dir():
        path = run_folder.checkpoint_of(path, best=True)
    if path.suffix == ".onnx":
        raise UsageError(f"{printable(path)}: is for onnxruntime; give the checkpoint or a .safetensors export")
    try:
        embedder = (
            embedder_of_export(path, whiten)
            if path.suffix == ".safetensors"
            else embedder_of(read_checkpoint(path), whiten)
        )
    except ForeignWeightsError as error:
        if backbone is None:
            raise WeightsError(
                f"{printable(path)}: was not written by earteach; name its model with --backbone NAME"
            ) from error
        preprocessing = _default_preprocessing(backbone, image_size)
        module = build_backbone(backbone, preprocessing.image_size)
        receipt = load_state(module, backbone, read_tensors(path), printable(path), sha256_of(path))
        return _ready(module, backbone, preprocessing, receipt)
    name, size = embedder.architecture, embedder.preprocessing.image_size
    if backbone not in (None, name) or image_size not in (None, size):
        raise UsageError(f"{printable(path)}: was made for {name} at {size} px; leave --backbone and --image-size out")
    return embedder


def load_backbone(path: str | Path, features_only: bool = False) -> tuple[nn.Module, Preprocessing]:
    """Return (module, preprocessing) of an export (a .safetensors or a folder), a checkpoint or a run; frozen, on the CPU.

    The module maps float32 B,3,S,S, normalised by `ear_teacher_cli.normalise(pixels, preprocessing)`, to float32 B,D,
    raw: neither whitened nor of unit length (`load_embedder` returns the rows of `earteach embed`). With `features_only`
    it returns a list of maps B,C,S/stride,S/stride, fine to coarse, like timm's `features_only`, and has timm's
    `feature_info`. Make crops with `ear_teacher_cli.load_crop(image, box, preprocessing)`, uint8 3,S,S.
    Raises EarTeachError.
    """
    embedder = load_embedder(str(path), whiten=False)
    if features_only:
        return map_model(
            embedder.backbone, embedder.architecture, embedder.preprocessing.image_size
        ), embedder.preprocessing
    return embedder.backbone.cpu(), embedder.preprocessing


AHEAD = {"cuda": 2}  # batches that a device may be given before the first of them is waited for; others: none
Batch = tuple[list[int], torch.Tensor | None, list[UnreadableImage]]


def embed_images(
    embedder: Embedder,
    manifest: Manifest,
    batch_size: int,
    num_workers: int,
    load_timeout: int,
    console: Console,
    images: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield a batch at a time, in order: indices B, embeddings float32 B,D (None if B is 0), and what could not be read.

    `images`: the indices of those to embed; None: all.
    """
    batches = crops_of(
        manifest, embedder.preprocessing, batch_size, num_workers, load_timeout, console, "embedding", images
    )
    ahead = AHEAD.get(embedder.device.type, 0)
    under_way: deque[tuple[list[int], Callable[[], torch.Tensor] | None, list[UnreadableImage]]] = deque()
    for good, pixels, bad in batches:
        under_way.append((good, None if pixels is None else embedder.launch(pixels), bad))
        if len(under_way) > ahead:
            yield _waited_for(*under_way.popleft())
    while under_way:
        yield _waited_for(*under_way.popleft())


def _waited_for(good: list[int], wait: Callable[[], torch.Tensor] | None, bad: list[UnreadableImage]) -> Batch:
    return good, wait() if wait is not None else None, bad


def warn_of_unknown_sides(embedder: Embedder, manifest: Manifest, console: Console) -> None:
    """Warn if the weights want right ears mirrored and the manifest does not give all sides."""
    unknown = sum(manifest.side(i) is None for i in range(len(manifest))) if embedder.preprocessing.mirror else 0
    if unknown:
        console.warn(
            f"{unknown} of {len(manifest)} ears have no side, and these weights want right ears mirrored; they are "
            "embedded unchanged; add a side column to the manifest"
        )


def embed_manifest(
    embedder: Embedder,
    manifest: Manifest,
    batch_size: int,
    num_workers: int,
    console: Console,
    whiten: bool = True,
    normalize: bool = True,
) -> Embeddings:
    """Return the embeddings of all images that can be read, in memory. Raises EarTeachError if none can.

    They have unit length; without `normalize` they are raw, neither whitened nor of unit length.
    """
    warn_of_unknown_sides(embedder, manifest, console)
    rows, kept = [], []
    for good, vectors, _ in embed_images(
        embedder, manifest, batch_size, num_workers, TrainConfig.load_timeout, console
    ):
        if vectors is not None:
            rows.append(embedder.unit_rows(vectors, whiten) if normalize else vectors.numpy())
            kept += good
    if not kept:
        raise EarTeachError(
            f"{printable(manifest.source)}: not one of {len(manifest)} images could be read; nothing to score"
        )
    part = manifest.subset(kept)
    return Embeddings(
        manifest.source,
        np.concatenate(rows),
        part.paths,
        part.boxes,
        part.identities,
        part.sides,
        Path(embedder.source).name,
        embedder.whitening is not None and whiten and normalize,
        embedder.fingerprint,
        manifest.root,
    )


def crops_of(
    manifest: Manifest,
    preprocessing: Preprocessing,
    batch_size: int,
    num_workers: int,
    load_timeout: int,
    console: Console,
    what: str,
    images: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield a batch at a time, in order: indices B, uint8 B,3,H,W (None if B is 0), and what could not be read, with a
    warning.

    `images`: the indices of those to read; None: all. `what` is done to them: for the progress bar.
    """
    images = range(len(manifest)) if images is None else images
    workers = min(num_workers, usable_cores(), len(images) // batch_size)
    loader = DataLoader(
        EarDataset(manifest, preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_stopping_to_the_parent,
        sampler=images,
        timeout=load_timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
    )
    with console.progress(what, len(images), "images") as steps:
        for batch in loader:
            for bad in batch["bad"]:
                console.warn(f"{manifest.where(bad.index)}: {printable(bad.detail)}; skipped")
            good = batch["index"].tolist()
            yield good, batch["pixels"] if good else None, batch["bad"]
            steps.advance(len(good) + len(batch["bad"]))


def embedder_of(checkpoint: Checkpoint, whiten: bool = True) -> Embedder:
    """Return the Embedder of a checkpoint."""
    name, preprocessing = checkpoint.config.backbone, checkpoint.preprocessing
    module = build_backbone(name, preprocessing.image_size)
    receipt = load_state(
        module, name, checkpoint.backbone_state, printable(checkpoint.path), sha256_of(checkpoint.path)
    )
    fitted = checkpoint.content.get("whitening") if whiten else None
    return _ready(module, name, preprocessing, receipt, whitening_of(fitted) if fitted else None)


def pretrained_baseline(
    module: nn.Module, architecture: str, preprocessing: Preprocessing, receipt: Receipt | None
) -> Embedder:
    """Return the Embedder of a backbone before training; without a receipt its weights are random."""
    return _ready(module, architecture, preprocessing, receipt or Receipt("random weights", "timm", 0, 0, ""))


def embedder_of_export(path: Path, whiten: bool = True, trusted: bool = False) -> Embedder:
    """Return the Embedder of a .safetensors export.

    Raises WeightsError if its weights or preprocessing do not match the fingerprint in its header, unless it is
    `trusted` or has none (earlier versions).
    """
    about, state = read_export(path)
    whitening = read_whitening(path, about.whitening_sha256) if whiten and about.whitening_sha256 else None
    try:
        module = build_backbone(about.architecture, about.preprocessing.image_size)
    except ConfigError as error:
        raise WeightsError(
            f"{printable(path)}: is of a model {printable(about.architecture)}, which timm does not have; update timm, or "
            "export again"
        ) from error
    receipt = load_state(module, about.architecture, state, printable(path), sha256_of(path))
    embedder = _ready(module, about.architecture, about.preprocessing, receipt, whitening)
    if not trusted and about.fingerprint not in (None, embedder.fingerprint):
        raise WeightsError(
            f"{printable(path)}: is damaged or was changed: its weights and preprocessing have the fingerprint "
            f"{embedder.fingerprint[:16]}, its header says {printable(about.fingerprint[:16])}; export it again, or use "
            "another copy"
        )
    return embedder


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
    mark = fingerprint(name, backbone.state_dict(), preprocessing)
    backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # convolutions are faster in it
    if torch.cuda.is_available():
        backbone.cuda()
    return Embedder(backbone, name, dim, preprocessing, receipt.source, receipt.sha256, receipt, mark, whitening)


def _newest() -> str:
    output_dir = Path(TrainConfig.output_dir)
    run = run_folder.newest_run(output_dir)
    if run is None:
        raise EarTeachError(
            f"weights: none given, EARTEACH_WEIGHTS is not set and there is no run under {output_dir}/; "
            "pass --weights (a run, a checkpoint, an export, or timm:NAME)"
        )
    return str(run)

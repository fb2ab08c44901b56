"""The validation images of a run as embeddings of its teacher and of its baseline, the initial weights."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.utilities.seed import isolate_rng

from ..config import TrainConfig
from ..console import Console
from ..data.crop import cut, read_image
from ..data.datamodule import read_val_manifest
from ..data.image_checks import PREVIEW
from ..data.manifest import Manifest
from ..embedding.embedder import Embedder, embed_manifest, embedder_of, pretrained_baseline
from ..embedding.files import Embeddings
from ..errors import EarTeachError
from ..model.checkpoint import Checkpoint
from ..model.export_format import whitening_of
from ..model.whitening import Whitening
from ..quality.collapse import judged_rows
from ..training.epoch_metrics import ValidationRows
from ..training.module import EarTeacherLightningModule


@dataclass(frozen=True)
class ValidationEmbeddings:
    """Embeddings of the readable validation images, at most collapse.JUDGED_ON of them, as rows of unit length.

    `teacher`: as `earteach embed` writes them, whitened if the run fitted a whitening; `raw`: before whitening;
    `unscaled`: before scaling to unit length too, as the backbone gives them, float32 N,D.
    `baseline`: of the initial weights, not whitened, the same images; None if those weights are not available
    (`no_baseline` says why). `total`: how many images the manifest has. `root`: where their paths start.
    """

    root: Path | None
    teacher: Embeddings
    raw: Embeddings
    unscaled: np.ndarray
    baseline: Embeddings | None
    total: int
    no_baseline: str = ""

    def ear(self, row: int) -> tuple[str, str] | None:
        """Return (identity, side or '') of a row; None without an identity."""
        identity = self.teacher.identities[row] if self.teacher.identities else ""
        side = self.teacher.sides[row] if self.teacher.sides else ""
        return (identity, side) if identity else None

    def thumbnail(self, row: int) -> Image.Image:
        """Return the crop of a row, 96 px a side. Raises ImageError if the image can no longer be read."""
        manifest = self.manifest()
        return cut(read_image(manifest.file(row)).image, manifest.boxes[row], PREVIEW)

    def manifest(self) -> Manifest:
        """Return the rows as a manifest."""
        seen = self.teacher
        return Manifest(seen.source, self.root, seen.paths, seen.boxes, range(len(seen)), sides=seen.sides)


def embed_validation_set(checkpoint: Checkpoint, console: Console, root_dir: str | None = None) -> ValidationEmbeddings:
    """Embed the validation images of a run with its checkpoint and with the initial weights.

    `root_dir`: where the images are now, if they have moved. Raises EarTeachError if none can be read.
    """
    config = replace(checkpoint.config, root_dir=root_dir) if root_dir else checkpoint.config
    whole = read_val_manifest(config)
    manifest = whole.subset(_judged(whole))
    embedder = embedder_of(checkpoint)
    options = (manifest, config.batch_size, config.num_workers, console, False)
    given = embed_manifest(embedder, *options, normalize=False)
    raw = replace(given, rows=embedder.unit_rows(torch.from_numpy(given.rows), whiten=False))
    try:
        baseline, why = embed_manifest(_initial_embedder(config), *options), ""
    except EarTeachError as error:  # a weights file that is gone, a hub that cannot be reached
        baseline, why = None, str(error)
    teacher = _whitened(raw, embedder.whitening)
    return ValidationEmbeddings(manifest.root, teacher, raw, given.rows, baseline, len(whole), why)


def validation_embeddings_of(
    manifest: Manifest, best: ValidationRows, baseline: ValidationRows, checkpoint: Checkpoint
) -> ValidationEmbeddings:
    """Return the same from what training kept, without embedding an image.

    `best` is of the checkpoint's epoch, `baseline` of the initial weights, both of rows of `manifest`. Raises
    EarTeachError if they have no row in common.
    """
    known = set(best.index.tolist()).intersection(baseline.index.tolist())
    rows = [row for row in _judged(manifest) if row in known]
    if not rows:
        raise EarTeachError(f"{manifest.source}: not one of {len(manifest)} images could be read; nothing to score")
    raw = _embeddings(manifest, rows, best, checkpoint.path.name)
    fitted = checkpoint.content.get("whitening")
    teacher = _whitened(raw, whitening_of(fitted) if fitted else None)
    start = _embeddings(manifest, rows, baseline, "initial weights")
    given = best.embeddings[_places(rows, best)].numpy()
    return ValidationEmbeddings(manifest.root, teacher, raw, given, start, len(manifest))


def _judged(manifest: Manifest) -> list[int]:
    """Return the rows of a manifest that a report compares, in order."""
    return judged_rows(manifest.identities or [None] * len(manifest))


def _whitened(raw: Embeddings, fitted: Whitening | None) -> Embeddings:
    """Return the embeddings whitened, or unchanged if no whitening was fitted."""
    return replace(raw, rows=fitted.apply(raw.rows), whitened=True) if fitted else raw


def _embeddings(manifest: Manifest, rows: list[int], kept: ValidationRows, weights: str) -> Embeddings:
    """Return the embeddings of these rows of the manifest, at unit length."""
    unit = F.normalize(kept.embeddings[_places(rows, kept)], dim=1).numpy()
    part = manifest.subset(rows)
    return Embeddings(part.source, unit, part.paths, part.boxes, part.identities, part.sides, weights, root=part.root)


def _places(rows: list[int], kept: ValidationRows) -> np.ndarray:
    """Return where in what was kept these rows of the manifest are."""
    return np.searchsorted(kept.index.numpy(), rows)


def _initial_embedder(config: TrainConfig) -> Embedder:
    """Return the backbone with the weights that `train` starts from: the same file, or the same random seed."""
    with isolate_rng():
        pl.seed_everything(config.seed, verbose=False)
        module = EarTeacherLightningModule(config)
        receipt = module.load_pretrained() if config.pretrained else None
    return pretrained_baseline(module.model.backbone, config.backbone, module.preprocessing, receipt)

"""The validation images of a run, as its teacher and the backbone it started from see them."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
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
from ..quality.collapse import judged_rows
from ..training.module import EarTeacherLightningModule


@dataclass(frozen=True)
class ValidationEmbeddings:
    """Rows of unit length. `teacher`: as `embed` gives them, whitened where the run fitted a whitening; `raw`: before
    that; `start`: of the untouched backbone, None where its weights cannot be had (`no_start` says why). `of`: how many
    images there are, of which these are at most diagnostics.JUDGED_ON."""

    root: Path | None
    teacher: Embeddings
    raw: Embeddings
    start: Embeddings | None
    of: int
    no_start: str = ""

    def ear(self, row: int) -> tuple[str, str] | None:
        """(identity, side) of a row, as far as they are known; None without an identity."""
        identity = self.teacher.identities[row] if self.teacher.identities else ""
        side = self.teacher.sides[row] if self.teacher.sides else ""
        return (identity, side) if identity else None

    def thumbnail(self, row: int) -> Image.Image:
        """96 px a side. Raises ImageError if the image is gone."""
        seen = self.teacher
        manifest = Manifest(seen.source, self.root, seen.paths, seen.boxes, range(len(seen)))
        return cut(read_image(manifest.file(row)).image, seen.boxes[row], PREVIEW)


def embed_validation_set(checkpoint: Checkpoint, console: Console, root_dir: str | None = None) -> ValidationEmbeddings:
    """Embed the validation images; with `root_dir` from where they lie now. Raises EarTeachError if none can be read."""
    config = replace(checkpoint.config, root_dir=root_dir) if root_dir else checkpoint.config
    whole = read_val_manifest(config)
    manifest = whole.subset(judged_rows(whole.identities or [None] * len(whole)))
    embedder = embedder_of(checkpoint)
    options = (manifest, config.batch_size, config.num_workers, console, False)
    raw = embed_manifest(embedder, *options)
    fitted = embedder.whitening
    teacher = replace(raw, rows=fitted.apply(raw.rows), whitened=True) if fitted else raw
    try:
        start, why = embed_manifest(_untouched(config), *options), ""
    except EarTeachError as error:  # its weights may be gone, or on a hub that is out of reach
        start, why = None, str(error)
    return ValidationEmbeddings(manifest.root, teacher, raw, start, len(whole), why)


def _untouched(config: TrainConfig) -> Embedder:
    """The backbone as `train` starts with it: from the same weights or the same seed."""
    with isolate_rng():
        pl.seed_everything(config.seed, verbose=False)
        module = EarTeacherLightningModule(config)
        receipt = module.load_pretrained() if config.pretrained else None
    return pretrained_baseline(module.model.backbone, config.backbone, module.preprocessing, receipt)

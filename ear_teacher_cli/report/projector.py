"""Embeddings in TensorBoard's projector, with thumbnails."""

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from ..errors import ImageError
from ..files import escape_csv
from .validation_embeddings import ValidationEmbeddings

THUMBNAIL = 48  # pixels: TensorBoard takes one image of 8192 a side for all of them


def write_projector(writer: SummaryWriter, look: ValidationEmbeddings, images: bool, epoch: int) -> None:
    """The teacher's rows of the validation images; who is on them and where they lie as labels. Without `images` there
    are no thumbnails, and rows are numbered only: folders are often named after people."""
    seen = look.teacher
    columns = {"identity": seen.identities, "side": seen.sides, "path": seen.paths} if images else {}
    labels = {name: [escape_csv(str(word)) or "-" for word in words] for name, words in columns.items() if words}
    labels = labels or {"row": [str(row) for row in range(len(seen))]}
    thumbnails = None
    if images:
        pixels = np.stack([_thumbnail(look, row) for row in range(len(seen))])  # N,48,48,3
        thumbnails = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    writer.add_embedding(
        torch.from_numpy(seen.rows),
        metadata=list(zip(*labels.values(), strict=True)) if len(labels) > 1 else next(iter(labels.values())),
        metadata_header=list(labels) if len(labels) > 1 else None,
        label_img=thumbnails,
        global_step=epoch,
        tag="validation",
    )
    writer.flush()


def _thumbnail(look: ValidationEmbeddings, row: int) -> np.ndarray:
    try:
        return np.asarray(look.thumbnail(row).resize((THUMBNAIL, THUMBNAIL)))
    except ImageError:  # gone since it was embedded
        return np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)

"""Embeddings in TensorBoard's projector, with thumbnails."""

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from ..errors import ImageError
from ..files import escape_csv
from .validation_embeddings import ValidationEmbeddings

THUMBNAIL = 48  # pixels: TensorBoard takes one image of 8192 a side for all of them


def write_projector(writer: SummaryWriter, found: ValidationEmbeddings, images: bool, epoch: int) -> None:
    """Write the teacher's embeddings of the validation images, labelled by identity, side and path.

    Without `images` there are no thumbnails, and rows are numbered only: folders are often named after people.
    """
    shown = found.teacher
    columns = {"identity": shown.identities, "side": shown.sides, "path": shown.paths} if images else {}
    labels = {name: [escape_csv(str(text)) or "-" for text in texts] for name, texts in columns.items() if texts}
    labels = labels or {"row": [str(row) for row in range(len(shown))]}
    thumbnails = None
    if images:
        pixels = np.stack([_thumbnail(found, row) for row in range(len(shown))])  # N,48,48,3
        thumbnails = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    writer.add_embedding(
        torch.from_numpy(shown.rows),
        metadata=list(zip(*labels.values(), strict=True)) if len(labels) > 1 else next(iter(labels.values())),
        metadata_header=list(labels) if len(labels) > 1 else None,
        label_img=thumbnails,
        global_step=epoch,
        tag="validation",
    )
    writer.flush()


def _thumbnail(found: ValidationEmbeddings, row: int) -> np.ndarray:
    """Return uint8 48,48,3; black if the image can no longer be read."""
    try:
        return np.asarray(found.thumbnail(row).resize((THUMBNAIL, THUMBNAIL)))
    except ImageError:
        return np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)

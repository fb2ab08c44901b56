"""Embeddings in TensorBoard's projector, with thumbnails."""

import logging

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from ..data.crop import cut, read_picture
from ..data.inspect import PREVIEW
from ..data.manifest import Manifest
from ..errors import PictureError
from ..files import cell
from .report import Look

THUMBNAIL = 48  # pixels: TensorBoard takes one picture of 8192 a side for all of them


def write_projector(writer: SummaryWriter, look: Look, images: bool, epoch: int) -> None:
    """The teacher's rows of the validation pictures; who is on them and where they lie as labels."""
    seen = look.teacher
    names = {"identity": seen.identities, "side": seen.sides, "path": seen.paths}
    names = {name: [cell(str(word)) or "-" for word in words] for name, words in names.items() if words}
    pictures = None
    if images:
        manifest = Manifest(seen.source, look.manifest.root, seen.paths, seen.boxes, range(len(seen)))
        thumbnails = np.stack([_thumbnail(manifest, row) for row in range(len(seen))])  # N,48,48,3
        pictures = torch.from_numpy(thumbnails).permute(0, 3, 1, 2).float() / 255
    else:
        names.pop("identity", None)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    writer.add_embedding(
        torch.from_numpy(seen.rows),
        metadata=list(zip(*names.values(), strict=True)) if len(names) > 1 else next(iter(names.values())),
        metadata_header=list(names) if len(names) > 1 else None,
        label_img=pictures,
        global_step=epoch,
        tag="validation",
    )
    writer.flush()


def _thumbnail(manifest: Manifest, row: int) -> np.ndarray:
    try:
        crop = cut(read_picture(manifest.file(row)).image, manifest.boxes[row], PREVIEW)
    except PictureError:
        return np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    return np.asarray(crop.resize((THUMBNAIL, THUMBNAIL)))

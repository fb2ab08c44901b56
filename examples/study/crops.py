"""Cut ears out of images and embed them: unchanged, with the ear painted over, or with all but the ear painted over.

B images of a batch, N images, P ways of painting, D embedding, H = W = crop size in pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from ear_teacher_cli.data.boxes import Box
from ear_teacher_cli.data.crop import cut, points_in_crop, read_image
from ear_teacher_cli.data.dataset import UnreadableImage, collate
from ear_teacher_cli.data.manifest import Manifest
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.embedding.embedder import Embedder
from ear_teacher_cli.errors import ImageError, ManifestError

NOTHING, EAR, SURROUNDINGS = "nothing", "ear", "surroundings"  # what is painted over
# Semi-axes of the ear without a box, as shares of the image's width and height. An ellipse that touches the borders
# would show hair and skin of crops that are cut wide of the ear.
EAR_WITHOUT_BOX = 0.44, 0.48


@dataclass
class Images:
    """Embed images with a backbone, or describe them by their grey pixels if there is none.

    `painted`: P ways of painting, each of NOTHING, EAR, SURROUNDINGS. Each image is decoded once for all of them.
    """

    preprocessing: Preprocessing
    embedder: Embedder | None
    painted: tuple[str, ...]
    num_workers: int

    def rows(self, manifest: Manifest) -> tuple[list[np.ndarray], list[int]]:
        """Return (P arrays float32 N,D of unit length, their indices in the manifest), without unreadable images."""
        crops = Crops(manifest, self.preprocessing, self.painted)
        found: list[list[torch.Tensor]] = [[] for _ in self.painted]
        indices: list[int] = []
        for batch in DataLoader(crops, batch_size=32, num_workers=self.num_workers, collate_fn=collate):
            if len(batch["index"]):
                for rows, pixels in zip(found, batch["pixels"].unbind(1), strict=True):
                    rows.append(self.embedder(pixels) if self.embedder else _grey(pixels))
                indices += batch["index"].tolist()
        if not indices:
            raise ManifestError(f"{manifest.source}: no image could be read; run earteach validate-data")
        return [torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy() for rows in found], indices


class Crops(Dataset):
    """Clean crops as EarDataset cuts them, painted in P ways: `pixels` uint8 P,3,H,W."""

    def __init__(self, manifest: Manifest, preprocessing: Preprocessing, painted: tuple[str, ...] = (NOTHING,)):
        self.manifest, self.preprocessing, self.painted = manifest, preprocessing, painted

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> dict[str, Any] | UnreadableImage:
        box = self.manifest.boxes[index]
        try:
            image = read_image(self.manifest.file(index)).image
            crop = cut(image, box, self.preprocessing)
        except ImageError as error:
            return UnreadableImage(index, error.reason, error.detail)
        crops = [paint(crop, what, image.size, box, self.preprocessing) for what in self.painted]
        if self.preprocessing.mirror and self.manifest.side(index) == "right":
            crops = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in crops]
        pixels = torch.from_numpy(np.stack([np.asarray(each) for each in crops])).permute(0, 3, 1, 2)
        return {"index": index, "pixels": pixels}


def paint(
    crop: Image.Image, what: str, size: tuple[int, int], box: Box | None, preprocessing: Preprocessing
) -> Image.Image:
    """Return the crop of an image of `size` (width, height) with a part filled with the mean colour.

    The ear is the ellipse inscribed in its box. Without a box the image is a crop of the ear: EAR fills the ellipse
    inscribed in it, so that nothing of the ear remains, and SURROUNDINGS leaves the ellipse of EAR_WITHOUT_BOX, so that
    little else than the ear does.
    """
    if what == NOTHING:
        return crop
    corners = np.array(box or (0, 0, *size), float).reshape(2, 2)
    if box is None and what == SURROUNDINGS:
        centre = np.array(size) / 2
        corners = centre + np.array([[-1], [1]]) * (np.array(size) * EAR_WITHOUT_BOX)
    filled = Image.new("L", crop.size, 0 if what == EAR else 255)
    ellipse = points_in_crop(corners, size, box, preprocessing).ravel().tolist()
    ImageDraw.Draw(filled).ellipse(ellipse, fill=255 if what == EAR else 0)
    painted = crop.copy()
    painted.paste(preprocessing.fill, mask=filled)
    return painted


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """Return the luminance (ITU-R BT.601) of uint8 B,3,H,W as float32 B,H*W."""
    return (pixels.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).flatten(1)


def evenly_spaced(manifest: Manifest, most: int) -> Manifest:
    """Return at most `most` rows of a manifest, evenly spaced."""
    return manifest.subset(np.linspace(0, len(manifest) - 1, min(most, len(manifest))).round().astype(int).tolist())

"""The golden batch: reference images with their expected embeddings, stored in every export.

The embeddings are computed in float64 and stored in float32: computed in float32, their last digits would depend on the
processor and the number of threads. The same checkpoint therefore gives the same file on other processors, as long as
the versions of Pillow, which draws the images, and zlib, which compresses them, are equal (measured on 8,448 values of
three models, instruction sets from SSE4.1 to AVX512, one and two threads: all equal). This is not guaranteed: a sum
that lies halfway between two float32 values may be rounded to either. `verify` therefore compares within TOLERANCE.
"""

import base64
import copy
import json
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from ..data.preprocessing import Preprocessing, normalise
from ..errors import WeightsError

# The largest accepted difference between embeddings computed in float32 on another machine or in onnxruntime and the
# golden ones, as a share of the largest value (or of 1, if that is larger).
TOLERANCE = 1e-4
_MAX_BYTES = 2**28  # of the images, uncompressed


@dataclass(frozen=True)
class Golden:
    """`pixels`: uint8 [G, 3, S, S], before normalisation. `embeddings`: float32 [G, D], raw outputs of the backbone."""

    pixels: np.ndarray
    embeddings: np.ndarray

    def difference(self, embeddings: np.ndarray) -> float:
        """Return the relative difference of `embeddings` [G, D] from the expected ones."""
        return relative_difference(embeddings, self.embeddings)

    def as_text(self) -> str:
        """Return JSON for the header of an export: `pictures` (G), `pixels` (zlib, base64), `embeddings` (base64)."""
        packed = {
            "pictures": len(self.pixels),
            "pixels": base64.b64encode(zlib.compress(self.pixels.tobytes(), 9)).decode(),
            "embeddings": base64.b64encode(self.embeddings.astype("<f4").tobytes()).decode(),
        }
        return json.dumps(packed)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest |found - expected| as a share of the largest |expected| (or of 1, if that is larger); infinity
    where the shapes differ or a value is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def golden_from(text: str, image_size: int, embedding_dim: int, where: str) -> Golden:
    """Parse the output of `Golden.as_text`. Raises WeightsError if it is malformed or has other shapes."""
    try:
        packed = json.loads(text)
        count, shape = int(packed["pictures"]), (3, image_size, image_size)
        size = count * 3 * image_size**2
        if not 0 < size <= _MAX_BYTES:
            raise ValueError(f"{count} images")
        pixels = zlib.decompressobj().decompress(base64.b64decode(packed["pixels"], validate=True), size + 1)
        embeddings = base64.b64decode(packed["embeddings"], validate=True)
        return Golden(
            np.frombuffer(pixels, np.uint8).reshape(count, *shape).copy(),  # torch.from_numpy needs writable memory
            np.frombuffer(embeddings, "<f4").reshape(count, embedding_dim).copy(),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error) as error:
        raise WeightsError(f"{where}: its golden batch is damaged ({error!r}); export it again") from error


def golden_of(backbone: nn.Module, preprocessing: Preprocessing) -> Golden:
    """Draw the reference images and embed them on the CPU in float64."""
    pixels = draw(preprocessing.image_size)
    exact = copy.deepcopy(backbone).cpu().double().eval()
    with torch.inference_mode():
        images = normalise(torch.from_numpy(pixels), preprocessing)
        embeddings = torch.cat([exact(image[None].double()) for image in images])
    return Golden(pixels, embeddings.numpy().astype(np.float32))


def draw(size: int) -> np.ndarray:
    """Draw four images, uint8 [4, 3, size, size]: a left ear, a right ear, a colour ramp, blocks of noise."""
    ear = _draw_ear(size)
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    ramps = np.stack(
        [np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), np.full((size, size), 96, np.uint8)], -1
    )
    cells = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    cell_of_pixel = np.arange(size) * 8 // size
    blocks = cells[cell_of_pixel][:, cell_of_pixel]
    return np.ascontiguousarray(np.stack([ear, ear[:, ::-1], ramps, blocks]).transpose(0, 3, 1, 2))


def _draw_ear(size: int) -> np.ndarray:
    """Draw a left ear in flat colours, uint8 [size, size, 3]."""
    image = Image.new("RGB", (size, size), (196, 152, 126))
    pen, line = ImageDraw.Draw(image), max(1, size // 20)

    def scaled(*shares: float) -> list[int]:
        return [round(share * size) for share in shares]

    pen.ellipse(scaled(0.18, 0.06, 0.82, 0.76), (222, 178, 150), (148, 100, 80), line)  # helix
    pen.ellipse(scaled(0.26, 0.62, 0.60, 0.95), (226, 180, 154), (158, 110, 90), max(1, line // 2))  # lobule
    pen.arc(scaled(0.32, 0.16, 0.70, 0.70), 200, 70, (164, 114, 92), line)  # antihelix
    pen.ellipse(scaled(0.34, 0.36, 0.60, 0.66), (112, 66, 52))  # concha
    pen.ellipse(scaled(0.24, 0.44, 0.40, 0.60), (214, 166, 138))  # tragus
    return np.asarray(image)

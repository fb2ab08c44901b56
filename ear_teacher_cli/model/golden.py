"""The golden batch: drawn images and the embeddings they must have, which travel with every export.

The embeddings are computed in float64 and stored in float32: in float32 their last digits would depend on the processor
and the number of threads. So the same checkpoint gives the same file on other processors, as long as Pillow, which draws
the images, and zlib, which packs them, are of the same versions (8,448 numbers of three models, instruction sets from
SSE4.1 to AVX512, one and two threads: all equal). It is not a proof: a sum that lies between two float32 numbers may be
rounded to either. `verify` therefore compares within TOLERANCE.
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

# What float32 makes of the golden batch on another machine, or in onnxruntime, may differ by this share of the
# largest number (or of 1, if that is larger).
TOLERANCE = 1e-4
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Golden:
    """`pixels` uint8 [G, 3, S, S], before normalisation; `embeddings` float32 [G, D], as the backbone gives them."""

    pixels: np.ndarray
    embeddings: np.ndarray

    def difference(self, embeddings: np.ndarray) -> float:
        """The largest |difference| from [G, D] `embeddings`, as a share of the largest number (or of 1)."""
        return relative_difference(embeddings, self.embeddings)

    def as_text(self) -> str:
        packed = {
            "pictures": len(self.pixels),
            "pixels": base64.b64encode(zlib.compress(self.pixels.tobytes(), 9)).decode(),
            "embeddings": base64.b64encode(self.embeddings.astype("<f4").tobytes()).decode(),
        }
        return json.dumps(packed)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest |found - expected|, as a share of the largest |expected| (or of 1, if that is larger); infinite where
    shapes differ or a number is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def golden_from(text: str, image_size: int, embedding_dim: int, where: str) -> Golden:
    """What `as_text` wrote. Raises WeightsError."""
    try:
        packed = json.loads(text)
        count, shape = int(packed["pictures"]), (3, image_size, image_size)
        size = count * 3 * image_size**2
        if not 0 < size <= _MOST_BYTES:
            raise ValueError(f"{count} images")
        pixels = zlib.decompressobj().decompress(base64.b64decode(packed["pixels"], validate=True), size + 1)
        embeddings = base64.b64decode(packed["embeddings"], validate=True)
        return Golden(
            np.frombuffer(pixels, np.uint8).reshape(count, *shape).copy(),  # torch wants it writable
            np.frombuffer(embeddings, "<f4").reshape(count, embedding_dim).copy(),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error) as error:
        raise WeightsError(f"{where}: its golden batch is not whole ({error!r}); export it again") from error


def golden_of(backbone: nn.Module, preprocessing: Preprocessing) -> Golden:
    """Draw the images and embed them, on the CPU."""
    pixels = draw(preprocessing.image_size)
    exact = copy.deepcopy(backbone).cpu().double().eval()
    with torch.inference_mode():
        images = normalise(torch.from_numpy(pixels), preprocessing)
        embeddings = torch.cat([exact(image[None].double()) for image in images])
    return Golden(pixels, embeddings.numpy().astype(np.float32))


def draw(size: int) -> np.ndarray:
    """Four images, uint8 [4, 3, size, size]: a drawn left ear, a right one, a ramp of colours, blocks of noise."""
    ear = _ear(size)
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    ramps = np.stack(
        [np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), np.full((size, size), 96, np.uint8)], -1
    )
    cells = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    place = np.arange(size) * 8 // size
    blocks = cells[place][:, place]
    return np.ascontiguousarray(np.stack([ear, ear[:, ::-1], ramps, blocks]).transpose(0, 3, 1, 2))


def _ear(size: int) -> np.ndarray:
    """A left ear in flat colours, size x size x 3."""
    image = Image.new("RGB", (size, size), (196, 152, 126))
    pen, line = ImageDraw.Draw(image), max(1, size // 20)

    def place(*shares: float) -> list[int]:
        return [round(share * size) for share in shares]

    pen.ellipse(place(0.18, 0.06, 0.82, 0.76), (222, 178, 150), (148, 100, 80), line)  # helix
    pen.ellipse(place(0.26, 0.62, 0.60, 0.95), (226, 180, 154), (158, 110, 90), max(1, line // 2))  # lobule
    pen.arc(place(0.32, 0.16, 0.70, 0.70), 200, 70, (164, 114, 92), line)  # antihelix
    pen.ellipse(place(0.34, 0.36, 0.60, 0.66), (112, 66, 52))  # concha
    pen.ellipse(place(0.24, 0.44, 0.40, 0.60), (214, 166, 138))  # tragus
    return np.asarray(image)

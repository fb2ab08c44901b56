"""Decode the part of a JPEG that a crop needs: at reduced resolution if the crop is small, and no row below it.

libjpeg can decode to 1/2, 1/4 or 1/8 of the size with less work, and decodes from the top down. The result is close to
the crop of the whole image (see SPARE).
"""

import io
import math
from dataclasses import dataclass

from PIL import Image

Box = tuple[float, float, float, float]

# A photo is decoded at no less than this many times the crop's resolution. At 1.5 the mean difference from the crop of
# the whole image is about 1 level of 255 in photographs, less than JPEG's own rounding at quality 90. At hard edges of
# drawings, where the filters of libjpeg and Pillow differ, single pixels differ by up to 60.
SPARE = 1.5
_MARGIN = 4  # pixels of the crop around its region that the resampling filter reads (Lanczos: 3)
_END_OF_IMAGE = b"\xff\xd9"
# EXIF orientation -> transposition that turns the stored image upright (PIL's exif_transpose also rewrites the EXIF,
# and fails on malformed ones).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_INVERSE = {6: 8, 8: 6}  # the others are their own inverse


@dataclass(frozen=True)
class Part:
    """An upright part of an image, perhaps at reduced resolution, and where the requested region lies in it
    (pixels)."""

    image: Image.Image
    region: Box


def part_of(image: Image.Image, data: bytes, orientation: int, region: Box, scale: tuple[float, float]) -> Part | None:
    """Decode what is needed to reduce `region` (pixels of the upright image) by the factors `scale` (x, y).

    `image`: opened from `data`, not decoded. None if it saves nothing, or if the file lacks the end of a JPEG: only
    decoding all of it shows whether it is complete.
    """
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG followed by others, as phones write
        return None
    shrink = next((k for k in (8, 4, 2) if k * SPARE <= min(scale)), 1)
    width, height = image.size
    upright_size = (height, width) if orientation in TURNED else (width, height)
    stored_region = turned(region, _INVERSE.get(orientation, orientation), upright_size)
    x1, y1, x2, y2 = (v / shrink for v in stored_region)
    shrunk_size = -(-width // shrink), -(-height // shrink)
    needed = window((x1, y1, x2, y2), (scale[0] / shrink, scale[1] / shrink), shrunk_size)
    bottom = needed[3]
    stop_early = bottom < shrunk_size[1] and _is_complete(data)
    if shrink == 1 and not stop_early:
        return None
    feed = _Feed(data)
    image = Image.open(feed, formats=("JPEG",))
    if shrink > 1:
        image.draft(None, (width // shrink, height // shrink))
        if image.size != shrunk_size:
            return None
    if stop_early:
        feed.decode_to(bottom, image)
    part = image.crop(needed)
    inside = (x1 - needed[0], y1 - needed[1], x2 - needed[0], y2 - needed[1])
    if orientation in UPRIGHT:
        inside = turned(inside, orientation, part.size)
        part = part.transpose(UPRIGHT[orientation])
    return Part(part, inside)


def window(region: Box, scale: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixels x1, y1, x2, y2 of an image of `size` (width, height) that resampling `region` by the factors
    `scale` (x, y) reads. Taking the window of a window changes nothing."""
    x1, y1, x2, y2 = region
    margin = math.ceil(_MARGIN * max(1, *scale))
    right, bottom = min(size[0], math.ceil(x2) + margin), min(size[1], math.ceil(y2) + margin)
    return max(0, int(x1) - margin), max(0, int(y1) - margin), right, bottom


def turned(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """Return where `box` of an image of `size` (width, height) lies after UPRIGHT[orientation]."""
    x1, y1, x2, y2 = box
    width, height = size
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    return (y1, x1, y2, x2) if orientation in TURNED else (x1, y1, x2, y2)


class _RowsDecoded(Exception):
    """The required rows are decoded."""


class _Feed(io.BytesIO):
    """A file that stops its decoder, by an exception, once a row of the image is decoded; rows are decoded from the
    top."""

    _image: Image.Image | None = None
    _row = 0

    def decode_to(self, bottom: int, image: Image.Image) -> None:
        """Decode the rows above `bottom` of `image`, which was opened from this file."""
        self._image, self._row = image, bottom - 1
        try:
            image.load()
        except _RowsDecoded:
            image.tile = []  # type: ignore[attr-defined]  # PIL then takes it as decoded
        self._image = None

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes; raises _RowsDecoded if no more are needed."""
        if self._image is not None and _is_decoded(self._image, self._row):
            raise _RowsDecoded
        return super().read(size)


def _is_decoded(image: Image.Image, row: int) -> bool:
    """Whether a row has pixels that are not black, as all are at first. A black row costs reading on, nothing else."""
    found = (image.im.getpixel((x, row)) for x in range(0, image.width, max(1, image.width // 16)))
    return any(sum(pixel) if isinstance(pixel, tuple) else pixel for pixel in found)


def _is_complete(data: bytes) -> bool:
    """Whether the file has the end of a JPEG: one that was cut short has not."""
    return data[-64:].rstrip(b"\0").endswith(_END_OF_IMAGE)

"""The part of a JPEG that a crop needs: as few pixels as its size allows, and no row below it.

libjpeg can decode to 1/2, 1/4 or 1/8 of the size for less work, and from the top down. Both are used where a crop of
a large photo is wanted. What comes out is close to the crop of the whole image (see SPARE).
"""

import io
import math
from dataclasses import dataclass

from PIL import Image

Box = tuple[float, float, float, float]

# A photo is decoded no smaller than this many times the crop's resolution. At 1.5 the mean difference from the crop
# of the whole image is about 1 level of 255 in photographs, under what JPEG's own rounding does at quality 90; at
# hard edges of drawings, which libjpeg's filter and Pillow's treat otherwise, single pixels differ by up to 60.
SPARE = 1.5
_MARGIN = 4  # pixels of the crop around its region that the resampling filter looks at (Lanczos: 3)
_END = b"\xff\xd9"
# EXIF orientation -> what turns the stored image upright (PIL's own exif_transpose writes the EXIF anew, and
# fails on odd ones).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # width and height change places
_BACK = {6: 8, 8: 6}  # the others are their own inverse


@dataclass(frozen=True)
class Part:
    """An upright piece of an image, perhaps decoded smaller, and where the wanted region is in it."""

    image: Image.Image
    region: Box


def part_of(image: Image.Image, data: bytes, orientation: int, region: Box, scale: tuple[float, float]) -> Part | None:
    """Decode what `region` (pixels of the upright image) needs to be made `scale` (x, y) times smaller.

    `image`: what was opened from `data`. None if nothing is to be gained, or the file does not end as a JPEG
    does: whether it is whole is then to be found by decoding all of it.
    """
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with others behind it, as telephones write
        return None
    shrink = next((k for k in (8, 4, 2) if k * SPARE <= min(scale)), 1)
    width, height = image.size
    upright_size = (height, width) if orientation in TURNED else (width, height)
    wanted = turned(region, _BACK.get(orientation, orientation), upright_size)  # in the image as it is stored
    x1, y1, x2, y2 = (v / shrink for v in wanted)
    place = window(
        (x1, y1, x2, y2), (scale[0] / shrink, scale[1] / shrink), (-(-width // shrink), -(-height // shrink))
    )
    bottom = place[3]
    partly = bottom < -(-height // shrink) and _ends(data)
    if shrink == 1 and not partly:
        return None
    feed = _Feed(data)
    image = Image.open(feed, formats=("JPEG",))
    if shrink > 1:
        image.draft(None, (width // shrink, height // shrink))
        if image.size != (-(-width // shrink), -(-height // shrink)):
            return None
    if partly:
        feed.decode_to(bottom, image)
    piece = image.crop(place)
    inside = (x1 - place[0], y1 - place[1], x2 - place[0], y2 - place[1])
    if orientation in UPRIGHT:
        inside = turned(inside, orientation, piece.size)
        piece = piece.transpose(UPRIGHT[orientation])
    return Part(piece, inside)


def window(region: Box, scale: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """What is looked at of an image of `size` (width, height) to make `region` of it `scale` (x, y) times smaller, in
    whole pixels. What is cut to its window once stays as it is when it is cut again."""
    x1, y1, x2, y2 = region
    margin = math.ceil(_MARGIN * max(1, *scale))
    right, bottom = min(size[0], math.ceil(x2) + margin), min(size[1], math.ceil(y2) + margin)
    return max(0, int(x1) - margin), max(0, int(y1) - margin), right, bottom


def turned(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """Where `box` in an image of `size` (width, height) is when UPRIGHT[orientation] was done to it."""
    x1, y1, x2, y2 = box
    width, height = size
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    return (y1, x1, y2, x2) if orientation in TURNED else (x1, y1, x2, y2)


class _Enough(Exception):
    """The rows that are wanted are there."""


class _Feed(io.BytesIO):
    """Gives a decoder its bytes until `row` of `image` is filled. Rows come from the top, so those above it are, too."""

    image: Image.Image | None = None
    row = 0

    def decode_to(self, bottom: int, image: Image.Image) -> None:
        """Fill the rows above `bottom` of `image`, which was opened from this."""
        self.image, self.row = image, bottom - 1
        try:
            image.load()
        except _Enough:
            image.tile = []  # type: ignore[attr-defined]  # decoded, as far as anyone will look
        self.image = None

    def read(self, size: int | None = -1) -> bytes:
        if self.image is not None and self._is_filled():
            raise _Enough
        return super().read(size)

    def _is_filled(self) -> bool:
        # An image starts out black; where the row itself is, more is read than need be, and nothing is lost.
        pixels, width = self.image.im, self.image.width
        found = (pixels.getpixel((x, self.row)) for x in range(0, width, max(1, width // 16)))
        return any(sum(pixel) if isinstance(pixel, tuple) else pixel for pixel in found)


def _ends(data: bytes) -> bool:
    """Whether the file ends as a JPEG does: what was cut short does not."""
    return data[-64:].rstrip(b"\0").endswith(_END)

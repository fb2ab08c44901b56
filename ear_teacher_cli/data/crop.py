"""The one place where a picture is opened and an ear is cut out of it. No torch here.

A picture is turned upright by its EXIF orientation, as OpenCV's imread does: boxes are in pixels of the upright
picture. `read_picture` decodes it wholly (PIL's `verify` passes a JPEG cut in half), `load_crop` what the crop needs.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from .. import platform
from ..errors import PictureError
from ..files import brief
from .boxes import Box
from .image_suffixes import can_read_heic
from .jpeg import TURNED, UPRIGHT, part_of
from .pixels import Preprocessing

# Reasons a PictureError can have, in the words of validate-data's report.
REASONS = {
    "missing": "no such file",
    "unreadable": "the file cannot be read",
    "not-a-picture": "the file is no picture",
    "truncated": "the picture is cut short or damaged",
    "too-slow": "the picture cannot be decoded in reasonable time",
    "too-large": "absurdly many pixels (decompression bomb)",
    "outside-root": "the path leaves the root folder",
    "box-not-finite": "the box holds NaN or infinity",
    "box-empty": "the box has x2 <= x1 or y2 <= y1",
    "box-tiny": "the box is under 2 px on a side",
    "box-outside": "the box leaves the picture",
}
# PIL raises its own bomb error above twice MAX_IMAGE_PIXELS (179 million pixels); that limit stays.
_ORIENTATION = 0x0112
# Decoders of photographs only: others (EPS, say) start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
_TINY = 2.0  # px; no ear, but a share of the image, or a slip
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
CUT = 1  # to be raised whenever the same picture and box give another crop: kept ones are of the old kind
_MAX_FILE_BYTES = 2**30
_DECODE_SECONDS = 60  # the largest picture that PIL's limit lets through takes a few


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture and what is worth knowing of its file."""

    image: Image.Image
    mode: str  # PIL's mode before conversion to RGB
    orientation: int  # EXIF 1-8; 1 is upright
    data: bytes  # the file's bytes


def read_picture(path: str) -> Picture:
    """Decode a whole picture to upright RGB. Raises PictureError (missing, unreadable, not-a-picture, ...)."""
    data = _read_bytes(path)
    with _decoding():
        image, orientation = _opened(io.BytesIO(data), data[:16])
        mode = image.mode
        image.load()
        image = _to_rgb(image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image)
    return Picture(image, mode, orientation, data)


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image once it is upright, from its header alone. Raises PictureError."""
    with _file(path) as file:
        try:
            image, orientation = _opened(file, file.peek(16)[:16])
            return (image.height, image.width) if orientation in TURNED else image.size
        except UnidentifiedImageError as error:
            raise PictureError("not-a-picture", "the file is no picture") from error
        except (Image.DecompressionBombError, *_DECODER_ERRORS) as error:
            raise PictureError("truncated", f"cut short or damaged ({brief(error)})") from error


def _opened(file: IO[bytes], head: bytes) -> tuple[Image.Image, int]:
    """(the picture as it is stored, not yet decoded, its EXIF orientation). `head`: its first 16 bytes."""
    image = Image.open(file, formats=_formats(head))
    if image.format == "TIFF":  # turns itself upright when it is decoded, and forgets that it was not
        image.load()
    orientation = image.getexif().get(_ORIENTATION, 1)
    return image, orientation if isinstance(orientation, int) else 1


def _formats(head: bytes) -> tuple[str, ...]:
    """The decoders that may be tried. Raises PictureError for HEIC where pillow-heif is not installed."""
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIC_BRANDS:
        return _FORMATS
    if not can_read_heic():
        raise PictureError("not-a-picture", "is HEIC; pip install 'ear-teacher-cli[heic]' to read it")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF",)


@contextmanager
def _decoding() -> Iterator[None]:
    """What decoders raise, as PictureError."""
    try:
        with platform.cpu_time_limit(_DECODE_SECONDS, _too_slow), warnings.catch_warnings():
            # Oddities short of an error (bomb warning, EXIF, palette) are validate-data's to report, not noise here.
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:
        raise PictureError("not-a-picture", "the file is no picture") from error
    except Image.DecompressionBombError as error:
        raise PictureError("too-large", "absurdly many pixels (decompression bomb)") from error
    except _DECODER_ERRORS as error:
        raise PictureError("truncated", f"cut short or damaged ({brief(error)})") from error


def _too_slow() -> PictureError:
    return PictureError("too-slow", f"not decoded in {_DECODE_SECONDS} s of computing")


def check_box(box: Box) -> None:
    """Raise PictureError if the box cannot be one, whatever the picture."""
    x1, y1, x2, y2 = box
    if not all(np.isfinite(box)):
        raise PictureError("box-not-finite", f"box {_numbers(box)} holds NaN or infinity")
    if x2 <= x1:
        raise PictureError("box-empty", f"box {_numbers(box)} has x2 <= x1")
    if y2 <= y1:
        raise PictureError("box-empty", f"box {_numbers(box)} has y2 <= y1")


def check_box_inside(box: Box, size: tuple[int, int]) -> None:
    """Raise PictureError if the box leaves a picture of `size` (width, height) by more than a pixel, or is tiny."""
    width, height = size
    x1, y1, x2, y2 = box
    if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
        raise PictureError("box-outside", f"box {_numbers(box)} leaves the picture of {width} x {height}")
    if min(x2 - x1, y2 - y1) < _TINY:
        raise PictureError(
            "box-tiny", f"box {_numbers(box)} is {x2 - x1:.3g} x {y2 - y1:.3g} px; is it in other units?"
        )


def buffered_box(box: Box, size: tuple[int, int], buffer: float) -> Box:
    """The box grown by `buffer` of its width on the left and right and of its height above and below,
    clamped to a picture of `size` (width, height). Pixels, may be fractional."""
    width, height = size
    x1, y1, x2, y2 = box
    dx, dy = buffer * (x2 - x1), buffer * (y2 - y1)
    return max(0.0, x1 - dx), max(0.0, y1 - dy), min(float(width), x2 + dx), min(float(height), y2 + dy)


def cut(image: Image.Image, box: Box | None, preprocessing: Preprocessing) -> Image.Image:
    """The ear as an RGB picture of image_size x image_size: buffer, clamp, then pad to a square (or squash).

    `box` None takes the whole picture. Raises PictureError if the box is none, or leaves the picture.
    """
    return _resized(image, *_placement(image.size, box, preprocessing), preprocessing)


def _resized(
    image: Image.Image, region: Box, inner: tuple[int, int], corner: tuple[int, int], preprocessing: Preprocessing
) -> Image.Image:
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    if not preprocessing.pad:
        return image.resize(inner, resample, box=region)
    canvas = Image.new("RGB", (preprocessing.image_size,) * 2, preprocessing.fill)
    canvas.paste(image.resize(inner, resample, box=region), corner)
    return canvas


def points_in_crop(
    points: ArrayLike, size: tuple[int, int], box: Box | None, preprocessing: Preprocessing
) -> np.ndarray:
    """Where points of a picture of `size` (width, height) are in its crop: float64 [..., 2], x and y in pixels.

    Pixel i covers i to i + 1 on both sides, as boxes do. Raises PictureError as `cut` does.
    """
    (x1, y1, x2, y2), inner, corner = _placement(size, box, preprocessing)
    scale = np.array([inner[0] / (x2 - x1), inner[1] / (y2 - y1)])
    return (np.asarray(points, np.float64) - (x1, y1)) * scale + corner


def _placement(
    size: tuple[int, int], box: Box | None, preprocessing: Preprocessing
) -> tuple[Box, tuple[int, int], tuple[int, int]]:
    """(region of the picture, its width and height in the crop, its upper left corner there)."""
    if box is None:
        region: Box = (0.0, 0.0, float(size[0]), float(size[1]))
    else:
        check_box(box)
        check_box_inside(box, size)
        region = buffered_box(box, size, preprocessing.bbox_buffer)
        if region[2] <= region[0] or region[3] <= region[1]:
            raise PictureError("box-outside", f"box {_numbers(box)} leaves the picture of {size[0]} x {size[1]}")
    side = preprocessing.image_size
    if not preprocessing.pad:
        return region, (side, side), (0, 0)
    width, height = region[2] - region[0], region[3] - region[1]
    scale = side / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    return region, inner, ((side - inner[0]) // 2, (side - inner[1]) // 2)


def load_crop(path: str, box: Box | None, preprocessing: Preprocessing) -> np.ndarray:
    """Read and cut, decoding no more than the crop needs: uint8 3,H,W. Raises PictureError.

    From a large JPEG it is the crop of the whole picture to within what jpeg.SPARE says, else exactly.
    """
    data = _read_bytes(path)
    with _decoding():
        image, orientation = _opened(io.BytesIO(data), data[:16])
        size = (image.height, image.width) if orientation in TURNED else image.size
        region, inner, corner = _placement(size, box, preprocessing)
        scale = (region[2] - region[0]) / inner[0], (region[3] - region[1]) / inner[1]
        if preprocessing.interpolation == "nearest":
            scale = 1.0, 1.0  # it averages nothing, so nothing may be averaged before it
        part = part_of(image, data, orientation, region, scale)
        if part is not None:
            image, region = part.image, part.region
        else:
            image.load()
            image = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        crop = _resized(_to_rgb(image), region, inner, corner, preprocessing)
    return np.stack([np.asarray(band) for band in crop.split()])  # H,W,3 -> 3,H,W


# What PIL's decoders raise on damaged bytes: mostly OSError, SyntaxError (broken PNG) and ValueError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    AttributeError,
    RuntimeError,
    struct.error,
)


def _read_bytes(path: str) -> bytes:
    with _file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise PictureError("unreadable", f"cannot be read ({brief(error)})") from error


@contextmanager
def _file(path: str) -> Iterator[io.BufferedReader]:
    """A photograph's file, open for reading. Raises PictureError if it cannot be one."""
    try:
        handle = platform.open_photograph(path)
    except FileNotFoundError as error:
        raise PictureError("missing", "no such file") from error
    except (OSError, ValueError) as error:
        raise PictureError("unreadable", f"cannot be read ({brief(error)})") from error
    try:
        try:
            status = os.fstat(handle)
        except OSError as error:
            raise PictureError("unreadable", f"cannot be read ({brief(error)})") from error
        if not stat.S_ISREG(status.st_mode):
            raise PictureError("unreadable", "is a folder or a device, not a file")
        if status.st_size > _MAX_FILE_BYTES:
            raise PictureError("too-large", f"{status.st_size / 2**30:.1f} GiB is no photograph")
        if status.st_size == 0:
            raise PictureError("truncated", "the file is empty")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; 16-bit grey is scaled (PIL would clip it to white), alpha is dropped (as OpenCV does)."""
    if image.mode == "RGB":  # PIL would copy it
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64)
        return Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _numbers(box: Box) -> str:
    return "[" + ", ".join(f"{v:g}" for v in box) + "]"

"""Open an image and cut an ear out of it: the only module that does. Imports no torch.

An image is turned upright by its EXIF orientation, as OpenCV's imread does: boxes are in pixels of the upright image.
`read_image` decodes all of it (PIL's `verify` accepts a JPEG that is cut in half), `load_crop` only what the crop
needs.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from .. import library_messages, platform
from ..errors import ImageError
from ..files import printable, short_message
from .boxes import Box
from .image_suffixes import can_read_heic
from .jpeg import TURNED, UPRIGHT, part_of, window
from .preprocessing import Preprocessing

# Codes of ImageError.reason -> their meaning in the report of validate-data.
REASONS = {
    "missing": "no such file",
    "unreadable": "the file cannot be read",
    "not-an-image": "the file is not an image",
    "truncated": "the image is cut short or damaged",
    "too-slow": "the image cannot be decoded in reasonable time",
    "too-large": "too many pixels (decompression bomb)",
    "outside-root": "the path leaves the root folder",
    "box-not-numbers": "the box is not four numbers",
    "box-not-finite": "the box holds NaN or infinity",
    "box-empty": "the box has x2 <= x1 or y2 <= y1",
    "box-tiny": "the box is under 2 px on a side",
    "box-outside": "the box leaves the image",
}
ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray  # what `load_crop` reads
CROP_VERSION = 2  # raise it whenever the same image and box give another crop: it invalidates cached crops
# PIL raises its own bomb error above twice MAX_IMAGE_PIXELS (179 million pixels); that limit is unchanged.
_ORIENTATION = 0x0112  # EXIF tag
# Decoders of photographs only: others (EPS, for example) start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
_MIN_SIDE = 2.0  # px of a box: smaller ones are shares of the image, or mistakes
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MAX_FILE_BYTES = 2**30
_DECODE_SECONDS = 60  # of CPU time; the largest image within PIL's limit takes a few


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB image and properties of its file."""

    image: Image.Image
    mode: str  # PIL's mode before conversion to RGB
    orientation: int  # EXIF 1-8; 1 is upright
    data: bytes  # the file's bytes


def read_image(path: str) -> DecodedImage:
    """Decode a whole image to upright RGB. Raises ImageError (missing, unreadable, not-an-image, ...)."""
    data = _read_bytes(path)
    with _decoding():
        image, orientation = _open(io.BytesIO(data), data[:16])
        mode = image.mode
        image.load()
        image = _to_rgb(image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image)
    return DecodedImage(image, mode, orientation, data)


def image_size(path: str) -> tuple[int, int]:
    """Return (width, height) of the upright image, from its header alone. Raises ImageError."""
    with _open_file(path) as file:
        try:
            image, orientation = _open(file, file.peek(16)[:16])
            return (image.height, image.width) if orientation in TURNED else image.size
        except UnidentifiedImageError as error:
            raise ImageError("not-an-image", "the file is not an image") from error
        except (Image.DecompressionBombError, *_DECODER_ERRORS) as error:
            raise ImageError("truncated", f"cut short or damaged ({short_message(error)})") from error


def _open(file: IO[bytes], head: bytes) -> tuple[Image.Image, int]:
    """Return (image as stored, not yet decoded; its EXIF orientation). `head`: the file's first 16 bytes."""
    image = Image.open(file, formats=_formats(head))
    if image.format == "TIFF":  # PIL turns it upright while decoding, and removes the orientation
        image.load()
    return image, _orientation_of(image)


def _orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none."""
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1


def _formats(head: bytes) -> tuple[str, ...]:
    """Return the decoders that may be tried. Raises ImageError for HEIC if pillow-heif is not installed."""
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIC_BRANDS:
        return _FORMATS
    if not can_read_heic():
        raise ImageError("not-an-image", "is HEIC; pip install 'ear-teacher-cli[heic]' to read it")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF",)


@contextmanager
def _decoding() -> Iterator[None]:
    """Limit the time of decoding, and turn what decoders raise into ImageError."""
    try:
        with platform.cpu_time_limit(_DECODE_SECONDS, _too_slow), warnings.catch_warnings():
            # about EXIF, palettes, many pixels: validate-data reports them
            warnings.simplefilter(library_messages.warning_action())
            yield
    except UnidentifiedImageError as error:
        raise ImageError("not-an-image", "the file is not an image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", "too many pixels (decompression bomb)") from error
    except _DECODER_ERRORS as error:
        raise ImageError("truncated", f"cut short or damaged ({short_message(error)})") from error


def _too_slow() -> ImageError:
    return ImageError("too-slow", f"not decoded within {_DECODE_SECONDS} s of CPU time")


def as_box(numbers: Any) -> Box:
    """Convert four numbers of any kind to a box. Raises ImageError."""
    try:
        x1, y1, x2, y2 = map(float, () if isinstance(numbers, str | bytes) else numbers)
    except (TypeError, ValueError) as error:
        found = printable(repr(numbers))[:60]
        raise ImageError("box-not-numbers", f"box {found} is not four numbers; give x1, y1, x2, y2") from error
    return x1, y1, x2, y2


def check_box(box: Box) -> None:
    """Raise ImageError if the box is not finite or empty, whatever the image."""
    x1, y1, x2, y2 = box
    if not all(np.isfinite(box)):
        raise ImageError("box-not-finite", f"box {_box_text(box)} holds NaN or infinity")
    if x2 <= x1:
        raise ImageError("box-empty", f"box {_box_text(box)} has x2 <= x1")
    if y2 <= y1:
        raise ImageError("box-empty", f"box {_box_text(box)} has y2 <= y1")


def check_box_inside(box: Box, size: tuple[int, int]) -> None:
    """Raise ImageError if the box leaves an image of `size` (width, height) by over a pixel, or is under 2 px wide or
    high."""
    width, height = size
    x1, y1, x2, y2 = box
    if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
        raise ImageError("box-outside", f"box {_box_text(box)} leaves the image of {width} x {height}")
    if min(x2 - x1, y2 - y1) < _MIN_SIDE:
        raise ImageError("box-tiny", f"box {_box_text(box)} is {x2 - x1:.3g} x {y2 - y1:.3g} px; is it in other units?")


def buffered_box(box: Box, size: tuple[int, int], buffer: float) -> Box:
    """Extend a box by `buffer` of its width on the left and right and of its height above and below, and clamp it to
    an image of `size` (width, height). Pixels, perhaps fractional."""
    width, height = size
    x1, y1, x2, y2 = box
    dx, dy = buffer * (x2 - x1), buffer * (y2 - y1)
    return max(0.0, x1 - dx), max(0.0, y1 - dy), min(float(width), x2 + dx), min(float(height), y2 + dy)


def cut(image: Image.Image, box: Box | None, preprocessing: Preprocessing) -> Image.Image:
    """Cut the ear out of an image: RGB, image_size x image_size. Extend the box, clamp it, pad to a square (or squash).

    `box` None: the whole image. Raises ImageError if the box is impossible or leaves the image.
    """
    return _resized(image, *_placement(image.size, box, preprocessing), preprocessing)


def _resized(
    image: Image.Image, region: Box, inner: tuple[int, int], corner: tuple[int, int], preprocessing: Preprocessing
) -> Image.Image:
    """Resize `region` of the image to `inner` (width, height), with its upper left corner at `corner` of the crop."""
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    # Pillow stores the region as float32: without this, pixels would depend on how much was decoded around it
    needed = window(region, _scale(region, inner, preprocessing), image.size)
    if needed != (0, 0, *image.size):
        image, (left, top) = image.crop(needed), needed[:2]
        region = region[0] - left, region[1] - top, region[2] - left, region[3] - top
    ear, size = image.resize(inner, resample, box=region), (preprocessing.image_size,) * 2
    if ear.size == size:
        return ear
    canvas = Image.new("RGB", size, preprocessing.fill)
    canvas.paste(ear, corner)
    return canvas


def _scale(region: Box, inner: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float]:
    """Return the factors (x, y) by which a region is reduced with averaging; 1 for nearest, which averages nothing."""
    if preprocessing.interpolation == "nearest":
        return 1.0, 1.0
    return (region[2] - region[0]) / inner[0], (region[3] - region[1]) / inner[1]


def points_in_crop(
    points: ArrayLike, size: tuple[int, int], box: Box | None, preprocessing: Preprocessing
) -> np.ndarray:
    """Map points [..., 2] of an image of `size` (width, height) to its crop: float64 [..., 2], x and y in pixels.

    Pixel i covers i to i + 1 along both axes, as for boxes. Raises ImageError as `cut` does.
    """
    (x1, y1, x2, y2), inner, corner = _placement(size, box, preprocessing)
    scale = np.array([inner[0] / (x2 - x1), inner[1] / (y2 - y1)])
    return (np.asarray(points, np.float64) - (x1, y1)) * scale + corner


def _placement(
    size: tuple[int, int], box: Box | None, preprocessing: Preprocessing
) -> tuple[Box, tuple[int, int], tuple[int, int]]:
    """Return (region of the image, its width and height in the crop, its upper left corner in the crop)."""
    if box is None:
        region: Box = (0.0, 0.0, float(size[0]), float(size[1]))
    else:
        check_box(box)
        check_box_inside(box, size)
        region = buffered_box(box, size, preprocessing.bbox_buffer)
        if region[2] <= region[0] or region[3] <= region[1]:
            raise ImageError("box-outside", f"box {_box_text(box)} leaves the image of {size[0]} x {size[1]}")
    side = preprocessing.image_size
    if not preprocessing.pad:
        return region, (side, side), (0, 0)
    width, height = region[2] - region[0], region[3] - region[1]
    scale = side / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    return region, inner, ((side - inner[0]) // 2, (side - inner[1]) // 2)


def load_crop(image: ImageSource, box: Box | None, preprocessing: Preprocessing) -> np.ndarray:
    """Cut an ear out of an image: uint8 3,S,S, RGB, with S = `preprocessing.image_size`. Raises ImageError.

    `image`: a path; a PIL image of any mode, which is turned by its EXIF orientation like a file; or an array uint8
    H,W,3, RGB and upright. `box`: x1, y1, x2, y2 in pixels of the upright image; None: the whole image. Right ears are
    not mirrored, whatever `preprocessing.mirror` is: flip their crops (`crop[:, :, ::-1]`).

    A JPEG, given by its path or opened by Pillow, is decoded only as far as the crop needs. If the crop is less than a
    third of its size in the image, it differs slightly from that of the whole image (see jpeg.SPARE); else it is equal.
    """
    box = None if box is None else as_box(box)
    if isinstance(image, str | os.PathLike):
        crop = _cut_from(_read_bytes(os.fspath(image)), box, preprocessing)
    elif isinstance(image, Image.Image) and (data := _undecoded(image)) is not None:
        crop = _cut_from(data, box, preprocessing)
    elif isinstance(image, Image.Image | np.ndarray):
        crop = cut(_upright_rgb(image), box, preprocessing)
    else:
        found = f"is of type {type(image).__name__}"
        raise ImageError("not-an-image", f"{found}; give a path, a PIL image, or an array uint8 H x W x 3")
    planes = bytearray().join([crop.tobytes("raw", band) for band in "RGB"])  # half the time of splitting with numpy
    return np.frombuffer(planes, np.uint8).reshape(3, crop.height, crop.width)


def _upright_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """Convert a PIL image or an array to an upright RGB image. Raises ImageError."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            found = f"{image.dtype} {' x '.join(map(str, image.shape))}"
            raise ImageError("not-an-image", f"is an array {found}; give uint8 H x W x 3, RGB, from 0 to 255")
        return Image.fromarray(image)
    with _decoding():
        image.load()  # before the orientation is read: see _open
        orientation = _orientation_of(image)
        image = _to_rgb(image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image)
    if 0 in image.size:
        raise ImageError("not-an-image", f"has {image.width} x {image.height} pixels; give an image that is not empty")
    return image


def _undecoded(image: Image.Image) -> bytes | None:
    """Return the file of a JPEG that Pillow has opened but not decoded, so that it gives the same crop as its path.

    None for anything else, or if the image was changed since (`draft`, its EXIF). Raises ImageError.
    """
    file = getattr(image, "fp", None)
    undecoded = bool(getattr(image, "tile", None)) and image.tell() == 0
    if image.format not in ("JPEG", "MPO") or file is None or not undecoded:
        return None
    with _decoding():
        place = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(place)
        stored, orientation = _open(io.BytesIO(data), data[:16])
    return data if (stored.size, orientation) == (image.size, _orientation_of(image)) else None


def _cut_from(data: bytes, box: Box | None, preprocessing: Preprocessing) -> Image.Image:
    """As `cut`, from the bytes of a file, decoding only what the crop needs. Raises ImageError."""
    with _decoding():
        image, orientation = _open(io.BytesIO(data), data[:16])
        size = (image.height, image.width) if orientation in TURNED else image.size
        region, inner, corner = _placement(size, box, preprocessing)
        part = part_of(image, data, orientation, region, _scale(region, inner, preprocessing))
        if part is not None:
            image, region = part.image, part.region
        else:
            image.load()
            image = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        return _resized(_to_rgb(image), region, inner, corner, preprocessing)


# What PIL's decoders raise on damaged bytes; usually OSError, SyntaxError (broken PNG) or ValueError.
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
    with _open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise ImageError("unreadable", f"cannot be read ({short_message(error)})") from error


@contextmanager
def _open_file(path: str) -> Iterator[io.BufferedReader]:
    """Open the file of a photo. Raises ImageError if it is missing, not a regular file, empty or too large."""
    try:
        handle = platform.open_photograph(path)
    except FileNotFoundError as error:
        raise ImageError("missing", "no such file") from error
    except (OSError, ValueError) as error:
        raise ImageError("unreadable", f"cannot be read ({short_message(error)})") from error
    try:
        try:
            status = os.fstat(handle)
        except OSError as error:
            raise ImageError("unreadable", f"cannot be read ({short_message(error)})") from error
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("unreadable", "is a folder or a device, not a file")
        if status.st_size > _MAX_FILE_BYTES:
            raise ImageError("too-large", f"the file has {status.st_size / 2**30:.1f} GiB, more than any photo")
        if status.st_size == 0:
            raise ImageError("truncated", "the file is empty")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: scale 16-bit grey (PIL would clip it to white), drop alpha (as OpenCV does)."""
    if image.mode == "RGB":  # PIL would copy it
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64)
        return Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _box_text(box: Box) -> str:
    return "[" + ", ".join(f"{v:g}" for v in box) + "]"

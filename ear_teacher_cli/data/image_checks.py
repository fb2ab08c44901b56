"""What every photo and its ears are checked for: oddities, boxes, hashes, sharpness. No torch here.

`inspect` runs in worker processes; the perceptual hash finds near duplicates without comparing all with all.
"""

import hashlib
import multiprocessing
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import EarTeachError, ImageError
from ..platform import interrupts_ignored, usable_cores
from .boxes import BOX_FORMATS, Box, from_corners, to_corners
from .crop import DecodedImage, buffered_box, check_box, check_box_inside, cut, read_image
from .manifest import Manifest
from .preprocessing import Preprocessing

WARNINGS = {
    "box-small": "the box is under 32 px on a side",
    "box-clamped": "the box's buffer reaches beyond the image and was clamped",
    "exif-rotated": "EXIF orientation turns the image; boxes must be drawn on the upright one",
    "mode-grey": "grey image",
    "mode-alpha": "image with transparency (dropped)",
    "mode-16-bit": "16-bit image (scaled to 8 bits)",
    "mode-cmyk": "CMYK image (converted)",
    "mode-palette": "palette image (converted)",
    "duplicate-row": "the same image and box twice in one manifest",
    "duplicate-image": "the same file content under another name, in the same manifest",
    "near-duplicate": "almost the same ear image, in the same manifest",
    "leak-photo": "the same photo in two manifests (training and validation)",
    "leak-near-duplicate": "almost the same ear image in two manifests (training and validation)",
}
SMALL = 32
# Of 128 hash bits (see near_pairs). Among 16.8 million pairs of 5,800 real crops, the 9 within 6 bits were
# of one person each; at 7 the first pair of two people came.
NEAR_BITS = 5
_MODES = {
    "L": "mode-grey",
    "1": "mode-grey",
    "LA": "mode-alpha",
    "RGBA": "mode-alpha",
    "PA": "mode-alpha",
    "RGBa": "mode-alpha",
    "La": "mode-alpha",
    "P": "mode-palette",
    "CMYK": "mode-cmyk",
}
# The crop that is hashed and shown: plain, as no backbone is chosen yet.
PREVIEW = Preprocessing(96, 0.10, True, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Photo:
    """One photo and the rows that are cut out of it."""

    manifest: int
    path: str | None
    ears: list[tuple[int, Box | None]]
    order: str = "xyxy"  # of the boxes in the list
    error: tuple[str, str] | None = None


@dataclass(frozen=True)
class CropStats:
    """Hashes and sharpness of one row's crop. `digest`: sha256 of the file."""

    digest: bytes
    hash: int
    mirrored: int  # the hash of the crop's mirror image
    sharpness: float  # variance of the crop's Laplacian
    size: float  # shorter side of the box in pixels


def photos_of(manifest: Manifest, number: int = 0, order_of: Callable[[int], str] | None = None) -> Iterator[Photo]:
    """A job for `inspect` per photo. `order_of`: order of the boxes of a row's list (default: the manifest's)."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(manifest.paths):
        rows[path].append(index)
    for indices in rows.values():
        ears = [(index, manifest.boxes[index]) for index in indices]
        order = (order_of(indices[0]) if order_of else manifest.box_format) or "xyxy"
        try:
            yield Photo(number, manifest.file(indices[0]), ears, order)
        except ImageError as error:
            yield Photo(number, None, ears, order, (error.reason, error.detail))


def inspect(photo: Photo) -> tuple[list[tuple[int, str, str]], list[tuple[int, CropStats]]]:
    """(findings as (row index, reason, detail), (row index, stats) of the crops that could be cut) of one photo."""
    if photo.error is not None:
        return [(index, *photo.error) for index, _ in photo.ears], []
    try:
        image = read_image(photo.path)
    except ImageError as error:
        return [(index, error.reason, error.detail) for index, _ in photo.ears], []
    findings, crops = [], []
    digest = hashlib.sha256(image.data).digest()
    for index, box in photo.ears:
        for reason, detail in _oddities(image.mode, image.orientation):
            findings.append((index, reason, detail))
        try:
            crop = cut(image.image, box, PREVIEW)
        except ImageError as error:
            hint = _drawn_before_turning(box, image) or _in_other_order(box, photo.order, image)
            findings.append((index, error.reason, error.detail + hint))
            continue
        region = box or (0.0, 0.0, float(image.image.width), float(image.image.height))
        findings += [(index, *entry) for entry in _box_warnings(box, region, image.image.size)]
        size = min(region[2] - region[0], region[3] - region[1])
        crops.append((index, CropStats(digest, *perceptual_hashes(crop), sharpness_of(crop), size)))
    return findings, crops


def inspect_all(photos: list[Photo], num_workers: int) -> Iterator[tuple[list, list]]:
    """`inspect` of each photo, in order, in several processes where that is worth it. Raises EarTeachError."""
    workers = min(num_workers, usable_cores(), len(photos) // 64)
    if workers < 2:
        yield from map(inspect, photos)
        return
    chunk = max(1, min(64, len(photos) // (workers * 4)))
    # spawn, not fork: a progress bar's thread may be running here
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _ignore_interrupt) as pool:
        try:
            with interrupts_ignored():
                results = pool.map(inspect, photos, chunksize=chunk)
            yield from results
        except BrokenProcessPool as error:
            raise EarTeachError("a decoding process was killed (out of memory?); try --num-workers 1") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C is for the parent, which ends its workers; they need not each say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _drawn_before_turning(box: Box | None, image: DecodedImage) -> str:
    """A hint where the box leaves the upright image but fits the image as it is stored."""
    if box is None or image.orientation not in (5, 6, 7, 8):
        return ""
    try:
        check_box_inside(box, (image.image.height, image.image.width))
    except ImageError:
        return ""
    return f" (it fits before EXIF orientation {image.orientation}: drawn on the unturned image)"


def _in_other_order(box: Box | None, order: str, image: DecodedImage) -> str:
    """A hint where the numbers that stand in the list would be a box of this image in the other common order."""
    if box is None or order not in ("xyxy", "xywh"):
        return ""
    other = "xywh" if order == "xyxy" else "xyxy"
    x1, y1, x2, y2 = to_corners(np.array(from_corners(box, order)), other)
    try:
        check_box((x1, y1, x2, y2))
        check_box_inside((x1, y1, x2, y2), image.image.size)
    except ImageError:
        return ""
    return f" (as {BOX_FORMATS[other]} it would be in order)"


def _oddities(mode: str, orientation: int) -> Iterator[tuple[str, str]]:
    if orientation not in (0, 1):
        yield "exif-rotated", f"EXIF orientation {orientation}"
    if mode in _MODES:
        yield _MODES[mode], f"mode {mode}"
    elif mode.startswith(("I", "F")):
        yield "mode-16-bit", f"mode {mode}"


def _box_warnings(box: Box | None, region: Box, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    width, height = region[2] - region[0], region[3] - region[1]
    if min(width, height) < SMALL:
        yield "box-small", f"{width:.0f} x {height:.0f} px"
    if box is None:
        return
    buffer = PREVIEW.bbox_buffer
    grown = buffered_box(box, size, buffer)
    wanted = (1 + 2 * buffer) * width, (1 + 2 * buffer) * height
    if grown[2] - grown[0] < wanted[0] - 0.5 or grown[3] - grown[1] < wanted[1] - 0.5:
        if not _is_whole(box, size):  # a box that is the whole image leaves no room, and asks for none
            yield "box-clamped", f"box [{', '.join(f'{v:g}' for v in box)}] in {size[0]} x {size[1]}"


def _is_whole(box: Box, size: tuple[int, int]) -> bool:
    return box[0] <= 1 and box[1] <= 1 and box[2] >= size[0] - 1 and box[3] >= size[1] - 1


def sharpness_of(crop: Image.Image) -> float:
    grey = np.asarray(crop.convert("L"), dtype=np.float32)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return float(laplacian.var())


def near_pairs(hashes: Iterable[int], bits: int = NEAR_BITS) -> Iterator[tuple[int, int]]:
    """Pairs of positions whose 128-bit hashes differ in at most `bits` bits, without comparing all with all.

    Two hashes that differ in at most `bits` bits agree wholly in one of bits + 1 bands (pigeonhole), so only
    rows that share a band are compared.
    """
    hashes = list(hashes)
    bands = bits + 1
    width = 128 // bands
    found = set()
    for band in range(bands):
        buckets = defaultdict(list)
        for position, value in enumerate(hashes):
            buckets[(value >> band * width) & ((1 << width) - 1)].append(position)
        for bucket in buckets.values():
            for i, first in enumerate(bucket):
                for second in bucket[i + 1 : i + 1 + _BUCKET_REACH]:
                    if (first, second) not in found and (hashes[first] ^ hashes[second]).bit_count() <= bits:
                        found.add((first, second))
                        yield first, second


# A band shared by very many rows (blank crops, say) would be quadratic again; neighbours in order are enough to name them.
_BUCKET_REACH = 200


def perceptual_hash(crop: Image.Image) -> int:
    """128 bits: is each cell of an 8 x 8 grid brighter than its right, and its lower neighbour (dHash, both ways)."""
    return perceptual_hashes(crop)[0]


def perceptual_hashes(crop: Image.Image) -> tuple[int, int]:
    """The hash of a crop, and that of its mirror image."""
    grey = np.asarray(crop.convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    return _hash(grey), _hash(grey[:, ::-1])


def _hash(grey: np.ndarray) -> int:
    bits = np.concatenate([(grey[:8, 1:] > grey[:8, :8]).ravel(), (grey[1:, :8] > grey[:8, :8]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")

"""Check a photo and its ears: file, boxes, perceptual hashes, sharpness. Imports no torch.

`inspect` runs in worker processes. `near_pairs` finds near duplicates without comparing all pairs.
"""

import hashlib
import multiprocessing
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import EarTeachError, ImageError
from ..platform import interrupts_ignored, usable_cores
from .boxes import BOX_FORMATS, Box, from_corners, to_corners
from .crop import DecodedImage, buffered_box, check_box, check_box_inside, cut, read_image
from .manifest import Manifest
from .preprocessing import Preprocessing
from .texts import Texts

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
SMALL = 32  # px
# Of 128 hash bits (see near_pairs). Of 16.8 million pairs of 5,800 real crops, 9 differ in at most 6 bits, each pair of
# one person; the first pair of two people differs in 7.
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
# The crop that is hashed and drawn: no backbone is chosen yet.
PREVIEW = Preprocessing(96, 0.10, True, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo and the ears that are cut out of it."""

    manifest: int  # number of its manifest
    path: str | None  # None if the path leaves the root
    ears: list[tuple[int, Box | None]]  # position in the manifest, box
    order: str = "xyxy"  # of the boxes in the list
    error: tuple[str, str] | None = None  # reason and detail, if there is no path


@dataclass(frozen=True, slots=True)
class CropStats:
    """Hashes, sharpness and size of one crop."""

    digest: bytes  # sha256 of the file
    hash: int  # perceptual_hashes: 128 bits
    mirrored: int  # the hash of the mirrored crop
    sharpness: float  # variance of the crop's Laplacian
    size: float  # shorter side of the box in pixels


def photos_of(manifest: Manifest, number: int = 0, order_of: Callable[[int], str] | None = None) -> Iterator[Photo]:
    """Yield each photo of a manifest, for `inspect`.

    `number`: of the manifest. `order_of(row)`: order of the boxes in the list that a row is from (default: the
    manifest's).
    """
    for indices in Texts.of(manifest.paths).groups():
        ears = [(index, manifest.boxes[index]) for index in indices]
        order = (order_of(indices[0]) if order_of else manifest.box_format) or "xyxy"
        try:
            yield Photo(number, manifest.file(indices[0]), ears, order)
        except ImageError as error:
            yield Photo(number, None, ears, order, (error.reason, error.detail))


def inspect(photo: Photo) -> tuple[list[tuple[int, str, str]], list[tuple[int, CropStats]]]:
    """Decode a photo and cut out its ears; return ((index, reason, detail) of each problem, (index, stats) of each
    crop)."""
    if photo.error is not None:
        return [(index, *photo.error) for index, _ in photo.ears], []
    assert photo.path is not None
    try:
        image = read_image(photo.path)
    except ImageError as error:
        return [(index, error.reason, error.detail) for index, _ in photo.ears], []
    findings, crops = [], []
    digest = hashlib.sha256(image.data).digest()
    for index, box in photo.ears:
        findings += [(index, *warning) for warning in _image_warnings(image.mode, image.orientation)]
        try:
            crop = cut(image.image, box, PREVIEW)
        except ImageError as error:
            hint = _hint_unturned(box, image) or _hint_other_order(box, photo.order, image)
            findings.append((index, error.reason, error.detail + hint))
            continue
        region = box or (0.0, 0.0, float(image.image.width), float(image.image.height))
        findings += [(index, *warning) for warning in _box_warnings(box, region, image.image.size)]
        size = min(region[2] - region[0], region[3] - region[1])
        crops.append((index, CropStats(digest, *perceptual_hashes(crop), sharpness_of(crop), size)))
    return findings, crops


def inspect_all(photos: list[Photo], num_workers: int) -> Iterator[tuple[list, list]]:
    """Return the result of `inspect` for each photo, in order. If there are many, start up to `num_workers` processes at
    once. Raises EarTeachError, as the iterator does, if one of them is killed.

    Call it before a progress bar is shown: Linux forks the processes, which takes no imports, but not beside a thread.
    """
    workers = min(num_workers, usable_cores(), len(photos) // 64)
    if workers < 2:
        return map(inspect, photos)
    context = multiprocessing.get_context(None if threading.active_count() == 1 else "spawn")  # None: as Python prefers
    pool = ProcessPoolExecutor(workers, context, _ignore_interrupt)
    chunk = max(1, min(64, len(photos) // (workers * 16)))  # small: at the end a process waits for another's last chunk
    with _naming_killed(), interrupts_ignored():
        results = pool.map(inspect, photos, chunksize=chunk)
    return _results(pool, results)


def _results(pool: ProcessPoolExecutor, results: Iterator[tuple[list, list]]) -> Iterator[tuple[list, list]]:
    """Yield the results, and end the pool."""
    with pool, _naming_killed():
        try:
            yield from results
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _naming_killed() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise EarTeachError("a decoding process was killed (out of memory?); try --num-workers 1") from error


def _ignore_interrupt() -> None:
    """Ignore Ctrl-C in workers: the parent handles it and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hint_unturned(box: Box | None, image: DecodedImage) -> str:
    """Return a hint if the box leaves the upright image but fits the image as stored."""
    if box is None or image.orientation not in (5, 6, 7, 8):
        return ""
    try:
        check_box_inside(box, (image.image.height, image.image.width))
    except ImageError:
        return ""
    return f" (it fits before EXIF orientation {image.orientation}: drawn on the unturned image)"


def _hint_other_order(box: Box | None, order: str, image: DecodedImage) -> str:
    """Return a hint if the numbers in the list would be a valid box in the other common order."""
    if box is None or order not in ("xyxy", "xywh"):
        return ""
    other = "xywh" if order == "xyxy" else "xyxy"
    x1, y1, x2, y2 = to_corners(np.array(from_corners(box, order)), other)
    try:
        check_box((x1, y1, x2, y2))
        check_box_inside((x1, y1, x2, y2), image.image.size)
    except ImageError:
        return ""
    return f" (as {BOX_FORMATS[other]} it would be valid)"


def _image_warnings(mode: str, orientation: int) -> Iterator[tuple[str, str]]:
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
        if not _is_whole(box, size):  # a box around the whole image has no room for a buffer, and is meant so
            yield "box-clamped", f"box [{', '.join(f'{v:g}' for v in box)}] in {size[0]} x {size[1]}"


def _is_whole(box: Box, size: tuple[int, int]) -> bool:
    return box[0] <= 1 and box[1] <= 1 and box[2] >= size[0] - 1 and box[3] >= size[1] - 1


def sharpness_of(crop: Image.Image) -> float:
    """Return the variance of the Laplacian of the grey crop: low for a blurred one."""
    grey = np.asarray(crop.convert("L"), dtype=np.float32)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return float(laplacian.var())


def near_pairs(hashes: Iterable[int], bits: int = NEAR_BITS) -> Iterator[tuple[int, int]]:
    """Yield pairs of positions whose 128-bit hashes differ in at most `bits` bits.

    Two such hashes agree in at least one of bits + 1 bands (pigeonhole principle), so only those with an equal band are
    compared.
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


# If very many hashes share a band (of blank crops, for example), each is compared with this many that follow: comparing
# all pairs would take quadratic time.
_BUCKET_REACH = 200


def perceptual_hash(crop: Image.Image) -> int:
    """Return 128 bits: whether each cell of an 8 x 8 grid is darker than its right, and its lower neighbour (dHash)."""
    return perceptual_hashes(crop)[0]


def perceptual_hashes(crop: Image.Image) -> tuple[int, int]:
    """Return the perceptual hash of a crop, and that of its mirror image."""
    grey = np.asarray(crop.convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    return _hash(grey), _hash(grey[:, ::-1])


def _hash(grey: np.ndarray) -> int:
    bits = np.concatenate([(grey[:8, 1:] > grey[:8, :8]).ravel(), (grey[1:, :8] > grey[:8, :8]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")

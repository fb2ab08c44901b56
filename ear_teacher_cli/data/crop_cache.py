"""Cache crops, so that an image is decoded in the first epoch only: one file per manifest, in memory or on disk.

Each crop has a fixed record in the file: a stamp of its image (size, times of change, inode), a checksum, the pixels. A
record is written in one call, where the system can, and used only if stamp and checksum match: several processes may
fill one file at once, and a killed one leaves at worst a record that is written again. Crops are returned byte for
byte, so that training gives the same result with and without a cache. The file's name is a hash of everything that its
crops depend on.
"""

import errno
import hashlib
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from .. import platform
from .crop import CROP_VERSION
from .manifest import Manifest
from .preprocessing import Preprocessing

FOLDER, SUFFIX = ".crops", ".crops"
_HEADER = struct.Struct("<qqqQII")  # stamp of the image, CRC-32 of the pixels, _MAGIC
_MAGIC = 0x45415231
_MAX_SHARE = 0.5  # of the free memory or disk that a cache may take


class CropCache:
    """Crops, uint8 3,S,S, of the first `capacity` rows of a manifest.

    It may be sent to other processes: each opens the bytes called `name` itself (platform.SharedBytes).
    """

    def __init__(self, name: str, side: int, capacity: int):
        self.name, self.side, self.capacity = name, side, capacity
        self._bytes: platform.SharedBytes | None = None
        self._process = 0  # id of the process that opened _bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None, "_process": 0}

    def __del__(self):
        if self._bytes is not None and self._process == os.getpid():
            self._bytes.close()

    def crop(self, row: int, image: str, cut: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the crop of `row` from the file `image`: the cached one, else that of `cut()`, which is then
        cached."""
        stamp = _stamp(image)  # before the image is read: if it changes meanwhile, the stamp is outdated
        stored = self._open() if stamp and row < self.capacity else None
        if stored is None or stamp is None:
            return cut()
        crop = self._read(stored, row, stamp)
        if crop is None:
            crop = cut()
            self._write(stored, row, stamp, crop)
        return crop

    def _read(self, stored: platform.SharedBytes, row: int, stamp: tuple[int, ...]) -> np.ndarray | None:
        size = _record_size(self.side)
        try:
            record = stored.read(size, row * size)
        except OSError:
            return None
        if len(record) != size:
            return None
        *found, checksum, magic = _HEADER.unpack_from(record)
        pixels = memoryview(record)[_HEADER.size :]
        if magic != _MAGIC or tuple(found) != stamp or zlib.crc32(pixels) != checksum:
            return None
        return np.frombuffer(bytearray(pixels), np.uint8).reshape(3, self.side, self.side)

    def _write(self, stored: platform.SharedBytes, row: int, stamp: tuple[int, ...], crop: np.ndarray) -> None:
        pixels = np.ascontiguousarray(crop).tobytes()
        try:
            stored.write(_HEADER.pack(*stamp, zlib.crc32(pixels), _MAGIC) + pixels, row * _record_size(self.side))
        except OSError:  # usually a full disk: this process caches no more
            self.capacity = 0

    def _open(self) -> platform.SharedBytes | None:
        if self._process != os.getpid():  # not opened, or opened by the process from which this one was forked
            self._process = os.getpid()
            try:
                self._bytes = platform.SharedBytes(self.name)
            except OSError:
                self._bytes = None
        return self._bytes


class CropCaches:
    """The caches of a run, one per manifest; they are released with this object.

    `caches`: None for a manifest without one. `summary`: where crops are kept and how large that may become, for
    messages.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        limit: float,
        copies: int,
        manifests: list[Manifest],
        preprocessing: Preprocessing,
    ):
        """Open the caches. Raises nothing: if there is too little room, fewer crops are cached, or none.

        `kind`: one of config.CACHES. `limit`: bytes of all caches in memory or in `folder`. `copies`: number of
        processes on this machine, each of which has its own caches in memory.
        """
        self.caches: list[CropCache | None] = [None] * len(manifests)
        self._memory: list[platform.SharedMemory] = []
        self._files: list[int] = []  # on disk; kept open, so that no other run removes them
        record_size = _record_size(preprocessing.image_size)
        wanted = record_size * sum(map(len, manifests))
        kind, memory = _place(kind, wanted, limit, copies)
        if kind == "off" or limit == 0:
            self.summary = "not kept"
            return
        names = [_key(manifest, preprocessing) + SUFFIX for manifest in manifests]
        try:
            available = memory if kind == "ram" else _make_room(folder, names, wanted, limit)
            share = min(1.0, available / wanted)
            counts = [int(share * len(manifest)) for manifest in manifests]
            opened = []
            for name, count in zip(names, counts, strict=True):
                size = count * record_size
                opened.append(self._in_memory(size) if kind == "ram" else self._on_disk(folder / name, size))
        except OSError as error:
            self.summary = f"not kept ({error.strerror})"
            return
        self.caches = [
            CropCache(name, preprocessing.image_size, count) for name, count in zip(opened, counts, strict=True)
        ]
        part = "" if share == 1 else f", {share:.0%} of them"
        place = "memory" if kind == "ram" else f"{folder}/"
        self.summary = f"kept in {place} ({share * wanted / 2**20:.0f} MB{part})"

    def __del__(self):
        for memory in self._memory:
            memory.close()
        for handle in self._files:
            os.close(handle)

    def _in_memory(self, size: int) -> str:
        """Allocate `size` bytes in memory; return their name."""
        self._memory.append(platform.SharedMemory(size))
        return self._memory[-1].name

    def _on_disk(self, path: Path, size: int) -> str:
        """Open or make a file of `size` bytes; return its absolute path."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.is_symlink():
            raise OSError(errno.ELOOP, f"{path.parent} is a link")
        for _ in range(3):
            handle = platform.open_private_file(path, os.O_CREAT)
            platform.claim(handle)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                self._files.append(handle)
                os.ftruncate(handle, size)
                os.utime(path)  # the least recently used caches are removed first
                return str(path.absolute())
            os.close(handle)  # another run removed it before it was claimed
        raise OSError(errno.EAGAIN, f"{path} is being removed by another run")


def _place(kind: str, wanted: float, limit: float, copies: int) -> tuple[str, float]:
    """Return where `wanted` bytes of crops are kept, with `auto` decided, and the bytes that each process may keep in
    memory."""
    memory = min(limit, _MAX_SHARE * platform.free_memory()) / copies
    if kind == "auto":
        kind = "ram" if platform.MEMORY_IS_SHARED_FREELY and copies == 1 and wanted <= memory else "disk"
    return kind, memory


def bytes_of_caches(kind: str, images: int, side: int, limit: float, copies: int) -> dict[str, float]:
    """Return the bytes that the crops of `images` images take at most, in memory (`ram`) and on disk (`disk`). Arguments
    as those of CropCaches."""
    wanted = float(images * _record_size(side))
    kind, memory = _place(kind, wanted, limit, copies)
    return {"ram": min(wanted, memory) * (kind == "ram"), "disk": min(wanted, limit) * (kind == "disk")}


def _make_room(folder: Path, names: list[str], wanted: int, limit: float) -> float:
    """Remove old caches that no run uses until the caches `names` can have `wanted` bytes; return how many they can
    have."""
    found = {}
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # another run may be removing it
            found[path] = path.lstat()
    own = sum(platform.bytes_on_disk(status) for path, status in found.items() if path.name in names)
    others = {path: status for path, status in found.items() if path.name not in names}
    taken = sum(status.st_size for status in others.values())  # their full sizes, also of sparse files
    for path, status in sorted(others.items(), key=lambda entry: entry[1].st_mtime):
        if taken + wanted > limit and platform.remove_unclaimed(path):
            taken -= status.st_size
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return max(0.0, min(limit - taken, own + _MAX_SHARE * shutil.disk_usage(place).free))


def _key(manifest: Manifest, preprocessing: Preprocessing) -> str:
    """Return a hash of everything crops depend on: rows, root folder, preprocessing, versions of the decoders."""
    root = os.path.realpath(manifest.root or ".")
    decoders = (
        features.version(name) for name in ("pil", "libjpeg_turbo", "jpg", "zlib", "webp", "jpg_2000", "libtiff")
    )
    parts = (_MAGIC, CROP_VERSION, root, preprocessing, *decoders)
    digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape"))
    for path, box in zip(manifest.paths, manifest.boxes, strict=True):
        digest.update(f"{path}\0{box}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _stamp(image: str) -> tuple[int, ...] | None:
    """Return size, times of change of content and of status (ns), inode; None if the image cannot be found.

    The last two differ for a copy with the same name and time of change.
    """
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _record_size(side: int) -> int:
    return _HEADER.size + 3 * side * side

"""Crops that were cut once and are not decoded again: one file per manifest, in memory or on disk.

Each crop has a place of its own in the file, with a mark of the image it was cut from (size, times of change, inode) and a
checksum. A place is written in one call, where the system can, and believed only if all of it fits: several processes may fill one file at
once, and one that is killed leaves at worst a place that is filled again. What comes out is what was put in, to the
byte, so a run with a cache learns what it would without. The file's name is a sha256 over all that a crop depends on.
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
from ..files import printable
from .crop import CUT
from .manifest import Manifest
from .preprocessing import Preprocessing

FOLDER, SUFFIX = ".crops", ".crops"
_HEAD = struct.Struct("<qqqQII")  # the image's mark, CRC-32 of the pixels, _WORD
_WORD = 0x45415231
_SHARE = 0.5  # of what is free of memory or disk, the most that a cache takes


class CropCache:
    """uint8 3,S,S for the rows of a manifest below `capacity`. Other processes may be given it: each opens what `name`
    is of (platform.SharedBytes)."""

    def __init__(self, name: str, side: int, capacity: int):
        self.name, self.side, self.capacity = name, side, capacity
        self._bytes: platform.SharedBytes | None = None
        self._process = 0  # that opened it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None, "_process": 0}

    def __del__(self):
        if self._bytes is not None and self._process == os.getpid():
            self._bytes.close()

    def crop(self, row: int, image: str, cut: Callable[[], np.ndarray]) -> np.ndarray:
        """The crop of `row` from the file `image`: as it was kept, else what `cut` returns, kept from now on."""
        mark = _mark(image)  # before it is read: what changes meanwhile has another
        kept_in = self._opened() if mark and row < self.capacity else None
        if kept_in is None:
            return cut()
        kept = self._read(kept_in, row, mark)
        if kept is None:
            kept = cut()
            self._write(kept_in, row, mark, kept)
        return kept

    def _read(self, kept_in: platform.SharedBytes, row: int, mark: tuple[int, ...]) -> np.ndarray | None:
        size = _size(self.side)
        try:
            place = kept_in.read(size, row * size)
        except OSError:
            return None
        if len(place) != size:
            return None
        *found, checksum, word = _HEAD.unpack_from(place)
        pixels = memoryview(place)[_HEAD.size :]
        if word != _WORD or tuple(found) != mark or zlib.crc32(pixels) != checksum:
            return None
        return np.frombuffer(bytearray(pixels), np.uint8).reshape(3, self.side, self.side)

    def _write(self, kept_in: platform.SharedBytes, row: int, mark: tuple[int, ...], crop: np.ndarray) -> None:
        pixels = np.ascontiguousarray(crop).tobytes()
        try:
            kept_in.write(_HEAD.pack(*mark, zlib.crc32(pixels), _WORD) + pixels, row * _size(self.side))
        except OSError:  # a full disk, mostly: this process keeps no more
            self.capacity = 0

    def _opened(self) -> platform.SharedBytes | None:
        if self._process != os.getpid():  # not yet, or by the process that this one was forked from
            self._process = os.getpid()
            try:
                self._bytes = platform.SharedBytes(self.name)
            except OSError:
                self._bytes = None
        return self._bytes


class CropCaches:
    """The caches of a run, while this lives. `words`: how large they may become, and where."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        limit: float,
        copies: int,
        manifests: list[Manifest],
        preprocessing: Preprocessing,
    ):
        """`kind`: of config.CACHES. `limit`: bytes, of all in memory or in `folder`. `copies`: processes on this machine, each
        of which would have its own in memory. Raises nothing: where there is no room, fewer rows are kept, or none.
        """
        self.caches: list[CropCache | None] = [None] * len(manifests)
        self._memory: list[platform.SharedMemory] = []
        self._files: list[int] = []  # on disk; open, so that no other run removes them
        place_size = _size(preprocessing.image_size)
        wanted = place_size * sum(map(len, manifests))
        in_memory = min(limit, _SHARE * platform.free_memory()) / copies
        if kind == "auto":
            kind = "ram" if platform.MEMORY_IS_SHARED_FREELY and copies == 1 and wanted <= in_memory else "disk"
        if kind == "off" or limit == 0:
            self.words = "not kept"
            return
        names = [_key(manifest, preprocessing) + SUFFIX for manifest in manifests]
        try:
            room = in_memory if kind == "ram" else _make_room(folder, names, wanted, limit)
            share = min(1.0, room / wanted)
            counts = [int(share * len(manifest)) for manifest in manifests]
            opened = []
            for name, count in zip(names, counts, strict=True):
                size = count * place_size
                opened.append(self._in_memory(size) if kind == "ram" else self._on_disk(folder / name, size))
        except OSError as error:
            self.words = f"not kept ({error.strerror})"
            return
        self.caches = [
            CropCache(name, preprocessing.image_size, count) for name, count in zip(opened, counts, strict=True)
        ]
        part = "" if share == 1 else f", {share:.0%} of them"
        place = "memory" if kind == "ram" else f"{printable(folder)}/"
        self.words = f"kept in {place} ({share * wanted / 2**20:.0f} MB{part})"

    def __del__(self):
        for memory in self._memory:
            memory.close()
        for handle in self._files:
            os.close(handle)

    def _in_memory(self, size: int) -> str:
        self._memory.append(platform.SharedMemory(size))
        return self._memory[-1].name

    def _on_disk(self, path: Path, size: int) -> str:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.is_symlink():
            raise OSError(errno.ELOOP, f"{printable(path.parent)} is a link")
        for _ in range(3):
            handle = platform.open_private_file(path, os.O_CREAT)
            platform.claim(handle)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                self._files.append(handle)
                os.ftruncate(handle, size)
                os.utime(path)  # the last one used goes last
                return str(path.absolute())
            os.close(handle)  # another run removed it before it was claimed
        raise OSError(errno.EAGAIN, f"{printable(path)} is being removed by another run")


def _make_room(folder: Path, names: list[str], wanted: int, limit: float) -> float:
    """Bytes that the caches `names` may take; older ones that nobody uses are removed until they may be `wanted`."""
    found = {}
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # another run may be removing it
            found[path] = path.lstat()
    own = sum(platform.bytes_on_disk(status) for path, status in found.items() if path.name in names)
    others = {path: status for path, status in found.items() if path.name not in names}
    taken = sum(status.st_size for status in others.values())  # what they may become
    for path, status in sorted(others.items(), key=lambda entry: entry[1].st_mtime):
        if taken + wanted > limit and platform.remove_unclaimed(path):
            taken -= status.st_size
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return max(0.0, min(limit - taken, own + _SHARE * shutil.disk_usage(place).free))


def _key(manifest: Manifest, preprocessing: Preprocessing) -> str:
    """Of the rows, where they lie, what is done to them, and what does it."""
    root = os.path.realpath(manifest.root or ".")
    decoders = (
        features.version(name) for name in ("pil", "libjpeg_turbo", "jpg", "zlib", "webp", "jpg_2000", "libtiff")
    )
    about = (_WORD, CUT, root, preprocessing, *decoders)
    digest = hashlib.sha256(repr(about).encode("utf-8", "surrogateescape"))
    for path, box in zip(manifest.paths, manifest.boxes, strict=True):
        digest.update(f"{path}\0{box}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _mark(image: str) -> tuple[int, ...] | None:
    """Size, times (ns) of change of content and of status, inode: a copy under the same name and time is another file."""
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _size(side: int) -> int:
    return _HEAD.size + 3 * side * side

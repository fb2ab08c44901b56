"""Read `.npy` files, also the original package's pickled dicts, without running code.

A pickle is a program. This reader lets it build numpy arrays, numpy scalars and plain Python values, and refuses every
other global by name. Stand-ins replace numpy's own reconstruction and can only build what a plain saved array needs.
The result is a value or a ManifestError.
"""

import io
import math
import os
import pickle
import pickletools
import re
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy_format

from ..errors import ManifestError
from ..files import printable, short_message


def read_npy(path: str | Path) -> Any:
    """Return the content of a `.npy` file: an array, or the object in a 0-d object array (the original package's dict).

    Raises ManifestError.
    """
    where = printable(path)
    try:
        with open(path, "rb") as file:
            version = npy_format.read_magic(file)
            read_header = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
            if version not in read_header:
                raise ManifestError(f"{where}: .npy version {version} is unknown; save it again with numpy")
            shape, _, dtype = read_header[version](file)
            size = os.fstat(file.fileno()).st_size
            if not dtype.hasobject:
                if math.prod(shape) * dtype.itemsize > size:  # numpy would allocate all of it first
                    raise ValueError(f"{dtype} {list(shape)} does not fit into {size} bytes")
                file.seek(0)
                return _require_unicode(npy_format.read_array(file, allow_pickle=False))
            data = file.read()
            _check_opcodes(data)
            value = _Unwrapper(size).unwrap(_PlainUnpickler(io.BytesIO(data), where).load())
    except ManifestError:
        raise
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read ({error.strerror or error}); check the path") from error
    except _DAMAGE as error:
        raise ManifestError(
            f"{where}: damaged ({type(error).__name__}: {short_message(error)}); save it again with numpy"
        ) from error
    if isinstance(value, np.ndarray) and value.dtype == object and value.shape == () and shape == ():
        return value.item()
    return value


def map_npy(path: str | Path) -> np.ndarray:
    """Return the array of a `.npy` file of numbers, memory-mapped. Raises ManifestError."""
    where = printable(path)
    try:
        return npy_format.open_memmap(path, mode="r")
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read ({error.strerror or error}); check the path") from error
    except _DAMAGE as error:
        raise ManifestError(
            f"{where}: is not a complete array of numbers ({short_message(error)}); write it again"
        ) from error


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a `.npz` archive by name; none may contain objects. Raises ManifestError."""
    where = printable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            size = sum(record.file_size for record in records)
            if size > _MAX_COMPRESSION * Path(path).stat().st_size:
                raise ValueError(f"unpacks to {size} bytes")
            return {record.filename.removesuffix(".npy"): _read_member(archive, record) for record in records}
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read ({error.strerror or error}); check the path") from error
    except (*_DAMAGE, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise ManifestError(
            f"{where}: damaged ({type(error).__name__}: {short_message(error)}); write it again"
        ) from error


# Size of an unpacked archive over its size on disk: numbers compress to about 1/2, names to 1/20.
_MAX_COMPRESSION = 100


def _read_member(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(record) as member:
        version = npy_format.read_magic(member)
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        if math.prod(shape) * dtype.itemsize > record.file_size:
            raise ValueError(f"{dtype} {list(shape)} does not fit into {record.file_size} bytes")
    with archive.open(record) as member:
        return _require_unicode(npy_format.read_array(member, allow_pickle=False))


def _require_unicode(array: np.ndarray) -> np.ndarray:
    """Raise ValueError if text has code points beyond Unicode: numpy does not check, and Python fails on them later."""
    if array.dtype.kind == "U" and array.size and array.dtype.itemsize:
        codes = np.ascontiguousarray(array).reshape(-1).view(array.dtype.byteorder.replace("|", "=") + "u4")
        if codes.max() > 0x10FFFF:
            raise ValueError("text that is not Unicode")
    return array


# What unpickling and numpy's header parser raise on damaged bytes (found by fuzzing).
_DAMAGE = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    MemoryError,
    OverflowError,
    ImportError,
    RecursionError,
    SyntaxError,
    AssertionError,
    NotImplementedError,
    tokenize.TokenError,
)


class _ArrayClass:
    """Stand-in for `numpy.ndarray`: a pickle can only name it, and pass it to `_reconstruct`."""


class _Dtype:
    """Stand-in for `numpy.dtype`: numbers, booleans, strings and objects, nothing structured.

    numpy's own `__setstate__` would accept a type that hides object pointers among its bytes.
    """

    def __init__(self, code: str, align: Any = False, copy: Any = False):
        if not re.fullmatch(r"b1|[iuf]\d{1,2}|[SU]\d{0,9}|O8?", code):
            raise ValueError(f"type {code!r} is not plain")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        version, order, *structure = state[:5]
        if version != 3 or order not in ("<", ">", "|", "=") or structure != [None, None, None]:
            raise ValueError("a structured type is not plain")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for an array under construction; `_Unwrapper` replaces it by the array."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Dtype):
            raise ValueError("an array without a type")
        if kind.dtype.hasobject:
            if not isinstance(data, list):
                raise ValueError("an object array without a list")
            flat = np.empty(len(data), dtype=object)
            flat[:] = data
        else:
            flat = _array_from_bytes(data, kind)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    if kind is not _ArrayClass:
        raise ValueError("not a plain array")
    return _Array()


def _frombuffer(buffer: Any, kind: _Dtype, shape: tuple, order: Literal["C", "F"]) -> _Array:
    return _Array(_array_from_bytes(buffer, kind).reshape(shape, order=order))


def _scalar(kind: _Dtype, data: Any = b"") -> Any:
    return _array_from_bytes(data, kind)[:1][0]


def _array_from_bytes(data: Any, kind: _Dtype) -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray):  # of an int, numpy would allocate as many bytes
        raise ValueError("an array without bytes")
    return _require_unicode(np.frombuffer(data, dtype=_plain_dtype(kind)))


def _plain_dtype(kind: _Dtype) -> np.dtype:
    if not isinstance(kind, _Dtype) or kind.dtype.hasobject:
        raise ValueError("not a plain type")
    return kind.dtype


def _check_opcodes(data: bytes) -> None:
    """Check a pickle's opcodes without running it: arguments must be complete, and indices of the memo at most the
    length of the pickle. Python's unpickler allocates first: five bytes can request tens of gigabytes. Raises
    ValueError."""
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("PUT", "LONG_BINPUT"):
            assert argument is not None
            if not 0 <= argument <= len(data):
                raise ValueError("the pickle requests a memo larger than itself")


class _Unwrapper:
    """Replaces every stand-in in a value by its array.

    A pickle may refer to one list a thousand times, and that list to another: a few bytes that unfold into more than
    any memory. In an ordinary file each value takes at least one byte, so at most `budget` (bytes of the file) are
    unwrapped.
    """

    def __init__(self, budget: int):
        self.left = budget

    def unwrap(self, value: Any, depth: int = 0) -> Any:
        """Return the value with arrays; tuples become lists. Raises ValueError."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if isinstance(value, _Array):
            value = value.value
        if isinstance(value, np.ndarray):
            return self._array(value, depth)
        self._spend(max(1, len(value)) if isinstance(value, str | bytes) else 1)
        if isinstance(value, dict):
            return {key: self.unwrap(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.unwrap(item, depth + 1) for item in value]
        if isinstance(value, _Dtype | type):
            raise ValueError("contains a type")
        return value

    def _array(self, value: np.ndarray, depth: int) -> np.ndarray:
        if not value.dtype.hasobject:
            self._spend(value.nbytes)
            return value
        flat = np.empty(value.size, dtype=object)
        for i, item in enumerate(value.ravel()):
            flat[i] = self.unwrap(item, depth + 1)
        return flat.reshape(value.shape)

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError("unfolds into more than the file holds")


# The deepest file of the original package: array of dict of array of list of box of number.
_MAX_DEPTH = 8


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand-in for `_codecs.encode(text, 'latin1')`, as which protocols of Python 2 write bytes."""
    return text.encode("latin1")


_ALLOWED = {
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED[(f"{_module}.multiarray", "_reconstruct")] = _reconstruct
    _ALLOWED[(f"{_module}.multiarray", "scalar")] = _scalar
    _ALLOWED[(f"{_module}.numeric", "_frombuffer")] = _frombuffer


class _PlainUnpickler(pickle.Unpickler):  # noqa: S301  (find_class returns nothing that could run code)
    def __init__(self, file: io.BytesIO, where: str):
        super().__init__(file, encoding="latin1")
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a global. Raises ManifestError for any other global."""
        if (module, name) not in _ALLOWED:
            raise ManifestError(
                f"{self.where}: its pickle asks for {printable(module)}.{printable(name)}, which could run code; "
                "nothing was run. Save paths and boxes as plain numpy arrays, or as CSV"
            )
        return _ALLOWED[(module, name)]

    def persistent_load(self, pid: Any) -> Any:
        """Raise ManifestError: plain files have no persistent ids."""
        raise ManifestError(f"{self.where}: its pickle refers to objects outside it; save plain numpy arrays")

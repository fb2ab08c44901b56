"""Read the seed's `.npy` metadata (a pickled dict) without running a pickle.

A pickle is a program. This reader lets it build numpy arrays, numpy scalars and plain Python values, and
refuses every other global by name. Even numpy's own reconstruction functions are replaced by ones that
can only make what a saved array needs. Any outcome is a value or a ManifestError.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from ..errors import ManifestError
from ..files import printable


def read_npy(path: str | Path) -> Any:
    """The content of a `.npy` file: an array, or the object a 0-d object array holds (the seed's dict)."""
    where = printable(path)
    try:
        with open(path, "rb") as file:
            version = npy_format.read_magic(file)
            read_header = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
            if version not in read_header:
                raise ManifestError(f"{where}: .npy version {version} is unknown; save it again with numpy")
            shape, _, dtype = read_header[version](file)
            if not dtype.hasobject:
                file.seek(0)
                return npy_format.read_array(file, allow_pickle=False)
            value = _PlainUnpickler(file, where).load()
    except ManifestError:
        raise
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read ({error.strerror or error}); check the path") from error
    except _DAMAGE as error:
        raise ManifestError(f"{where}: damaged ({type(error).__name__}: {error}); save it again with numpy") from error
    if isinstance(value, np.ndarray) and value.dtype == object and value.shape == () and shape == ():
        return value.item()
    return value


# What unpickling and numpy's header parser raise on damaged bytes (seen under mutation).
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
)


class _ArrayClass:
    """Stands for `numpy.ndarray` in a pickle: it can be named, and passed to `_reconstruct`, and that is all."""


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    if kind is not _ArrayClass or tuple(shape) != (0,):
        raise ValueError("not a plain array")
    return np.ndarray((0,), dtype=np.uint8)  # __setstate__ gives it its true shape, type and data


def _frombuffer(buffer: Any, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order).copy()


def _scalar(dtype: np.dtype, data: Any = b"") -> Any:
    if dtype.hasobject:
        raise ValueError("not a plain scalar")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Python 2 protocols write bytes as `_codecs.encode(text, 'latin1')`."""
    return text.encode("latin1")


_ALLOWED = {
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED[(f"{_module}.multiarray", "_reconstruct")] = _reconstruct
    _ALLOWED[(f"{_module}.multiarray", "scalar")] = _scalar
    _ALLOWED[(f"{_module}.numeric", "_frombuffer")] = _frombuffer


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, where: str):
        super().__init__(file, encoding="latin1")
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ManifestError(
                f"{self.where}: its pickle asks for {printable(module)}.{printable(name)}, which could run code; "
                "nothing was run. Save paths and boxes as plain numpy arrays, or as CSV"
            )
        return _ALLOWED[(module, name)]

    def persistent_load(self, pid: Any) -> Any:
        raise ManifestError(f"{self.where}: its pickle refers to objects outside it; save plain numpy arrays")

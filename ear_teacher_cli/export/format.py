"""What a format of exports consists of: the functions that write, check and open it, and what is passed to them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ..command_config import ExportConfig
from ..console import Console
from ..embedding.embedder import Embedder
from ..model.checkpoint import Checkpoint
from ..model.export_format import About, header_of
from ..model.weights import State
from .checks import Check


@dataclass(frozen=True)
class ExportJob:
    """What is exported, and how. `out`: the final path, for messages; a format writes to a temporary one."""

    checkpoint: Checkpoint
    embedder: Embedder  # with the weights to write, on the CPU
    state: State  # the tensors to write, under timm's names
    about: About
    whitening: bytes | None  # content of its file, if the run fitted one
    options: ExportConfig
    console: Console
    out: Path

    @property
    def header(self) -> dict[str, str]:
        """Metadata of the exported file."""
        return header_of(self.about, self.embedder.sha256)


@dataclass(frozen=True)
class Written:
    """What `write` measured. `difference`: the largest difference between outputs of the checkpoint and of the export
    loaded back. `proof`: how they were compared. `strides`: of the feature maps, in pixels, if there are any."""

    difference: float
    proof: str
    strides: list[int]


@dataclass(frozen=True)
class Opened:
    """An export opened for inference on the CPU. `run`: uint8 B,3,S,S -> float32 B,D. `fingerprint`: computed from the
    weights where the format allows it, else the one in the header. `backbone`: where the format is opened by torch."""

    about: About
    fingerprint: str | None
    run: Callable[[np.ndarray], np.ndarray]
    backbone: nn.Module | None = None


@dataclass(frozen=True)
class Format:
    """A format of exports.

    `description`: for messages.
    `write(path, job)`: write a file, or into an existing empty folder, load it back and compare. Raises WeightsError if
    outputs differ.
    `verify(path)`: return the checks, and the opened export (None if it is too damaged to be run). Raises WeightsError
    for what cannot be read at all.
    `open(path)`: open an intact export. Raises WeightsError if it is not.
    `options`: the fields of ExportConfig that this format takes and not all do.
    `files`: of a folder, the names it may hold, the weights first.
    `require`: raise EarTeachError if a package that it needs is missing.
    """

    description: str
    write: Callable[[Path, ExportJob], Written]
    verify: Callable[[Path], tuple[list[Check], Opened | None]]
    open: Callable[[Path], Opened]
    options: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    require: Callable[[], None] = lambda: None

    def weights_file(self, out: Path) -> Path:
        """Return the file with the weights of an export `out`, beside which its whitening lies."""
        return out / self.files[0] if self.files else out

"""Read and write checkpoints and weights files. Nothing else calls `torch.load`, and no pickled code is run.

A checkpoint of `earteach train` is Lightning's dict (`state_dict`, `optimizer_states`, `loops`, ...) plus
`hyper_parameters` (the TrainConfig as a dict) and `earteach` (see `describe`).
"""

import os
import pickle
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import __version__
from ..config import TrainConfig
from ..config_files import from_dict
from ..data.preprocessing import Preprocessing
from ..errors import ForeignWeightsError, UsageError, WeightsError
from ..files import printable, short_message, whole_file

FORMAT = 1  # of the `earteach` entry


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a training run, read and checked."""

    path: Path
    config: TrainConfig
    preprocessing: Preprocessing
    embedding_dim: int
    epoch: int  # epochs completed
    steps_done: int  # of the next epoch, if it was interrupted
    content: dict[str, Any]

    @property
    def model_state(self) -> dict[str, torch.Tensor]:
        """Tensors of TeacherModel under its own names, made contiguous for safetensors (training uses
        channels_last)."""
        state = self.content["state_dict"].items()
        return {k.removeprefix("model."): v.contiguous() for k, v in state if k.startswith("model.")}

    @property
    def backbone_state(self) -> dict[str, torch.Tensor]:
        """Tensors of the backbone under timm's names."""
        return {k.removeprefix("backbone."): v for k, v in self.model_state.items() if k.startswith("backbone.")}

    @property
    def as_learning(self) -> "Checkpoint":
        """This checkpoint with the weights that the optimiser updates, instead of those that were validated (averaged,
        or interpolated with the baseline); without the whitening, which was fitted to the validated ones.

        Raises UsageError if the checkpoint holds only one set of weights.
        """
        learning = self.content.get("learning_state")
        if not isinstance(learning, dict):
            raise UsageError(f"{printable(self.path)}: holds one set of weights; leave --no-ema out")
        content = {**self.content, "state_dict": learning}
        content.pop("whitening", None)
        return replace(self, content=content)


def describe(
    config: TrainConfig, preprocessing: Preprocessing, embedding_dim: int, epochs: int, steps_per_epoch: int
) -> dict[str, Any]:
    """Return the `earteach` entry of a checkpoint: what inference needs, in plain values."""
    return {
        "format": FORMAT,
        "version": __version__,
        "backbone": config.backbone,
        "embedding_dim": embedding_dim,
        "epochs_completed": epochs,
        "steps_per_epoch": steps_per_epoch,
        "preprocessing": preprocessing.as_dict(),
    }


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of `earteach train`. Raises ForeignWeightsError if it is not one, WeightsError if it is
    damaged."""
    where = printable(path)
    content = read_torch(Path(path))
    if not isinstance(content, dict) or "earteach" not in content or "hyper_parameters" not in content:
        raise ForeignWeightsError(
            f"{where}: is not a checkpoint of earteach train; give one from a run's checkpoints folder"
        )
    about = content["earteach"]
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise WeightsError(f"{where}: its checkpoint format is not {FORMAT}; use the earteach that wrote it")
    try:
        return Checkpoint(
            path=Path(path),
            config=from_dict(dict(content["hyper_parameters"]), where),
            preprocessing=Preprocessing.from_dict(about["preprocessing"], where),
            embedding_dim=int(about["embedding_dim"]),
            epoch=int(about["epochs_completed"]),
            steps_done=int(about.get("steps_done", 0)),
            content=content,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{where}: its description of the model is incomplete ({error!r}); use another checkpoint"
        ) from error


def require_fit(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    """Raise WeightsError unless the tensors of the checkpoint's model have the names and shapes of those in `state`, a
    model of the architecture that the checkpoint names."""
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.model_state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if different:
        raise WeightsError(
            f"{printable(checkpoint.path)}: names the backbone {printable(checkpoint.config.backbone)}, but "
            f"{len(different)} of its tensors do not fit it ({printable(different[0])}, ...); use another checkpoint"
        )


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weights file (.safetensors, or torch's .pth, .pt, .ckpt, .bin). Raises WeightsError."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = read_torch(path)
    for wrapper in ("state_dict", "model", "model_state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(k, str) for k in tensors):
        raise WeightsError(f"{printable(path)}: holds no named tensors; give a state dict or a checkpoint")
    return tensors


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return (tensors, header metadata) of a .safetensors file. Raises WeightsError."""
    _require_file(Path(path))
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{printable(path)}: damaged, or not a safetensors file ({short_message(error)}); use another copy"
        ) from error


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file. Raises OSError, on a full disk too."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(short_message(error)) from error


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint completely or not at all. Raises EarTeachError if it cannot be written (a full disk)."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk in the context
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_torch(path: Path) -> Any:
    """Read a file of torch.save without running code from its pickle. Raises WeightsError."""
    where = printable(path)
    _require_file(path)
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  (the one place)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class)[: ]+([\w.]+)", str(error))
        if culprit:
            raise WeightsError(
                f"{where}: its pickle asks for {culprit[1] or culprit[2]}, which could run code; "
                "nothing was run. Give a file of plain tensors (.safetensors)"
            ) from error
        raise _unreadable(where, error) from error
    except _DAMAGE as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> WeightsError:
    return WeightsError(f"{where}: is not a weights file, or damaged ({short_message(error)}); use another copy")


def _check_archive(path: Path) -> None:
    """Raise BadZipFile if the CRC-32 of a record is wrong (torch.load does not check it), or if records are compressed
    or overlap (those of torch.save never are): a small file could expand to a huge one."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("holds compressed records")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile("its records overlap")
        if broken := archive.testzip():
            raise zipfile.BadZipFile(f"checksum of record {broken} is wrong")


# Exceptions of torch.load on truncated, changed or foreign bytes.
_DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise WeightsError(f"{printable(path)}: is a folder; name the weights file in it")
    if not path.is_file():
        raise WeightsError(f"{printable(path)}: no such file; check the path")
    if path.stat().st_size == 0:
        raise WeightsError(f"{printable(path)}: is empty; fetch it again")

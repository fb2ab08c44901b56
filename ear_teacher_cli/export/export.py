"""`export-backbone`: the teacher's backbone alone, under timm's names, proven before it is called done."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import nn

from .. import run_folder
from ..config import Reading
from ..console import Console
from ..data.data_card import stated
from ..data.manifest import Manifest, read_manifest
from ..data.preprocessing import normalise
from ..embedding.embedder import Embedder, crops_of, embedder_of
from ..errors import EarTeachError, ManifestError, UsageError, WeightsError
from ..files import printable, refuse_existing, refuse_existing_folder, whole_file, whole_folder
from ..model.checkpoint import Checkpoint, read_checkpoint, write_safetensors
from ..model.export_format import (
    CARD,
    FOLDER,
    WEIGHTS,
    About,
    header_of,
    read_export,
    sidecars,
    sized,
    whitening_beside,
)
from ..model.feature_maps import MapStatistics, map_model, open_local_dir, statistics
from ..model.file_digest import require_whole, seal
from ..model.golden import TOLERANCE, golden_of, relative_difference
from ..model.weights import fingerprint
from .model_card import Stated, model_card
from .onnx import OnnxModel, map_names, require_onnx, write_onnx

FORMATS = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Export:
    """What was written. `difference`: the largest |difference| between the checkpoint's embeddings and the export's: 0
    for timm's formats, a share of the largest number for ONNX. `rounding`: the same share, between the weights as they
    were and in half precision; None in full."""

    path: Path
    kind: str  # safetensors, onnx, folder
    architecture: str
    embedding_dim: int
    tensors: int
    difference: float
    fingerprint: str
    whitening: Path | None  # the file with it, if the run fitted one
    maps: list[int]  # strides, where there are maps
    rounding: float | None


def export_backbone(
    source: str | Path,
    out: str | Path,
    overwrite: bool = False,
    *,
    features: bool = False,
    half: bool = False,
    ema: bool = True,
    val_metadata: str | None = None,
    root_dir: str | None = None,
    reading: Reading | None = None,
    consent: str | None = None,
    license: str | None = None,
    batch_size: int = 32,
    num_workers: int = 8,
    console: Console | None = None,
) -> Export:
    """Write `out`, load it back strictly, compare embeddings, then rename it in place.

    `source`: a checkpoint, or an experiment folder (its best one). `out`: x.safetensors, x.onnx (with `features`: and
    the maps), or a folder that timm opens as `local-dir:`. `half`: weights in float16. `ema`: the weights that the run
    validated; else those it would go on learning with. Of a folder: `val_metadata` is what the statistics of the maps
    are of (None: what the run was validated on); `consent` and `license` are for its model card.
    Raises EarTeachError; WeightsError if the proof fails.
    """
    kind = _kind_of(out)
    out = refuse_existing_folder(out, overwrite) if kind == "folder" else refuse_existing(out, overwrite, (source,))
    _refuse_idle(kind, features, half, val_metadata=val_metadata, consent=consent, license=license)
    if kind == "onnx":
        require_onnx()
    checkpoint = read_checkpoint(run_folder.checkpoint_of(Path(source), best=True))
    checkpoint = checkpoint if ema else checkpoint.as_learning
    teacher = embedder_of(checkpoint)
    teacher.backbone.cpu()
    state, rounding = _in_half(checkpoint.backbone_state, teacher) if half else (checkpoint.backbone_state, None)
    fitted = checkpoint.content.get("whitening")
    whitening = save(fitted) if fitted else None
    beside = whitening_beside(out / WEIGHTS if kind == "folder" else out)
    if kind != "folder":
        _refuse_to_part(out, whitening, overwrite)
    about = About(
        architecture=teacher.architecture,
        embedding_dim=teacher.embedding_dim,
        preprocessing=teacher.preprocessing,
        fingerprint=teacher.fingerprint,
        golden=golden_of(teacher.backbone, teacher.preprocessing),
        whitening_sha256=hashlib.sha256(whitening).hexdigest() if whitening else None,
    )
    header = header_of(about, teacher.sha256)
    maps_of_teacher = (
        map_model(teacher.backbone, about.architecture, about.preprocessing.image_size)
        if features or kind == "folder"
        else None
    )
    strides = maps_of_teacher.feature_info.reduction() if maps_of_teacher else []
    if kind == "onnx":
        with _with_whitening(out, whitening), whole_file(out) as temporary:
            write_onnx(teacher.backbone, teacher.preprocessing, strides, header, temporary)
            difference = _prove_onnx(temporary, maps_of_teacher, about, strides)
    elif kind == "safetensors":
        with _with_whitening(out, whitening), whole_file(out) as temporary:
            difference = _write_weights(temporary, state, header, teacher)
    else:
        manifest = _validation_images(checkpoint, val_metadata, root_dir, reading)
        maps, images = _measured(
            maps_of_teacher, checkpoint, manifest, batch_size, num_workers, console or Console(quiet=True)
        )
        said = Stated(stated(consent, "consent"), stated(license, "license"), ema, half)
        with whole_folder(out, FOLDER) as folder:
            difference = _write_weights(folder / WEIGHTS, state, header, teacher)
            if whitening:
                (folder / beside.name).write_bytes(whitening)
            for name, content in sidecars(about, maps, images).items():
                _write_json(folder / name, content)
            card = model_card(about, checkpoint, maps, images, *_figures(checkpoint), said)
            (folder / CARD).write_text(card, encoding="utf-8")
            _prove_folder(folder, teacher, maps_of_teacher, about)
    return Export(
        path=out,
        kind=kind,
        architecture=about.architecture,
        embedding_dim=about.embedding_dim,
        tensors=len(state),
        difference=difference,
        fingerprint=teacher.fingerprint,
        whitening=beside if whitening else None,
        maps=strides,
        rounding=rounding,
    )


def _kind_of(out: str | Path) -> str:
    suffix = Path(out).suffix
    if suffix in FORMATS and not str(out).endswith("/"):
        return suffix.removeprefix(".")
    if not suffix or Path(out).is_dir() or str(out).endswith("/"):
        return "folder"
    raise UsageError(f"{printable(out)}: name a .safetensors, a .onnx, or a folder (end its name with /)")


def _refuse_idle(kind: str, features: bool, half: bool, **of_folders: str | None) -> None:
    """Raise UsageError for an option that this kind of export would not heed."""
    if features and kind != "onnx":
        raise UsageError("--features: is for ONNX; timm makes the maps of a folder or a .safetensors. Leave it out")
    if half and kind == "onnx":
        raise UsageError("--half: ONNX is written in float32; leave it out, or write a .safetensors or a folder")
    for name, value in of_folders.items():
        if value is not None and kind != "folder":
            raise UsageError(f"--{name.replace('_', '-')}: is for the folder form; leave it out, or name a folder")


def _siblings(out: Path) -> list[Path]:
    """x.onnx of x.safetensors, and the other way: they share x.whitening.safetensors."""
    others = (out.with_suffix(suffix) for suffix in FORMATS)
    return [path for path in others if path != out and path.exists()]


def _refuse_to_part(out: Path, whitening: bytes | None, overwrite: bool) -> None:
    """Raise UsageError if writing this whitening would take a sibling's away."""
    beside = whitening_beside(out)
    if whitening is None or _is(beside, whitening):
        return
    if beside.exists() and _siblings(out):
        name = printable(_siblings(out)[0].name)
        raise UsageError(f"{printable(beside)}: belongs to {name}, which is of other weights; choose another name")
    refuse_existing(beside, overwrite)


@contextmanager
def _with_whitening(out: Path, whitening: bytes | None) -> Iterator[None]:
    """It takes its name after what is done within. Where there is none, that of an earlier export goes."""
    beside = whitening_beside(out)
    if whitening:
        with whole_file(beside) as temporary:
            temporary.write_bytes(whitening)
            yield
    else:
        yield
        if not _siblings(out):
            beside.unlink(missing_ok=True)


def _is(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _in_half(state: dict[str, torch.Tensor], teacher: Embedder) -> tuple[dict[str, torch.Tensor], float]:
    """(weights in float16, what that does to the embeddings); the teacher goes on with the rounded ones."""
    before = golden_of(teacher.backbone, teacher.preprocessing)
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    large = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if large:
        raise WeightsError(f"--half: {large[0]} holds numbers that float16 cannot (above 65,504); leave --half out")
    teacher.backbone.load_state_dict(state)
    teacher.fingerprint = fingerprint(teacher.architecture, state, teacher.preprocessing)
    return state, before.difference(golden_of(teacher.backbone, teacher.preprocessing).embeddings)


def _sort_header(path: Path) -> None:
    """Put the header's metadata in order: safetensors writes it in a random one, and equal exports shall be equal files.

    A .safetensors file begins with the header's length (8 bytes, little-endian), then the header as JSON,
    padded with spaces.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(8)
        file.write(text)


def _write_weights(path: Path, state: dict[str, torch.Tensor], header: dict[str, str], teacher: Embedder) -> float:
    """Write, then load with nothing but timm and compare on a seeded batch: equal weights give equal numbers, so 0 is
    demanded, and returned."""
    write_safetensors(state, path, metadata=header)
    _sort_header(path)
    seal(path)
    require_whole(path)
    about, state = read_export(path)
    fresh = timm.create_model(about.architecture, num_classes=0, **sized(about))
    fresh.load_state_dict(state, strict=True)
    mark = fingerprint(about.architecture, state, about.preprocessing)
    difference = _largest_difference(fresh, teacher.backbone, about)
    if difference != 0 or mark != teacher.fingerprint:
        raise WeightsError(
            f"{printable(path)}: the export's embeddings differ from the checkpoint's by {difference:g}; nothing was written"
        )
    return difference


def _prove_folder(folder: Path, teacher: Embedder, maps: nn.Module, about: About) -> None:
    """Open it as users will, with timm's `local-dir:`, both ways."""
    try:
        opened = open_local_dir(folder)
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(
            f"{printable(folder)}: timm does not open it ({printable(error)}); nothing was written"
        ) from error
    for fresh, own in zip(opened, (teacher.backbone, maps), strict=True):
        difference = _largest_difference(fresh, own, about)
        if difference != 0:
            raise WeightsError(f"{printable(folder)}: timm's numbers differ by {difference:g}; nothing was written")


def _prove_onnx(path: Path, maps: nn.Module | None, about: About, strides: list[int]) -> float:
    """Compare with torch on the golden batch, at two batch sizes. The largest relative difference, over all outputs."""
    require_whole(path)
    model = OnnxModel(path)
    pixels = about.golden.pixels
    expected = [about.golden.embeddings]
    if maps is not None:
        with torch.inference_mode():
            expected += [stage.numpy() for stage in maps(normalise(torch.from_numpy(pixels), about.preprocessing))]
    differences = [
        relative_difference(found, wanted[:batch])
        for batch in (len(pixels), 1)
        for found, wanted in zip(model(pixels[:batch]), expected, strict=True)
    ]
    difference = float(np.max(differences))
    if not difference <= TOLERANCE or model.outputs[1:] != map_names(strides):
        raise WeightsError(
            f"{printable(path)}: onnxruntime's numbers differ from torch's by {difference:g}; nothing was written"
        )
    return difference


def _largest_difference(fresh: nn.Module, own: nn.Module, about: About) -> float:
    """Between what two models give for a seeded batch, both in the layout that embed has: in another, sums are rounded
    otherwise. Infinite where shapes differ or a number is not finite."""
    layout = torch.channels_last
    size = about.preprocessing.image_size
    batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    with torch.inference_mode():
        found, wanted = (model.cpu().eval().to(memory_format=layout)(batch) for model in (fresh, own))
    pairs = list(zip(found, wanted, strict=True)) if isinstance(found, list) else [(found, wanted)]
    sound = all(a.shape == b.shape and a.isfinite().all() and b.isfinite().all() for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) if sound else float("inf")


def _validation_images(
    checkpoint: Checkpoint, val_metadata: str | None, root_dir: str | None, reading: Reading | None
) -> Manifest:
    config = checkpoint.config
    try:
        if val_metadata:
            return read_manifest(val_metadata, root_dir, reading)
        return read_manifest(config.val_metadata, root_dir or config.root_dir, config.reading)
    except ManifestError as error:
        where = (
            ""
            if val_metadata
            else " (a folder has the statistics of the run's validation images; or name others with --val-metadata)"
        )
        raise ManifestError(f"{error}{where}") from error


def _measured(
    maps: nn.Module, checkpoint: Checkpoint, manifest: Manifest, batch_size: int, num_workers: int, console: Console
) -> tuple[list[MapStatistics], int]:
    """(statistics of the maps, of how many images)."""
    preprocessing, timeout = checkpoint.preprocessing, checkpoint.config.load_timeout
    count = 0

    def images():
        nonlocal count
        for good, pixels, _ in crops_of(manifest, preprocessing, batch_size, num_workers, timeout, console, "maps of"):
            if good:
                count += len(good)
                yield normalise(pixels, preprocessing)

    found = statistics(maps, images())
    if not found:
        raise EarTeachError(f"{printable(manifest.source)}: not one image could be read; check --root-dir")
    return found, count


def _figures(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Rows of metrics.csv: this checkpoint's and that of before training; none where they are not to be had."""
    try:
        rows = run_folder.read_metrics(checkpoint.path.parent.parent / run_folder.METRICS)
    except (OSError, EarTeachError):  # damaged
        rows = []
    by_epoch = {row.get("epoch"): row for row in rows}
    return by_epoch.get(str(checkpoint.epoch), {}), by_epoch.get("0", {})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[\s\d.e+,-]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # on one line
    path.write_text(text + "\n", encoding="utf-8")

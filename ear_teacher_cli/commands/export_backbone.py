"""`export-backbone`: the teacher's backbone alone, under timm's names, proven before it is called done."""

import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from ..core import runs
from ..core.checkpoint import Checkpoint, read_checkpoint, write_safetensors
from ..core.embedder import Embedder, crops_of, embedder_of
from ..core.exports import (
    CARD,
    CONFIG,
    FEATURES,
    FOLDER,
    PREPROCESS,
    WEIGHTS,
    About,
    header_of,
    read_export,
    whitening_beside,
)
from ..core.features import MapStatistics, map_model, open_local_dir, statistics
from ..core.golden import TOLERANCE, golden_of, relative_difference
from ..core.model_card import NOT_STATED, model_card
from ..core.onnx_model import OnnxModel, map_names, write_onnx
from ..core.weights import fingerprint, sha256_of
from ..data.manifest import Manifest, read_manifest
from ..data.pixels import normalise, pretrained_cfg_of
from ..errors import EarTeachError, ManifestError, WeightsError, WordsError
from ..files import printable, refuse_existing, whole_file, whole_folder
from ..talk import Talk

FORMATS = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Export:
    """What was written. `difference`: the largest |difference| between the checkpoint's embeddings and the export's: 0
    for timm's formats, a share of the largest number for ONNX. `rounding`: the same share, between the weights as they
    were and in half precision; None in full."""

    path: Path
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
    consent: str = NOT_STATED,
    license: str = NOT_STATED,
    batch_size: int = 32,
    num_workers: int = 8,
    talk: Talk | None = None,
) -> Export:
    """Write `out`, load it back strictly, compare embeddings, then rename it in place.

    `source`: a checkpoint, or an experiment folder (its best one). `out`: x.safetensors, x.onnx (with `features`: and
    the maps), or a folder that timm opens as `local-dir:`. `half`: weights in float16. `ema`: the weights that the run
    validated; else those it would go on learning with. `val_metadata`: what a folder's statistics of the maps are of
    (None: what the run was validated on). Raises EarTeachError; WeightsError if the proof fails.
    """
    kind = _kind_of(out)
    if kind == "folder":
        out = Path(out)
        if out.exists() and not out.is_dir():
            raise WordsError(f"{printable(out)}: is a file; name a folder, a .safetensors or a .onnx")
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise WordsError(f"{printable(out)}: exists already; choose another name or pass --overwrite")
        refuse_existing(out.parent / f"{out.name}.new", True)  # is there a place for it?
    else:
        out = refuse_existing(out, overwrite, inputs=(source,))
    if features and kind == "safetensors":
        raise WordsError("--features: a .safetensors holds no graph; timm makes the maps of a folder or a .safetensors")
    if half and kind == "onnx":
        raise WordsError("--half: ONNX is written in float32; leave it out, or write a .safetensors or a folder")
    checkpoint = read_checkpoint(runs.checkpoint_of(Path(source), best=True))
    checkpoint = checkpoint if ema else checkpoint.as_learning
    teacher = embedder_of(checkpoint)
    teacher.backbone.cpu()
    state, rounding = checkpoint.backbone_state, None
    if half:
        state, rounding = _in_half(state, teacher)
    whitening = checkpoint.content.get("whitening")
    packed = save(whitening) if whitening else b""
    if (
        packed and kind != "folder" and not _is(whitening_beside(out), packed)
    ):  # of teacher.onnx and teacher.safetensors: one
        refuse_existing(whitening_beside(out), overwrite)
    golden = golden_of(teacher.backbone, teacher.preprocessing)
    about = About(teacher.architecture, teacher.embedding_dim, teacher.preprocessing, teacher.fingerprint, golden)
    talk = talk or Talk(quiet=True)
    made = Export(
        out, about.architecture, about.embedding_dim, len(state), 0.0, teacher.fingerprint, None, [], rounding
    )
    with ExitStack() as stack:  # left in reverse: the export takes its name first, its whitening last
        if kind == "folder":
            manifest = _validation_pictures(checkpoint, val_metadata, root_dir)
            folder = stack.enter_context(whole_folder(out, FOLDER))
            weights = folder / WEIGHTS
            fitted = folder / whitening_beside(Path(WEIGHTS)) if whitening else None
        else:
            fitted = stack.enter_context(whole_file(whitening_beside(out))) if whitening else None
            weights = stack.enter_context(whole_file(out))
        if fitted:
            fitted.write_bytes(packed)
            about = replace(about, whitening_sha256=sha256_of(fitted))
            made = replace(made, whitening=whitening_beside(out / WEIGHTS if kind == "folder" else out))
        header = header_of(about, sha256_of(checkpoint.path))
        if kind == "onnx":
            strides = _maps_of(teacher).feature_info.reduction() if features else []
            write_onnx(teacher.backbone, teacher.preprocessing, strides, header, weights)
            return replace(made, difference=_prove_onnx(weights, teacher, about, strides), maps=strides)
        write_safetensors(state, weights, metadata=header)
        _sort_header(weights)
        made = replace(made, difference=_prove(weights, teacher))
        if kind == "folder":
            maps = _write_beside(
                folder, teacher, about, checkpoint, manifest, consent, license, batch_size, num_workers, talk
            )
            _prove_folder(folder, teacher)
            made = replace(made, maps=[stage.stride for stage in maps])
    return made


def _kind_of(out: str | Path) -> str:
    suffix = Path(out).suffix
    if suffix in FORMATS:
        return suffix.removeprefix(".")
    if not suffix or Path(out).is_dir() or str(out).endswith("/"):
        return "folder"
    raise WordsError(f"{printable(out)}: name a .safetensors, a .onnx, or a folder (end its name with /)")


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


def _prove(path: Path, teacher: Embedder) -> float:
    """Load with nothing but timm and compare on a seeded batch: equal weights give equal numbers, so 0 is demanded."""
    about, state = read_export(path)
    fresh = timm.create_model(about.architecture, num_classes=0, **_sized(about.architecture, about))
    fresh.load_state_dict(state, strict=True)
    mark = fingerprint(about.architecture, state, about.preprocessing)
    difference = _largest_difference(fresh, teacher.backbone, about)
    if difference != 0 or mark != teacher.fingerprint:
        raise WeightsError(
            f"{printable(path)}: the export's embeddings differ from the checkpoint's by {difference:g}; nothing was written"
        )
    return difference


def _prove_folder(folder: Path, teacher: Embedder) -> None:
    """Open it as users will, with timm's `local-dir:`, both ways."""
    about = read_export(folder / WEIGHTS)[0]
    try:
        whole, maps = open_local_dir(folder)
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(
            f"{printable(folder)}: timm does not open it ({printable(error)}); nothing was written"
        ) from error
    expected = _maps_of(teacher)
    for fresh, own in ((whole, teacher.backbone), (maps, expected)):
        difference = _largest_difference(fresh, own, about)
        if difference != 0:
            raise WeightsError(f"{printable(folder)}: timm's numbers differ by {difference:g}; nothing was written")


def _prove_onnx(path: Path, teacher: Embedder, about: About, strides: list[int]) -> float:
    """Compare with torch on the golden batch, at two batch sizes. The largest relative difference, over all outputs."""
    model = OnnxModel(path)
    pixels = about.golden.pixels
    images = normalise(torch.from_numpy(pixels), about.preprocessing)
    with torch.inference_mode():
        expected = [about.golden.embeddings, *(m.numpy() for m in (_maps_of(teacher)(images) if strides else []))]
    difference = 0.0
    for batch in (len(pixels), 1):
        for found, wanted in zip(model(pixels[:batch]), expected, strict=True):
            if found.shape != wanted[:batch].shape:
                raise WeightsError(
                    f"{printable(path)}: gives {found.shape}, not {wanted[:batch].shape}; nothing was written"
                )
            difference = max(difference, relative_difference(found, wanted[:batch]))
    if not difference <= TOLERANCE or model.outputs[1:] != map_names(strides):
        raise WeightsError(
            f"{printable(path)}: onnxruntime's numbers differ from torch's by {difference:g}; nothing was written"
        )
    return difference


def _largest_difference(fresh: nn.Module, own: nn.Module, about: About) -> float:
    """Between what two models give for a seeded batch, both in the layout that embed has: in another, sums are rounded
    otherwise."""
    layout = torch.channels_last
    size = about.preprocessing.image_size
    batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    with torch.inference_mode():
        found, wanted = (model.cpu().eval().to(memory_format=layout)(batch) for model in (fresh, own))
    pairs = zip(found, wanted, strict=True) if isinstance(found, list) else [(found, wanted)]
    return max(float((a - b).abs().max()) if a.shape == b.shape else float("inf") for a, b in pairs)


def _sized(architecture: str, about: About) -> dict[str, int]:
    return {"img_size": about.preprocessing.image_size} if pretrained_cfg_of(architecture).fixed_input_size else {}


def _maps_of(teacher: Embedder) -> nn.Module:
    return map_model(teacher.backbone, teacher.architecture, teacher.preprocessing.image_size)


def _validation_pictures(checkpoint: Checkpoint, val_metadata: str | None, root_dir: str | None) -> Manifest:
    config = checkpoint.config
    try:
        return read_manifest(
            val_metadata or config.val_metadata, root_dir or (None if val_metadata else config.root_dir)
        )
    except ManifestError as error:
        where = (
            ""
            if val_metadata
            else " (a folder has the statistics of the run's validation pictures; or name others with --val-metadata)"
        )
        raise ManifestError(f"{error}{where}") from error


def _write_beside(
    folder: Path,
    teacher: Embedder,
    about: About,
    checkpoint: Checkpoint,
    manifest: Manifest,
    consent: str,
    license: str,
    batch_size: int,
    num_workers: int,
    talk: Talk,
) -> list[MapStatistics]:
    """What a folder has besides the weights."""
    config, preprocessing = checkpoint.config, about.preprocessing
    crops = crops_of(manifest, preprocessing, batch_size, num_workers, config.load_timeout, talk, "maps of")
    count = 0

    def images():
        nonlocal count
        for good, pixels, _ in crops:
            if good:
                count += len(good)
                yield normalise(pixels, preprocessing)

    maps = statistics(_maps_of(teacher), images())
    if not count:
        raise EarTeachError(f"{printable(manifest.source)}: not one picture could be read; check --root-dir")
    _write_json(folder / CONFIG, timm_config(teacher, about))
    _write_json(
        folder / PREPROCESS,
        {**preprocessing.as_dict(), "embedding_dim": about.embedding_dim, "fingerprint": about.fingerprint},
    )
    _write_json(
        folder / FEATURES, {"pictures": count, "fingerprint": about.fingerprint, "maps": [asdict(m) for m in maps]}
    )
    rows = runs.read_metrics(checkpoint.path.parent.parent / runs.METRICS)
    by_epoch = {row.get("epoch"): row for row in rows}
    figures, before = by_epoch.get(str(checkpoint.epoch), {}), by_epoch.get("0", {})
    card = model_card(about, checkpoint, maps, count, figures, before, consent=consent, license=license)
    (folder / CARD).write_text(card, encoding="utf-8")
    return maps


def timm_config(teacher: Embedder, about: About) -> dict[str, Any]:
    """What timm's `local-dir:` reads. `num_classes` 0 at both places: else it looks for a classifier."""
    published = pretrained_cfg_of(about.architecture)
    size = about.preprocessing.image_size
    return {
        "architecture": about.architecture,
        "num_classes": 0,
        "num_features": about.embedding_dim,
        **({"model_args": _sized(about.architecture, about)} if published.fixed_input_size else {}),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, size, size],
            "fixed_input_size": published.fixed_input_size,
            "mean": list(about.preprocessing.mean),
            "std": list(about.preprocessing.std),
            "interpolation": about.preprocessing.interpolation,
            "crop_pct": 1.0,  # no hidden centre crop: it would cut the helix off
            "crop_mode": "border" if about.preprocessing.pad else "squash",
            "first_conv": published.first_conv,
            "classifier": published.classifier,
        },
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[\s\d.e+,-]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # on one line
    path.write_text(text + "\n", encoding="utf-8")

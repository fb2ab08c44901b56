"""`export-backbone`: write the backbone of a checkpoint in one of several formats, and compare it with the
checkpoint."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save

from .. import run_folder
from ..command_config import ExportConfig
from ..console import Console
from ..embedding.embedder import Embedder, embedder_of
from ..errors import UsageError, WeightsError
from ..files import printable, refuse_existing, refuse_existing_folder, whole_file, whole_folder
from ..model.checkpoint import read_checkpoint
from ..model.export_format import About, whitening_beside
from ..model.golden import golden_of
from ..model.weights import State, fingerprint
from . import FORMATS
from .format import ExportJob, Format


@dataclass(frozen=True)
class Export:
    """What was written.

    `kind`: safetensors, onnx, folder. `difference`: the largest difference between outputs of the checkpoint and of the
    export, compared as `proof` says: an absolute one, 0, for weights; a share of the largest value for ONNX.
    `maps`: strides in pixels of the feature maps, if there are any. `rounding`: the difference between embeddings
    before and after rounding the weights to float16, as a share of the largest value; None without `half`.
    """

    path: Path
    kind: str
    architecture: str
    embedding_dim: int
    tensors: int
    difference: float
    proof: str
    fingerprint: str
    whitening: Path | None  # its file, if the run fitted one
    maps: list[int]
    rounding: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values: `path`, `kind`, `architecture`, `proof`, `fingerprint` (str),
        `embedding_dim`, `tensors` (int), `difference` (float), `whitening` (str; null: none), `maps` (list of int),
        `rounding` (float; null: not rounded)."""
        whitening = None if self.whitening is None else str(self.whitening)
        return {**asdict(self), "path": str(self.path), "whitening": whitening}


def export_backbone(
    source: str | Path,
    out: str | Path,
    config: ExportConfig | None = None,
    console: Console | None = None,
) -> Export:
    """Write `out`, load it back strictly, compare outputs with the checkpoint's, then rename it into place.

    `source`: a checkpoint, or an experiment folder (its best checkpoint). `out`: a file with a suffix in `FORMATS`, or
    a folder. Raises UsageError if `out` exists or an option is not one of the format's, WeightsError if outputs differ,
    EarTeachError.
    """
    config = config or ExportConfig()
    key = _format_key(out)
    format = FORMATS[key]
    out = (
        refuse_existing_folder(out, config.overwrite)
        if format.files
        else refuse_existing(out, config.overwrite, (source,))
    )
    _refuse_unused(key, config)
    format.require()
    job, rounding = _prepare(source, out, config, console or Console(quiet=True))
    if not format.files:
        _require_own_whitening(out, job.whitening, config.overwrite)
    with _temporary(out, format, job.whitening) as temporary:
        written = format.write(temporary, job)
    return Export(
        path=out,
        kind=key.removeprefix("."),
        architecture=job.about.architecture,
        embedding_dim=job.about.embedding_dim,
        tensors=len(job.state),
        difference=written.difference,
        proof=written.proof,
        fingerprint=job.embedder.fingerprint,
        whitening=whitening_beside(format.weights_file(out)) if job.whitening else None,
        maps=written.strides,
        rounding=rounding,
    )


def describe(made: Export) -> str:
    """Return what was written, in one line."""
    return (
        f"{printable(made.path)}: {made.architecture}, {made.tensors} tensors, {made.embedding_dim} dimensions; "
        f"{made.proof}, largest difference {made.difference:.2g}"
        + (f"; maps of strides {', '.join(map(str, made.maps))}" if made.maps else "")
        + (
            f"; float16 changes the embeddings by {made.rounding:.2g} of the largest"
            if made.rounding is not None
            else ""
        )
        + (f"; its whitening: {printable(made.whitening.name)}" if made.whitening else "")
        + f"; fingerprint {made.fingerprint[:16]}"
    )


def weights_of(out: str | Path) -> Path:
    """Return the file with the weights of an export: itself, or that in its folder."""
    return FORMATS[_format_key(out)].weights_file(Path(out))


def require_free(out: str | Path, overwrite: bool) -> None:
    """Raise UsageError unless `out` names a format of exports and may be written, EarTeachError if it needs a package that
    is missing."""
    format = FORMATS[_format_key(out)]
    format.require()
    if format.files:
        refuse_existing_folder(out, overwrite)
        return
    path = refuse_existing(out, overwrite)
    _refuse_shared_whitening(path)
    refuse_existing(whitening_beside(path), overwrite)


def _format_key(out: str | Path) -> str:
    """Return the key in FORMATS that the name of the output asks for. Raises UsageError."""
    suffix, is_folder = Path(out).suffix, str(out).endswith("/")
    if suffix in FORMATS and not is_folder:
        return suffix
    if not suffix or is_folder or Path(out).is_dir():
        return "folder"
    known = ", ".join(f"{_named(key)} ({format.description})" for key, format in FORMATS.items())
    raise UsageError(f"{printable(out)}: not a known format; name {known}; end the name of a folder with /")


def _refuse_unused(key: str, options: ExportConfig) -> None:
    """Raise UsageError for an option that the format does not take."""
    for field in fields(ExportConfig):
        takers = [_named(other) for other, format in FORMATS.items() if field.name in format.options]
        if takers and _named(key) not in takers and getattr(options, field.name) != field.default:
            raise UsageError(
                f"--{field.name.replace('_', '-')}: is for {' or '.join(takers)}, not for {_named(key)}; "
                "leave it out, or choose another format"
            )


def _named(key: str) -> str:
    return f"a {key}"


def _prepare(source: str | Path, out: Path, options: ExportConfig, console: Console) -> tuple[ExportJob, float | None]:
    """Read the checkpoint; return what is to be exported, and the effect of rounding to float16, if that is asked
    for."""
    checkpoint = read_checkpoint(run_folder.checkpoint_of(Path(source), best=True))
    checkpoint = checkpoint if options.ema else checkpoint.as_learning
    embedder = embedder_of(checkpoint)
    embedder.backbone.cpu()
    state, rounding = checkpoint.backbone_state, None
    if options.half:
        state, rounding = _round_to_half(state, embedder)
    fitted = checkpoint.content.get("whitening")
    whitening = save(fitted) if fitted else None
    about = About(
        architecture=embedder.architecture,
        embedding_dim=embedder.embedding_dim,
        preprocessing=embedder.preprocessing,
        fingerprint=embedder.fingerprint,
        golden=golden_of(embedder.backbone, embedder.preprocessing),
        whitening_sha256=hashlib.sha256(whitening).hexdigest() if whitening else None,
    )
    return ExportJob(checkpoint, embedder, state, about, whitening, options, console, out), rounding


def _round_to_half(state: State, embedder: Embedder) -> tuple[State, float]:
    """Return the weights in float16 and the relative difference that this makes to embeddings; load the rounded weights
    into `embedder`. Raises WeightsError if a weight is too large."""
    before = golden_of(embedder.backbone, embedder.preprocessing)
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(f"--half: {name} holds values too large for float16 (above 65,504); leave --half out")
    embedder.backbone.load_state_dict(state)
    embedder.fingerprint = fingerprint(embedder.architecture, state, embedder.preprocessing)
    return state, before.difference(golden_of(embedder.backbone, embedder.preprocessing).embeddings)


@contextmanager
def _temporary(out: Path, format: Format, whitening: bytes | None) -> Iterator[Path]:
    """Yield a temporary file or folder that takes the name `out` on success; with a file, its whitening likewise."""
    if format.files:
        with whole_folder(out, format.files) as folder:
            yield folder
    else:
        with _whitening_written(out, whitening), whole_file(out) as file:
            yield file


def _siblings(out: Path) -> list[Path]:
    """Return exports beside `out` that share its whitening: x.onnx of x.safetensors, and vice versa."""
    others = (out.with_suffix(key) for key in FORMATS if key.startswith("."))
    return [path for path in others if path != out and path.exists()]


def _require_own_whitening(out: Path, whitening: bytes | None, overwrite: bool) -> None:
    """Raise UsageError if writing this whitening would replace that of a sibling."""
    beside = whitening_beside(out)
    if whitening is None or (beside.is_file() and beside.read_bytes() == whitening):
        return
    _refuse_shared_whitening(out)
    refuse_existing(beside, overwrite)


def _refuse_shared_whitening(out: Path) -> None:
    """Raise UsageError if the whitening beside `out` is that of a sibling."""
    beside = whitening_beside(out)
    if beside.exists() and (siblings := _siblings(out)):
        name = printable(siblings[0].name)
        raise UsageError(f"{printable(beside)}: belongs to {name}, which has other weights; choose another name")


@contextmanager
def _whitening_written(out: Path, whitening: bytes | None) -> Iterator[None]:
    """Write the whitening beside `out`; it takes its name after the body of the `with`. If there is none, remove that
    of an earlier export."""
    beside = whitening_beside(out)
    if whitening:
        with whole_file(beside) as temporary:
            temporary.write_bytes(whitening)
            yield
    else:
        yield
        if not _siblings(out):
            beside.unlink(missing_ok=True)

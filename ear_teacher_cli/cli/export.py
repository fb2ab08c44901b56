"""`earteach export-backbone` and `earteach verify`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config_fields import OPTIONS, Checked, ListOptions, option, shared
from ..console import Console
from ..errors import EarTeachError
from ..files import printable
from . import json_output
from .options import argument, command

if TYPE_CHECKING:
    from ..export.export import Export


@dataclass(frozen=True)
class ExportOptions(ListOptions):
    """Options of `export-backbone`."""

    features: bool = option(False, OPTIONS, "ONNX: output the feature maps, too.", switch=True)
    half: bool = option(False, OPTIONS, "Write weights as float16.", switch=True)
    ema: bool = option(
        True,
        OPTIONS,
        "Export the weights that were validated (the EMA, or mixed with the pretrained weights, if the run does that); "
        "--no-ema: those of the last optimiser step.",
    )
    val_metadata: str | None = option(
        None,
        OPTIONS,
        "Folder: images for mean and variance of the feature maps. Default: the run's validation list.",
        private=True,
    )
    consent: str | None = shared("consent")
    license: str | None = shared("license")
    batch_size: int = shared("batch_size", help="Folder: images per forward pass.")
    num_workers: int = shared("num_workers")
    json: str | None = shared("json")
    overwrite: bool = shared("overwrite")


@dataclass(frozen=True)
class VerifyOptions(Checked):
    """Options of `verify`."""

    against: str | None = option(
        None,
        OPTIONS,
        "Other weights of the same teacher (an export, a checkpoint, a run) to compare embeddings with.",
        metavar="WEIGHTS",
        private=True,
    )
    json: str | None = shared("json")
    overwrite: bool = shared("overwrite")


@command("export-backbone", example="earteach export-backbone ear_teacher/outputs/ear_teacher teacher.safetensors")
def export_backbone(
    checkpoint: Annotated[str, argument("CKPT", "A checkpoint, or an experiment folder (its best checkpoint).")],
    out: Annotated[
        str,
        argument(
            "OUT", "x.safetensors, x.onnx, or a folder that timm opens (local-dir:) and student models train from."
        ),
    ],
    options: ExportOptions,
    console: Console,
) -> None:
    """Write the backbone with timm's parameter names, and check it by loading it and comparing embeddings."""
    from ..export.export import export_backbone as export

    json_output.require_free(options.json, options.overwrite, checkpoint, out)
    made = export(
        checkpoint,
        out,
        options.overwrite,
        features=options.features,
        half=options.half,
        ema=options.ema,
        val_metadata=options.val_metadata,
        root_dir=options.root_dir,
        reading=options.reading,
        consent=options.consent,
        license=options.license,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        console=console,
    )
    console.info(_described(made))
    json_output.write(options.json, _plain(asdict(made)))


@command("verify", example="earteach verify teacher.onnx --against teacher.safetensors")
def verify(
    export: Annotated[str, argument("EXPORT", "A .safetensors, a .onnx or a folder of export-backbone.")],
    options: VerifyOptions,
    console: Console,
) -> None:
    """Check an export on this machine: every byte, weights, fingerprint, golden batch."""
    from ..export import verify as verification

    json_output.require_free(options.json, options.overwrite, export, options.against)
    checks = verification.verify(export, options.against)
    wrong = [check.what for check in checks if check.passed is False]
    if options.json != "-":
        width = max(len(check.what) for check in checks)
        for check in checks:
            typer.echo(f"{verification.MARKS[check.passed]:<6} {check.what:<{width}}  {check.found}")
    passed = {"export": export, "against": options.against, "passed": not wrong}
    json_output.write(options.json, passed | {"checks": [asdict(check) for check in checks]})
    if wrong and wrong[0].startswith("against "):
        raise EarTeachError(
            f"{printable(export)}: is intact, but differs from {printable(options.against)}; check which one you want"
        )
    if wrong:
        raise EarTeachError(f"{printable(export)}: is damaged or changed ({', '.join(wrong)}); export it again")


def _described(made: "Export") -> str:
    kind = "compared with torch in onnxruntime" if made.kind == "onnx" else "loaded back into timm strictly"
    return (
        f"{printable(made.path)}: {made.architecture}, {made.tensors} tensors, {made.embedding_dim} numbers an image; "
        f"{kind}, largest difference {made.difference:.2g}"
        + (f"; maps of strides {', '.join(map(str, made.maps))}" if made.maps else "")
        + (
            f"; float16 changes the embeddings by {made.rounding:.2g} of the largest"
            if made.rounding is not None
            else ""
        )
        + (f"; its whitening: {printable(made.whitening.name)}" if made.whitening else "")
        + f"; fingerprint {made.fingerprint[:16]}"
    )


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Return paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in content.items()}

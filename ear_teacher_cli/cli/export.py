"""`earteach export-backbone` and `earteach verify`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from ..command_config import ExportConfig
from ..config_fields import OPTIONS, Checked, option, shared
from ..console import Console
from ..errors import EarTeachError
from ..files import printable
from . import json_output
from .options import argument, command


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
    config: ExportConfig,
    console: Console,
) -> None:
    """Write the backbone with timm's parameter names, and check it by loading it and comparing embeddings."""
    from ..export.export import describe
    from ..export.export import export_backbone as export

    json_output.require_free(config.json, config.overwrite, checkpoint, out)
    made = export(checkpoint, out, config, console)
    console.info(describe(made))
    json_output.write(config.json, made.as_dict())


@command("verify", example="earteach verify teacher.onnx --against teacher.safetensors")
def verify(
    export: Annotated[str, argument("EXPORT", "A .safetensors file, .onnx file or folder written by export-backbone.")],
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
    json_output.write(options.json, passed | {"checks": [check.as_dict() for check in checks]})
    if wrong and wrong[0].startswith("against "):
        raise EarTeachError(
            f"{printable(export)}: is intact, but differs from {printable(options.against)}; check which one you want"
        )
    if wrong:
        raise EarTeachError(f"{printable(export)}: is damaged or changed ({', '.join(wrong)}); export it again")

"""`earteach validate-data`."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..command_config import ValidateConfig
from ..config import TrainConfig
from ..console import Console, counted
from ..files import printable
from . import json_output
from .options import argument, command

if TYPE_CHECKING:
    from ..data.audit import Report


@command("validate-data", example="earteach validate-data train.npy val.npy --contact-sheet worst.png")
def validate_data(
    config: ValidateConfig,
    console: Console,
    manifests: Annotated[
        list[str] | None,
        argument(
            "MANIFEST",
            "Manifests (.npy, .csv, .jsonl, COCO .json) or folders of crops. Default: the training and validation "
            "manifests.",
        ),
    ] = None,
) -> None:
    """Decode every image and check every box; exit code 1 if there are errors."""
    from ..data import audit

    sources = manifests or [TrainConfig.train_metadata, TrainConfig.val_metadata]
    report = audit.validate_data(sources, config, console)
    if config.json == "-":
        json_output.write("-", report.as_dict())
    else:
        _print_report(report, audit.ERRORS | audit.WARNINGS)
    raise typer.Exit(1 if report.errors else 0)


def _print_report(report: "Report", meanings: dict[str, str]) -> None:
    """Print the findings by reason, with rows and paths of the first few (--json has all)."""
    for reason, group in report.by_reason().items():
        kind = "error  " if group[0].is_error else "warning"
        typer.echo(f"{kind} {reason}: {len(group)} ({meanings[reason]})")
        for finding in group[:5]:
            place = (
                ""
                if finding.row is None
                else f"{printable(finding.manifest)} row {finding.row} ({printable(finding.path)}): "
            )
            typer.echo(f"    {place}{printable(finding.detail)}" + (f"; as {finding.other}" if finding.other else ""))
        if len(group) > 5:
            typer.echo(f"    and {len(group) - 5} more (--json FILE lists all)")
    typer.echo(
        f"{counted(report.rows, 'row')}, {counted(report.images, 'image')}: {counted(report.errors, 'error')}, "
        f"{counted(report.warnings, 'warning')}"
    )

"""`earteach validate-data`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import TrainConfig
from ..config_fields import OPTIONS, ListOptions, option, shared
from ..console import Console
from ..files import printable
from . import json_output
from .options import argument, command

if TYPE_CHECKING:
    from ..data.audit import Report


@dataclass(frozen=True)
class ValidateOptions(ListOptions):
    """Options of `validate-data`."""

    json: str | None = shared("json")
    contact_sheet: str | None = option(
        None, OPTIONS, "Draw photos with their boxes, and the worst crops.", metavar="FILE.png", private=True
    )
    write_clean: str | None = option(
        None,
        OPTIONS,
        "Write the manifest without the rows that have errors (.npy, .csv, .jsonl).",
        metavar="FILE",
        private=True,
    )
    card: str | None = option(
        None,
        OPTIONS,
        "Write a data card: contents of the lists, errors found, consent, licence.",
        metavar="FILE.md",
        private=True,
    )
    consent: str | None = shared("consent")
    license: str | None = shared("license")
    num_workers: int = shared("num_workers")
    overwrite: bool = shared("overwrite")


@command("validate-data", example="earteach validate-data train.npy val.npy --contact-sheet worst.png")
def validate_data(
    options: ValidateOptions,
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

    report = audit.validate_data(
        manifests or [TrainConfig.train_metadata, TrainConfig.val_metadata],
        console,
        root_dir=options.root_dir,
        reading=options.reading,
        json_file=options.json,
        contact_sheet=options.contact_sheet,
        write_clean=options.write_clean,
        card=options.card,
        consent=options.consent,
        license=options.license,
        num_workers=options.num_workers,
        overwrite=options.overwrite,
    )
    if options.json == "-":
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
    typer.echo(f"{report.rows} rows, {report.images} images: {report.errors} errors, {report.warnings} warnings")

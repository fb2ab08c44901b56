"""`earteach evaluate`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from ..command_config import EvaluateConfig
from ..config_fields import OPTIONS, Checked, option
from ..console import Console
from ..errors import UsageError
from ..files import printable
from . import json_output
from .options import argument, command


@dataclass(frozen=True)
class CompareOptions(Checked):
    """The option of `evaluate` that takes the place of its first argument."""

    compare: tuple[str, str] | None = option(
        None,
        OPTIONS,
        "Instead of EMBEDDINGS: two files. Reports B minus A on the images that both have, from the same resamples.",
        metavar="A B",
        private=True,
    )


@command("evaluate", example="earteach evaluate teacher.npy eval.csv --plots plots --sheet look-alikes.png")
def evaluate(
    comparison: CompareOptions,
    config: EvaluateConfig,
    console: Console,
    embeddings: Annotated[
        str | None,
        argument(
            "EMBEDDINGS",
            "A file written by embed (.npy, .npz, .csv); with --weights a folder, a manifest or a list of images (-).",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        argument(
            "LABELS",
            "A manifest with identities, for example a CSV of image_path,identity[,side]. Default: the manifest that "
            "was embedded, else the names of the images' folders (identity/image.jpg).",
        ),
    ] = None,
) -> None:
    """Score embeddings by identity: rank-k, mAP@R, AUC, EER, TAR at a FAR.

    Rank-k and mAP@R look for each image's nearest other images; AUC, EER and TAR use all pairs. Duplicates are left
    out. Intervals come from a bootstrap over people. `--compare A B [LABELS]` scores the difference of two files; it is
    significant if its interval excludes 0.
    """
    if comparison.compare is not None:
        if labels is not None:
            raise UsageError(
                f"--compare: {printable(embeddings)} is one file too many; give `--compare A B` and at most LABELS"
            )
        sources, labels = list(comparison.compare), embeddings
    elif embeddings is not None:
        sources = [embeddings]
    else:
        raise UsageError("EMBEDDINGS: missing; give a file written by embed, or two files with --compare")
    from ..quality import evaluate as evaluation

    report = evaluation.evaluate(sources, labels, config, console)
    if config.json == "-":
        json_output.write("-", report.as_dict())
    else:
        typer.echo(evaluation.table(report))

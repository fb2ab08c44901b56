"""`report`: a run's folder in, one self-contained page out."""

from pathlib import Path

from .. import run_folder
from ..console import Console
from ..errors import EarTeachError, UsageError
from ..files import has_writer, printable, refuse_existing
from .summary import summarise_run, write_report


def report(
    run: str | Path,
    console: Console,
    out: str | Path | None = None,
    *,
    root_dir: str | None = None,
    images: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the page; default `report.html` in the run's folder, which is replaced. Raises EarTeachError."""
    folder = Path(run)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise EarTeachError(f"{printable(folder)}: {found}; give the folder of a run")
    if out is not None:
        if Path(out).suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"{printable(out)}: the report is HTML; name a .html file")
        refuse_existing(out, overwrite)
    story = summarise_run(folder, console, root_dir, has_writer(folder))
    return write_report(
        story, Path(out) if out else folder / run_folder.REPORT, images and story.config.images, console
    )

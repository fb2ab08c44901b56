"""`report`, and what a run writes when training is over: from a run to one self-contained page."""

from pathlib import Path

from .. import run_folder
from ..console import Console
from ..distributed import is_first_process
from ..errors import EarTeachError, UsageError
from ..files import has_writer, printable, refuse_existing, shell_word, whole_file
from ..training.loggers import log_hyperparameters
from ..training.run import Outcome
from .page import render
from .projector import write_projector
from .summary import Kept, RunSummary, summarise_run


def report(
    run: str | Path,
    console: Console,
    out: str | Path | None = None,
    *,
    root_dir: str | None = None,
    images: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the page of a run; default `report.html` in its folder, which is replaced. Raises EarTeachError."""
    folder = Path(run)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise EarTeachError(f"{printable(folder)}: {found}; give the folder of a run")
    if out is not None:
        if Path(out).suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"{printable(out)}: the report is HTML; name a .html file")
        refuse_existing(out, overwrite)
    summary = summarise_run(folder, console, root_dir, has_writer(folder))
    return write_page(summary, Path(out) if out else folder / run_folder.REPORT, images, console)


def write_page(summary: RunSummary, out: Path, images: bool, console: Console) -> Path:
    """Write the page. Without `images` here or in the run's options it has no image of an ear and no name of a person."""
    content = render(summary, images and summary.config.images, console)
    with whole_file(out) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return out


def write_final_outputs(outcome: Outcome, console: Console) -> Path | None:
    """Write what a run ends with: hyper-parameters and embeddings in TensorBoard, and the report. Return its path.

    The run is complete without them: a failure is a warning. Nothing is written for an interrupted run, and nothing
    new for one that was complete already.
    """
    folder = outcome.experiment
    if outcome.interrupted or not is_first_process():
        return None
    if outcome.module is None:  # nothing was trained
        return path if (path := folder / run_folder.REPORT).is_file() else None
    again = f"The run is complete; `earteach report {shell_word(folder)}` tries the report again"
    try:
        return _write_final_outputs(outcome, console)
    except (EarTeachError, OSError, ValueError, RuntimeError) as error:
        console.warn(f"{error}. {again}")
    except KeyboardInterrupt:  # the last epoch is saved: nothing is lost
        console.warn(f"interrupted. {again}")
    return None


def _write_final_outputs(outcome: Outcome, console: Console) -> Path | None:
    folder, config = outcome.experiment, outcome.config
    assert config is not None and outcome.logger is not None
    if rows := run_folder.read_metrics(folder / run_folder.METRICS):
        log_hyperparameters(outcome.logger, config, [name for name, value in rows[-1].items() if value])
    if not config.report and not config.projector:
        return None
    summary = summarise_run(folder, console, config=config, kept=_kept(outcome))
    if config.projector and summary.embeddings:
        write_projector(outcome.logger.experiment, summary.embeddings, config.images, summary.epoch)
    return write_page(summary, folder / run_folder.REPORT, True, console) if config.report else None


def _kept(outcome: Outcome) -> Kept | None:
    """Return the validation embeddings that the run has in memory; None if it lacks those of its best epoch or of the
    initial weights, as a resumed run may."""
    assert outcome.module is not None and outcome.data is not None and outcome.data.val_set is not None
    best, baseline = outcome.best_embeddings, outcome.module.baseline_embeddings
    return Kept(outcome.data.val_set.manifest, best, baseline) if best and baseline else None

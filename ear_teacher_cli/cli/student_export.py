"""The export that ends a distillation, also a resumed one.

A file of the run records what it exported, so that it may replace that, and nothing else, without --overwrite.
"""

from pathlib import Path

from .. import run_folder
from ..command_config import ExportConfig
from ..config_files import read_config
from ..console import Console
from ..distill_config import DistillConfig
from ..distributed import is_first_process
from ..errors import EarTeachError
from ..files import shell_word


def require_free(run: Path) -> None:
    """Raise UsageError if `run`, an experiment or one of its checkpoints, distils a student whose OUT exists and may not be
    replaced: now, and not after the training."""
    folder = run if run.is_dir() else run.resolve().parent.parent
    config = read_config(folder / run_folder.CONFIG) if (folder / run_folder.CONFIG).is_file() else None
    if isinstance(config, DistillConfig) and config.out and is_first_process():
        from ..export import export

        export.require_free(config.out, _may_replace(config, folder))


def write(folder: Path, config: DistillConfig, console: Console, trained: bool) -> list[str]:
    """Export the student of a finished run, on the first process; return the commands that come next.

    `trained`: the run did something in this call; if not, an export of an earlier one is left as it is.
    """
    named, out = shell_word(folder), shell_word(config.out)
    if not is_first_process():
        return []
    if not config.out:  # distilled by the Python API
        return [f"earteach export-backbone {named} student.safetensors"]
    if trained or not Path(config.out).exists():
        from ..export import export

        options = ExportConfig(overwrite=_may_replace(config, folder))
        try:
            made = export.export_backbone(folder, config.out, options, console)
        except EarTeachError as error:
            raise EarTeachError(
                f"{error}. The student is trained: `earteach export-backbone {named} OTHER` writes it elsewhere"
            ) from error
        console.info(export.describe(made))
        (folder / run_folder.EXPORTED).write_text(_digest(config.out), encoding="utf-8")
    return [f"earteach verify {out}", f"earteach embed photos/ out.npy --weights {out}"]


def _may_replace(config: DistillConfig, folder: Path) -> bool:
    """Return whether OUT was given up with --overwrite, or is an earlier export of this run."""
    record = folder / run_folder.EXPORTED
    if config.replace_out or not record.is_file() or not Path(config.out).exists():
        return config.replace_out
    return record.read_text(encoding="utf-8") == _digest(config.out)


def _digest(out: str) -> str:
    """Return the sha256 of an export's weights; '' if they are not there."""
    from ..export.export import weights_of
    from ..model.weights import sha256_of

    weights = weights_of(out)
    return sha256_of(weights) if weights.is_file() else ""

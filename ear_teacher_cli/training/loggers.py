"""Who is told the figures of a run beside metrics.csv: TensorBoard's events, and by name W&B or MLflow."""

import os
import secrets
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import custom_scalars, hparams

from ..config import MONITORS, TrainConfig
from ..distributed import is_first_process
from ..errors import ConfigError
from ..files import whole_file

PROJECT = "earteach"
# Charts that belong together, in TensorBoard's tab of custom scalars.
_LAYOUT = {
    "Is it collapsing?": {
        "spread": ["Multiline", [r"val/spread$"]],
        "effective rank": ["Multiline", [r"val/effective_rank$"]],
        "mean absolute cosine": ["Multiline", [r"val/abs_cosine$"]],
        "pseudo-classes": ["Multiline", [r"classes/in_use$", r"classes/entropy$", r"classes/nmi$"]],
    },
    "Is it learning?": {
        "quality, %": ["Multiline", [r"val/retrieval$", r"val/rank1$", r"val/eer$"]],
        "loss": ["Multiline", [r"train/loss$", r"val/loss$"]],
        "reconstruction": ["Multiline", [r"train/recon_loss$", r"val/recon_loss$"]],
        "PSNR, dB": ["Multiline", [r"val/psnr$"]],
    },
}


# What a run came to, in the table of runs.
_OUTCOME = (*MONITORS, "val/spread", "val/effective_rank")


class _StepsDone:
    """Count steps as metrics.csv does, those that are done: Lightning gives the metrics of an epoch its last step, counted
    from 0. What earteach logs itself (without an epoch among the metrics) stays as it is."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step if step is None or "epoch" not in metrics else step + 1)  # type: ignore[misc]


class Events(_StepsDone, TensorBoardLogger):
    """TensorBoard's events alone. Lightning's hparams.yaml would say what config.toml does, and is not written whole."""

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()


class _Wandb(_StepsDone, WandbLogger):
    pass


class _MLFlow(_StepsDone, MLFlowLogger):
    pass


def events(config: TrainConfig, version: str | None, purge_step: int | None) -> Events:
    """`version`: of a run that is resumed after `purge_step` steps; later events are taken out of TensorBoard's view."""
    # flush_secs: a signal that comes while an event is put into its queue may leave the writer asleep until it flushes,
    # by default for two minutes, and the run would wait for it
    logger = Events(
        config.output_dir,
        config.experiment_name,
        default_hp_metric=False,
        version=version,
        purge_step=None if purge_step is None else purge_step + 1,
        flush_secs=5,
    )
    if version is None and is_first_process():
        logger.experiment._get_file_writer().add_summary(custom_scalars(_LAYOUT))
    return logger


def require(config: TrainConfig) -> None:
    """Raises ConfigError where the package of the logger that was asked for is not installed."""
    found = find_spec(config.logger)
    if found is None or found.origin is None:  # a folder of that name, which W&B itself leaves, is no package
        raise ConfigError(
            "logger", f"{config.logger} is not installed", f"pip install {config.logger}, or leave --logger out"
        )


def others(config: TrainConfig, folder: Path) -> list[Logger]:
    """The logger that was asked for by name. A run that is gone on with goes on there too: `folder` keeps its mark."""
    if config.logger == "tensorboard":
        return []
    mark = folder / f"{config.logger}.txt"
    begun = mark.is_file()
    logger, known = _by_name(config, mark.read_text(encoding="utf-8").strip() if begun else None)
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(mark) as temporary:
            temporary.write_text(f"{known}\n", encoding="utf-8")
        if not begun:  # MLflow lets none change
            logger.log_hyperparams(config.loggable())
    return [logger]


def _by_name(config: TrainConfig, known: str | None) -> tuple[Logger, str]:
    """(the logger, the mark of its run), of the run with the mark `known` if there is one."""
    name = config.experiment_name
    if config.logger == "wandb":
        known = known or secrets.token_hex(4)
        where = str(config.experiment_dir)
        # what is printed names paths, and the code is not W&B's matter
        quiet = {"console": "off", "disable_git": True, "save_code": False}
        logger = _Wandb(name=name, save_dir=where, project=PROJECT, id=known, resume="allow", settings=quiet)
        return logger, known
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.experiment_dir.absolute()}/mlflow.db"
    logger = _MLFlow(experiment_name=PROJECT, run_name=name, tracking_uri=uri, run_id=known)
    return logger, str(logger.run_id) if is_first_process() else str(known)


def log_hyperparameters(logger: Events, config: TrainConfig, figures: Iterable[str]) -> None:
    """The options of the recipe, for TensorBoard's table of runs, beside the last values of `figures` (names of scalars)."""
    shown = {name: 0.0 for name in figures if name in _OUTCOME}  # the values are those of the scalars themselves
    for summary in hparams(config.loggable(), shown):
        logger.experiment._get_file_writer().add_summary(summary)
    logger.experiment.flush()

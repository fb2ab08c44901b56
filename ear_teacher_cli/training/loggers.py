"""Where metrics are logged besides metrics.csv: TensorBoard's event files, and W&B or MLflow if chosen."""

import os
import secrets
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import custom_scalars, hparams

from .. import metrics_catalogue
from ..config import TrainConfig
from ..distributed import is_first_process
from ..errors import ConfigError
from ..files import whole_file

PROJECT = "earteach"


class _StepsDone:
    """Log the number of completed steps, as metrics.csv does.

    Lightning logs the metrics of an epoch with the index of its last step. Metrics that earteach logs itself (without an
    epoch among them) are logged with the step given.
    """

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step if step is None or "epoch" not in metrics else step + 1)  # type: ignore[misc]


class Events(_StepsDone, TensorBoardLogger):
    """TensorBoard's event files only.

    Lightning's hparams.yaml would repeat config.toml, and is not written atomically.
    """

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()


class _Wandb(_StepsDone, WandbLogger):
    pass


class _MLFlow(_StepsDone, MLFlowLogger):
    pass


def _layout() -> dict[str, dict[str, list[Any]]]:
    """Return the charts of the catalogue as TensorBoard takes them: by regular expressions."""
    return {
        group: {title: ["Multiline", [f"{key}$" for key in keys]] for title, keys in charts.items()}
        for group, charts in metrics_catalogue.charts().items()
    }


def events(config: TrainConfig, version: str | None, purge_step: int | None) -> Events:
    """Return the TensorBoard logger of a run.

    `version`: that of a run that is resumed after `purge_step` steps; TensorBoard then hides events of later steps.
    """
    # flush_secs: a signal that arrives while an event is put into the queue can leave the writer asleep until its next
    # flush, by default two minutes, and the run would wait for it
    logger = Events(
        config.output_dir,
        config.experiment_name,
        default_hp_metric=False,
        version=version,
        purge_step=None if purge_step is None else purge_step + 1,
        flush_secs=5,
    )
    if version is None and is_first_process():
        logger.experiment._get_file_writer().add_summary(custom_scalars(_layout()))
    return logger


def require(config: TrainConfig) -> None:
    """Raise ConfigError if the package of the chosen logger is not installed."""
    found = find_spec(config.logger)
    if found is None or found.origin is None:  # a folder of that name, which W&B creates, is not the package
        raise ConfigError(
            "logger", f"{config.logger} is not installed", f"pip install {config.logger}, or leave --logger out"
        )


def extra_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """Return the chosen logger besides TensorBoard. A resumed run continues there: `folder` holds the ID of its run."""
    if config.logger == "tensorboard":
        return []
    id_file = folder / f"{config.logger}.txt"
    begun = id_file.is_file()
    logger, run_id = _by_name(config, id_file.read_text(encoding="utf-8").strip() if begun else None)
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(id_file) as temporary:
            temporary.write_text(f"{run_id}\n", encoding="utf-8")
        if not begun:  # MLflow does not allow a change
            logger.log_hyperparams(config.loggable())
    return [logger]


def _by_name(config: TrainConfig, run_id: str | None) -> tuple[Logger, str]:
    """Return the logger and the ID of its run: `run_id`, or that of a new run."""
    name = config.experiment_name
    if config.logger == "wandb":
        run_id = run_id or secrets.token_hex(4)
        where = str(config.experiment_dir)
        # output would hold paths; the code is not sent
        quiet = {"console": "off", "disable_git": True, "save_code": False}
        logger = _Wandb(name=name, save_dir=where, project=PROJECT, id=run_id, resume="allow", settings=quiet)
        return logger, run_id
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.experiment_dir.absolute()}/mlflow.db"
    logger = _MLFlow(experiment_name=PROJECT, run_name=name, tracking_uri=uri, run_id=run_id)
    return logger, str(logger.run_id) if is_first_process() else str(run_id)


def log_hyperparameters(logger: Events, config: TrainConfig, logged: Iterable[str]) -> None:
    """Log the options of the recipe and the last values of the metrics `logged` (keys) for TensorBoard's table of runs."""
    shown = {
        key: 0.0 for key in logged if key in metrics_catalogue.outcomes()
    }  # the values are those of the scalars themselves
    for summary in hparams(config.loggable(), shown):
        logger.experiment._get_file_writer().add_summary(summary)
    logger.experiment.flush()

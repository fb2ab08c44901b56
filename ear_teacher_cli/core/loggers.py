"""Who is told the figures of a run beside metrics.csv: TensorBoard's events, and by name W&B or MLflow."""

import os
import secrets
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import custom_scalars, hparams

from ..config import ENVIRONMENT, MONITORS, TrainConfig
from ..errors import ConfigError
from ..files import whole_file
from ..machine import is_first_process

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


class Events(TensorBoardLogger):
    """TensorBoard's events alone. Lightning's hparams.yaml would say what config.toml does, and is not written whole;
    hyper-parameters are told when there are figures to go with them (`log_hyperparameters`)."""

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


class _MLFlow(MLFlowLogger):
    """Lightning's, which a run that is gone on with tells its hyper-parameters again; MLflow lets none change."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.begun = options["run_id"] is not None

    def log_hyperparams(self, params: Any) -> None:
        if not self.begun:
            super().log_hyperparams(params)


def events(config: TrainConfig, version: str | None, purge_step: int | None) -> Events:
    """`version`: of a run that is gone on with at `purge_step`; later events are taken out of TensorBoard's view."""
    logger = Events(
        config.output_dir, config.experiment_name, default_hp_metric=False, version=version, purge_step=purge_step
    )
    if version is None and is_first_process():
        logger.experiment._get_file_writer().add_summary(custom_scalars(_LAYOUT))
    return logger


def require(config: TrainConfig) -> None:
    """Raises ConfigError where the package of the logger that was asked for is not installed."""
    names = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow",)}[config.logger]
    if not any(find_spec(name) for name in names):
        raise ConfigError(
            "logger", f"{config.logger} is not installed", f"pip install {config.logger}, or leave --logger out"
        )


def others(config: TrainConfig, folder: Path) -> list[Logger]:
    """The logger that was asked for by name. A run that is gone on with goes on there too: `folder` keeps its mark."""
    if config.logger == "tensorboard":
        return []
    mark = folder / f"{config.logger}.txt"
    known = mark.read_text(encoding="utf-8").strip() if mark.is_file() else None
    where, name = str(config.experiment_dir), config.experiment_name
    if config.logger == "wandb":
        known = known or secrets.token_hex(4)
        logger: Any = WandbLogger(name=name, save_dir=where, project=PROJECT, id=known, resume="allow")
    else:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.experiment_dir.absolute()}/mlflow.db"
        logger = _MLFlow(experiment_name=PROJECT, run_name=name, tracking_uri=uri, run_id=known)
        known = logger.run_id if is_first_process() else known
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(mark) as temporary:
            temporary.write_text(f"{known}\n", encoding="utf-8")
    return [logger]


def log_hyperparameters(logger: Events, config: TrainConfig, figures: Iterable[str]) -> None:
    """The options that teach, for TensorBoard's table of runs, beside the last values of `figures` (names of scalars)."""
    told = {
        spec.name: value
        for spec in fields(config)
        if spec.metadata["panel"] in ("Data", "Model", "Training")
        and spec.name not in ENVIRONMENT
        and (value := getattr(config, spec.name)) is not None
    }
    shown = {name: 0.0 for name in figures if name in _OUTCOME}  # the values are those of the scalars themselves
    for summary in hparams(told, shown):
        logger.experiment._get_file_writer().add_summary(summary)
    logger.experiment.flush()

"""Ear teacher: learn ear features from unlabelled photographs, then hand them on.

The command line is `earteach` (cli/). The Python API is what the names below resolve to; they are looked up when
first used, so that importing the package costs nothing:

    from ear_teacher_cli import EarDataModule, EarTeacherLightningModule
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data.crop import load_crop
    from .data.datamodule import EarDataModule
    from .data.preprocessing import normalise
    from .embedding.embedder import load_backbone, load_embedder
    from .errors import EarTeachError
    from .training.module import EarTeacherLightningModule

__version__ = "0.2.0"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before timm loads it: nothing is sent anywhere

__all__ = [
    "EarDataModule",
    "EarTeachError",
    "EarTeacherLightningModule",
    "TrainConfig",
    "load_backbone",
    "load_crop",
    "load_embedder",
    "normalise",
]

_HOME = {
    "EarDataModule": ".data.datamodule",
    "EarTeacherLightningModule": ".training.module",
    "EarTeachError": ".errors",
    "TrainConfig": ".config",
    "load_backbone": ".embedding.embedder",
    "load_embedder": ".embedding.embedder",
    "load_crop": ".data.crop",
    "normalise": ".data.preprocessing",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)

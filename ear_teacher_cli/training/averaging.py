"""The weights that are validated, saved and exported, where they are not those that are trained: a moving average, and
an interpolation with the pretrained baseline.

Lightning's WeightAveraging is not used: resuming with it is not exact, and it does not interpolate.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

Tensors = dict[str, torch.Tensor]


class Averages(Callback):
    """Put the averaged weights into the module for validation and for checkpoints, and at the end of training.

    `ema_decay`: decay of an exponential moving average of all weights and batch-norm statistics, updated each step;
    0: none. `baseline_weight`: of the backbone, this share of its weights before training and the rest of the average
    (WiSE-FT, Wortsman et al. 2022, eq. 1). A checkpoint's `state_dict` has the result, its `learning_state` the weights
    that training continues with.
    """

    def __init__(self, ema_decay: float, baseline_weight: float):
        self.ema_decay, self.baseline_weight = ema_decay, baseline_weight
        self.baseline: Tensors = {}  # the backbone's tensors before training
        self.average: Tensors = {}
        self.learning: Tensors = {}  # the weights that are trained, while the result is in their place
        self.step = 0
        self.round: int | None = None  # of pseudo-labels, that the averaged prototypes belong to

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 and self.baseline_weight:
            self.baseline = {k: v for k, v in _copies(pl_module).items() if k.startswith("model.backbone.")}
        for tensors in (self.baseline, self.average):  # a checkpoint's were loaded before the module moved
            tensors.update({k: v.to(pl_module.device) for k, v in tensors.items()})
        self.round = pl_module.pseudo_labels.round

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.round != pl_module.pseudo_labels.round:
            self.round = pl_module.pseudo_labels.round
            self.average.pop("prototypes", None)  # those of the round before belong to other classes

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ema_decay and trainer.global_step > self.step:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))  # in the first steps it follows closely
            for name, tensor in _changing(pl_module).items():
                if name in self.average:
                    self.average[name].lerp_(tensor, 1 - decay)
                else:
                    self.average[name] = tensor.clone()
        self.step = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.learning = _copies(pl_module)
            _put(pl_module, self._result(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.learning:
            _put(pl_module, self.learning)
            self.learning = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _put(pl_module, self._result(pl_module))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["learning_state"] = checkpoint["state_dict"]
        checkpoint["averages"] = {"start": self.baseline, "average": self.average}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._result(pl_module)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        pl_module.load_state_dict(checkpoint["learning_state"])
        self.baseline, self.average = (
            {k: v.to(pl_module.device, copy=True) for k, v in checkpoint["averages"][name].items()}
            for name in ("start", "average")
        )
        self.step = checkpoint["global_step"]

    @torch.no_grad()
    def _result(self, module: pl.LightningModule) -> Tensors:
        """Return copies of the weights to validate and save."""
        result = _copies(module) | {k: v.clone() for k, v in self.average.items()}
        for name, baseline in self.baseline.items():
            result[name].lerp_(baseline.to(result[name]), self.baseline_weight)
        return result


def _changing(module: pl.LightningModule) -> Tensors:
    """Return the floating-point tensors that training may change: weights and batch-norm statistics, no counters, nothing
    frozen."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {k: v.detach() for k, v in module.state_dict().items() if v.is_floating_point() and k not in frozen}


def _copies(module: pl.LightningModule) -> Tensors:
    return {k: v.clone() for k, v in _changing(module).items()}


@torch.no_grad()
def _put(module: pl.LightningModule, tensors: Tensors) -> None:
    """Copy tensors into the module's of the same name."""
    state = module.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)

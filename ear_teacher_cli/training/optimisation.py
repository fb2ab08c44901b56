"""AdamW with its groups of parameters, and the learning rate: linear warm-up, then a cosine to the end of the run."""

import math
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..config import TrainConfig


def rate_at(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the share of the peak learning rate in optimiser step `step` (from 0), in (0, 1].

    Warm-up: (step + 1) / warmup_steps. Then 0.5 * (1 + cos(pi * t)) with t from 0 at the first step after the
    warm-up to just under 1 at the last (SGDR, Loshchilov and Hutter 2017, eq. 5, one period, minimum 0).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))


def parameter_groups(module: nn.Module, backbone: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups over all trainable parameters of `module`.

    Weight decay applies to weights alone. The learning rate of each layer of `backbone` is that of the next one times
    `layer_decay` (BEiT, Bao et al. 2022, app. D), that of the rest is `head_lr_mult` times the learning rate.
    """
    if config.layer_decay == config.head_lr_mult == 1:
        return param_groups_weight_decay(module, config.weight_decay)
    inside = {id(p) for p in backbone.parameters()}
    layers = param_groups_layer_decay(backbone, config.weight_decay, layer_decay=config.layer_decay)
    rest = [(p, config.weight_decay if p.ndim > 1 else 0.0) for p in module.parameters() if id(p) not in inside]
    heads = [
        {"params": params, "weight_decay": decay, "lr_scale": config.head_lr_mult}
        for decay in sorted({d for _, d in rest})
        if (params := [p for p, d in rest if d == decay and p.requires_grad])
    ]
    groups = [{**group, "lr": config.learning_rate * group["lr_scale"]} for group in [*layers, *heads]]
    return [{k: v for k, v in group.items() if k in ("params", "weight_decay", "lr")} for group in groups]


def steps_to_shift(restored: dict[str, Any], batches_per_epoch: int, accumulate: int) -> int:
    """Return the steps to add to a resumed scheduler's count.

    On another number of devices an epoch has other steps: the schedule continues from the same epoch, not from the same
    step. `restored`: the `earteach` part of the checkpoint, whose steps are batches, with its `global_step`, whose steps
    are the optimizer's. `accumulate`: batches of an optimizer step; the last one of an epoch may have fewer.
    """
    if restored["steps_per_epoch"] == batches_per_epoch:
        return 0
    per_epoch = -(-batches_per_epoch // accumulate)
    done = restored["epochs_completed"] * per_epoch + restored.get("steps_done", 0) // accumulate
    return done - restored["global_step"]


def optimiser_and_schedule(
    module: nn.Module, backbone: nn.Module, config: TrainConfig, total_steps: int, shift: int
) -> dict[str, Any]:
    """Return AdamW and its schedule in Lightning's form. `shift`: see `steps_to_shift`."""
    optimizer = torch.optim.AdamW(parameter_groups(module, backbone, config), lr=config.learning_rate)
    warmup = int(total_steps * config.warmup / config.max_epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(max(0, step + shift), warmup, total_steps)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

"""One training step outside of a Trainer, to measure its time and memory."""

import torch

from ..config import TrainConfig
from ..data.dataset import Batch
from .module import EarTeacherLightningModule
from .objectives import ClassTargets


def one_step(module: EarTeacherLightningModule, batch: Batch, count: int) -> float:
    """Return the loss of a training step of the first epoch, forward and back, in the configuration's precision.

    `count`: number of pseudo-classes (at least 2 are used). Labels and prototypes are made up. Gradients are left in
    place.
    """
    config, device = module.config, module.device
    if module.distillation is not None:
        module.distillation.do_without_statistics()
    batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    classes = None
    if config.learns_classes:
        count = max(2, count)
        prototypes = torch.randn(count, config.projection_dim, device=device).requires_grad_()
        classes = ClassTargets(prototypes, torch.arange(len(batch["index"]), device=device) % count)
    kind = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(config.precision)
    with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
        loss = module.objective.training(module.training_outputs(batch, classes)).total
    loss.backward()
    return float(loss.detach())


def bytes_besides_a_step(module: EarTeacherLightningModule) -> int:
    """Return the bytes that a run allocates and `one_step` does not: AdamW's two moments, and averaged weights."""
    config = module.config
    copies = 2 + (config.ema_decay > 0) + (config.kept_share > 0)
    return 4 * copies * sum(p.numel() for p in module.parameters() if p.requires_grad)


def trial_batch(config: TrainConfig, size: int) -> Batch:
    """Return a batch of `size` random images with the views that the configuration needs."""
    seeded = torch.Generator().manual_seed(config.seed)
    names = ["pixels", *(["view"] if config.views == 2 else []), *(["clean"] if config.needs_clean_view else [])]
    shape = (size, 3, config.load_size, config.load_size)
    images = {name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded) for name in names}
    return {"index": torch.arange(size), **images}

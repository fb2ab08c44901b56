"""Fine-tuning with early stages frozen and batch-norm statistics kept.

A backbone fine-tuned on few images loses part of what its pretraining learned, which shows on images of other cameras.
Frozen early stages, kept batch-norm statistics and learning rates that fall towards the stem limit this.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError


def freeze_to_stride(backbone: nn.Module, stride: int) -> None:
    """Freeze every parameter up to the last stage whose stride is at most `stride` pixels; 0 freezes none.

    Raises ConfigError if timm lists no such stage of this backbone, or if it is the last one.
    """
    if stride == 0:
        return
    stages = [stage["module"] for stage in getattr(backbone, "feature_info", []) if stage["reduction"] <= stride]
    names = [name for name, _ in backbone.named_parameters()]  # in the order of the forward pass
    inside = [i for i, name in enumerate(names) if stages and name.startswith(f"{stages[-1]}.")]
    if not inside or inside[-1] == len(names) - 1:
        raise ConfigError("freeze_stride", f"{stride} ends no early stage of this backbone", "choose another, or 0")
    for number, parameter in enumerate(backbone.parameters()):
        parameter.requires_grad_(number > inside[-1])


def keep_statistics(backbone: nn.Module, everywhere: bool) -> None:
    """Put batch normalisation of frozen layers (`everywhere`: of all layers) into evaluation mode: it normalises by its
    stored statistics and does not update them."""
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            frozen = module.weight is not None and not module.weight.requires_grad
            module.train(backbone.training and not (everywhere or frozen))

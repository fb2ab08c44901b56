"""Learning gently from a pretrained start: what stays as it is, and how fast the rest may move.

A backbone that is fine-tuned on few images forgets what its pretraining gave it, and that shows on the next
camera. Early stages kept, batch-norm statistics kept, and a learning rate that falls towards the stem are the
three brakes.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError


def freeze_to_stride(backbone: nn.Module, stride: int) -> None:
    """Stop the gradient of every parameter up to the last stage whose stride is at most `stride`; 0 stops none.

    Raises ConfigError if timm knows no such stage of this backbone.
    """
    if stride == 0:
        return
    stages = [stage["module"] for stage in getattr(backbone, "feature_info", []) if stage["reduction"] <= stride]
    names = [name for name, _ in backbone.named_parameters()]  # in the order of the forward pass
    inside = [i for i, name in enumerate(names) if stages and name.startswith(f"{stages[-1]}.")]
    if not inside or inside[-1] == len(names) - 1:
        raise ConfigError("freeze_stride", f"{stride} ends no early stage of this backbone", "choose another, or 0")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(names.index(name) > inside[-1])


def keep_statistics(backbone: nn.Module, everywhere: bool) -> None:
    """Batch normalisation of frozen layers (`everywhere`: of all) normalises by, and keeps, its stored statistics."""
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            frozen = module.weight is not None and not module.weight.requires_grad
            module.train(backbone.training and not (everywhere or frozen))

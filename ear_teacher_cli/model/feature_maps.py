"""Feature maps of a backbone, as timm returns them, and their mean and variance per channel, for distillation."""

from collections.abc import Iterable
from dataclasses import dataclass

import timm
import torch
from torch import nn

from ..errors import WeightsError
from .teacher import input_size_argument


@dataclass(frozen=True)
class MapStatistics:
    """One feature map: its `name` in timm, `stride` in pixels, and the mean and variance of each channel, [C]."""

    name: str
    stride: int
    channels: int
    mean: list[float]
    variance: list[float]


def map_model(backbone: nn.Module, architecture: str, image_size: int) -> nn.Module:
    """Build timm's `features_only` model with the weights of `backbone`, on the CPU.

    It maps normalised B,3,H,W to a list of B,C,H/stride,W/stride, fine to coarse. timm only logs the keys that it does
    not know; here every tensor must come from the backbone. Raises WeightsError if timm has no maps of this model.
    """
    size = input_size_argument(architecture, image_size)
    try:
        maps = timm.create_model(architecture, pretrained=False, features_only=True, **size)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise WeightsError(f"{architecture}: timm gives no feature maps of it; choose another backbone") from error
    # FeatureListNet renames stages.0.x to stages_0.x; wrappers put `model.` before it
    state = {key.replace(".", "_"): tensor for key, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        for key, tensor in maps.state_dict().items():
            plain = key.removeprefix("model.").replace(".", "_")
            if plain not in state or state[plain].shape != tensor.shape:
                raise WeightsError(f"{architecture}: the maps' {key} is not in the backbone; choose another backbone")
            tensor.copy_(state[plain])
    return maps.eval().requires_grad_(False)


@torch.inference_mode()
def statistics(maps: nn.Module, batches: Iterable[torch.Tensor]) -> list[MapStatistics]:
    """Compute the mean and variance of every channel over all positions of all images.

    `batches`: normalised images, B,3,H,W each. Returns an empty list if there are none.
    """
    sums: list[torch.Tensor] = []  # for each map: C,2, the sum and the sum of squares
    counts: list[int] = []  # for each map: values per channel
    for batch in batches:
        found = [stage.double() for stage in maps(batch)]
        added = [torch.stack([stage.sum((0, 2, 3)), stage.square().sum((0, 2, 3))], -1) for stage in found]
        sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
        sizes = [stage.numel() // stage.shape[1] for stage in found]
        counts = [a + b for a, b in zip(counts, sizes, strict=True)] if counts else sizes
    if not sums:
        return []
    info = maps.feature_info
    result = []
    for name, stride, total, count in zip(info.module_name(), info.reduction(), sums, counts, strict=True):
        mean, square = (total / count).unbind(-1)
        variance = (square - mean.square()).clamp_min(0)
        # six digits: the others depend on the order of summation
        rounded = [[float(f"{value:.6g}") for value in values.tolist()] for values in (mean, variance)]
        result.append(MapStatistics(name, stride, len(mean), *rounded))
    return result

"""Feature maps of a backbone, as timm gives them, and their mean and variance: what a student is distilled from."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from .. import library_messages
from ..data.preprocessing import pretrained_cfg_of
from ..errors import WeightsError


@dataclass(frozen=True)
class MapStatistics:
    """One map: its `name` in timm, `stride` in pixels, and mean and variance per channel, [C], over `values` cells."""

    name: str
    stride: int
    channels: int
    mean: list[float]
    variance: list[float]


def map_model(backbone: nn.Module, architecture: str, image_size: int) -> nn.Module:
    """timm's `features_only` model with the weights of `backbone`, on the CPU: B,3,H,W -> list of B,C,H',W', fine to coarse.

    timm would drop keys it does not know with no more than a log line; here every tensor must come from the backbone.
    Raises WeightsError if timm gives no maps of this model.
    """
    sized = {"img_size": image_size} if pretrained_cfg_of(architecture).fixed_input_size else {}
    try:
        maps = timm.create_model(architecture, pretrained=False, features_only=True, **sized)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise WeightsError(f"{architecture}: timm gives no feature maps of it; choose another backbone") from error
    # FeatureListNet calls stages.0.x stages_0.x; wrappers put `model.` before it
    state = {key.replace(".", "_"): tensor for key, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        for key, tensor in maps.state_dict().items():
            plain = key.removeprefix("model.").replace(".", "_")
            if plain not in state or state[plain].shape != tensor.shape:
                raise WeightsError(f"{architecture}: the maps' {key} is not in the backbone; choose another backbone")
            tensor.copy_(state[plain])
    return maps.eval().requires_grad_(False)


def open_local_dir(folder: str | Path) -> tuple[nn.Module, nn.Module]:
    """(backbone, maps) of an exported folder with nothing but timm's own loader, as users open it."""
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(
        log.level if library_messages.are_shown() else logging.ERROR
    )  # it tells of a head that the maps do not need
    try:
        whole = timm.create_model(f"local-dir:{folder}", pretrained=True)
        maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    finally:
        log.setLevel(level)
    return whole.eval(), maps.eval()


@torch.inference_mode()
def statistics(maps: nn.Module, images: Iterable[torch.Tensor]) -> list[MapStatistics]:
    """Mean and variance of every channel over all cells of all images; none if there are no images.

    `images`: normalised, B,3,H,W each."""
    sums: list[torch.Tensor] = []
    counts: list[int] = []
    for batch in images:
        found = [stage.double() for stage in maps(batch)]
        # C, 2 each: sum and sum of squares
        added = [torch.stack([stage.sum((0, 2, 3)), stage.square().sum((0, 2, 3))], -1) for stage in found]
        sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
        cells = [stage.numel() // stage.shape[1] for stage in found]
        counts = [a + b for a, b in zip(counts, cells, strict=True)] if counts else cells
    if not sums:
        return []
    info = maps.feature_info
    result = []
    for name, stride, total, count in zip(info.module_name(), info.reduction(), sums, counts, strict=True):
        mean, square = (total / count).unbind(-1)
        variance = (square - mean.square()).clamp_min(0)
        # six digits: the rest depends on the order of sums
        rounded = [[float(f"{value:.6g}") for value in values.tolist()] for values in (mean, variance)]
        result.append(MapStatistics(name, stride, len(mean), *rounded))
    return result

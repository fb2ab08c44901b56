"""Preprocessing: how a crop is cut and normalised before the backbone sees it. Defined here only.

`Preprocessing` is stored with every checkpoint, export and embedding, so that inference does the same as training.
Shapes: B images, H = W = image_size pixels. Pixels are sent between processes as uint8 and normalised afterwards.
"""

import difflib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..errors import ConfigError, WeightsError
from ..files import printable

if TYPE_CHECKING:  # not at run time: validate-data cuts crops without torch
    import torch


@dataclass(frozen=True)
class Preprocessing:
    """Crop and normalisation."""

    image_size: int  # px
    bbox_buffer: float  # share of the box's sides that is added on each side
    pad: bool  # pad to a square with the mean; otherwise squash
    interpolation: str  # one of INTERPOLATIONS (of PIL, antialiased)
    mean: tuple[float, float, float]  # RGB, of pixels in [0, 1]
    std: tuple[float, float, float]
    mirror: bool = False  # mirror right ears, if sides are known

    @property
    def fill(self) -> tuple[int, int, int]:
        """The padding colour, 0 to 255: the mean, which becomes 0 by normalisation."""
        red, green, blue = (round(255 * m) for m in self.mean)
        return red, green, blue

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: dict[str, Any], where: str) -> "Preprocessing":
        """Undo `as_dict`. `where`: name of the file in messages. Raises WeightsError for missing or invalid values."""
        try:
            found = Preprocessing(
                image_size=int(values["image_size"]),
                bbox_buffer=float(values["bbox_buffer"]),
                pad=values["pad"],
                interpolation=str(values["interpolation"]),
                mean=_three(values["mean"]),
                std=_three(values["std"]),
                mirror=values.get("mirror", False),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WeightsError(f"{where}: its preprocessing is incomplete ({error!r}); export it again") from error
        checks = {
            "image_size": 32 <= found.image_size <= 2048,
            "bbox_buffer": 0 <= found.bbox_buffer <= _LARGEST,
            "pad": isinstance(found.pad, bool),
            "interpolation": found.interpolation in INTERPOLATIONS,
            "mean": len(found.mean) == 3 and all(abs(value) <= _LARGEST for value in found.mean),
            "std": len(found.std) == 3 and all(0 < value <= _LARGEST for value in found.std),
            "mirror": isinstance(found.mirror, bool),
        }
        if wrong := [name for name, passed in checks.items() if not passed]:
            value = printable(values.get(wrong[0]))[:40]
            raise WeightsError(f"{where}: its {wrong[0]} {value} is invalid; export it again")
        return found


_LARGEST = 1000  # more than any sensible value of buffer, mean or std


def preprocessing_of(backbone: str, image_size: int, bbox_buffer: float, pad: bool) -> Preprocessing:
    """Return preprocessing with mean, std and interpolation of the backbone's pretrained configuration.

    timm's `crop_pct` is deliberately not used: a centre crop would cut off the helix.
    """
    pretrained = pretrained_cfg_of(backbone)
    interpolation = pretrained.interpolation if pretrained.interpolation in INTERPOLATIONS else "bicubic"
    return Preprocessing(image_size, bbox_buffer, pad, interpolation, tuple(pretrained.mean), tuple(pretrained.std))


def preprocessing_for(config: TrainConfig) -> Preprocessing:
    """Return the preprocessing of a training run."""
    preprocessing = preprocessing_of(config.backbone, config.image_size, config.bbox_buffer, config.pad)
    return replace(preprocessing, mirror=config.side_policy == "mirror")


def loading_of(config: TrainConfig) -> Preprocessing:
    """Return the preprocessing of the crops that a run loads: a student and its teacher may need other sizes."""
    return replace(preprocessing_for(config), image_size=config.load_size)


def pretrained_cfg_of(backbone: str) -> Any:
    """Return timm's pretrained configuration of a model. Raises ConfigError, with similar names, if there is none."""
    import timm

    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        advice = f"did you mean {', '.join(near)}?" if near else "python -c 'import timm; print(timm.list_models())'"
        raise ConfigError("backbone", f"timm has no model {backbone!r}", advice)
    return timm.get_pretrained_cfg(backbone)


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def normalise(pixels: "torch.Tensor", preprocessing: Preprocessing) -> "torch.Tensor":
    """Normalise B,3,H,W, 0 to 255, to float32 B,3,H,W with the backbone's mean and standard deviation."""
    mean = pixels.new_tensor(preprocessing.mean, dtype=_float32()).view(3, 1, 1) * 255
    std = pixels.new_tensor(preprocessing.std, dtype=_float32()).view(3, 1, 1) * 255
    return (pixels - mean) / std


def resized(pixels: "torch.Tensor", size: int) -> "torch.Tensor":
    """Scale B,3,H,W to B,3,size,size (bilinear, antialiased): float32, or unchanged if it has that size."""
    if pixels.shape[-1] == size == pixels.shape[-2]:
        return pixels
    import torch.nn.functional as F

    return F.interpolate(pixels.to(_float32()), size=(size, size), mode="bilinear", antialias=True)


def to_unit(pixels: "torch.Tensor") -> "torch.Tensor":
    """Scale uint8 B,3,H,W to float32 in [-1, 1]: the target of the reconstruction, the same for every backbone."""
    return pixels.to(_float32()) / 127.5 - 1


def from_unit(images: "torch.Tensor") -> "torch.Tensor":
    """Scale float B,3,H,W in [-1, 1] to uint8, clamped: the inverse of `to_unit`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def _float32():
    import torch

    return torch.float32


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue

"""The one home of preprocessing: what is done to a crop before the backbone sees it.

`Preprocessing` travels with every checkpoint, export and embedding, so that inference does what training
did. Shapes: B images, H = W = image_size pixels. Pixels cross process borders as uint8 and are normalised
after the transfer.
"""

import difflib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..errors import ConfigError, WeightsError
from ..files import printable

if TYPE_CHECKING:  # validate-data cuts crops without torch
    import torch


@dataclass(frozen=True)
class Preprocessing:
    """Crop and normalisation. `mean`, `std`: RGB statistics of pixels in [0, 1]."""

    image_size: int
    bbox_buffer: float
    pad: bool
    interpolation: str  # nearest, bilinear, bicubic, lanczos (of PIL, antialiased)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mirror: bool = False  # right ears, where sides are known, are turned into left ones

    @property
    def fill(self) -> tuple[int, int, int]:
        """The padding colour: the mean, which is 0 after normalisation."""
        return tuple(round(255 * m) for m in self.mean)  # type: ignore[return-value]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: dict[str, Any], where: str) -> "Preprocessing":
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
            raise WeightsError(f"{where}: its preprocessing is not whole ({error!r}); export it again") from error
        right = {
            "image_size": 32 <= found.image_size <= 2048,
            "bbox_buffer": 0 <= found.bbox_buffer <= _LARGEST,
            "pad": isinstance(found.pad, bool),
            "interpolation": found.interpolation in INTERPOLATIONS,
            "mean": len(found.mean) == 3 and all(abs(value) <= _LARGEST for value in found.mean),
            "std": len(found.std) == 3 and all(0 < value <= _LARGEST for value in found.std),
            "mirror": isinstance(found.mirror, bool),
        }
        if wrong := [name for name, passed in right.items() if not passed]:
            raise WeightsError(f"{where}: {wrong[0]} {printable(values.get(wrong[0]))[:40]} cannot be; export it again")
        return found


_LARGEST = 1000  # more than any sensible number here


def preprocessing_of(backbone: str, image_size: int, bbox_buffer: float, pad: bool) -> Preprocessing:
    """Preprocessing with the statistics and interpolation of the backbone's own pretrained configuration.

    timm's `crop_pct` is deliberately not used: a centre crop would cut the helix off.
    """
    pretrained = pretrained_cfg_of(backbone)
    interpolation = pretrained.interpolation if pretrained.interpolation in INTERPOLATIONS else "bicubic"
    return Preprocessing(image_size, bbox_buffer, pad, interpolation, tuple(pretrained.mean), tuple(pretrained.std))


def preprocessing_for(config: TrainConfig) -> Preprocessing:
    """The preprocessing of a training run."""
    preprocessing = preprocessing_of(config.backbone, config.image_size, config.bbox_buffer, config.pad)
    return replace(preprocessing, mirror=config.side_policy == "mirror")


def pretrained_cfg_of(backbone: str) -> Any:
    """timm's pretrained configuration of a model. Raises ConfigError, with near names, if timm has no such model."""
    import timm

    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        mend = f"did you mean {', '.join(near)}?" if near else "python -c 'import timm; print(timm.list_models())'"
        raise ConfigError("backbone", f"timm has no model {backbone!r}", mend)
    return timm.get_pretrained_cfg(backbone)


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def normalise(pixels: "torch.Tensor", preprocessing: Preprocessing) -> "torch.Tensor":
    """uint8 B,3,H,W -> float32 B,3,H,W with the backbone's mean and standard deviation."""
    mean = pixels.new_tensor(preprocessing.mean, dtype=_float32()).view(3, 1, 1) * 255
    std = pixels.new_tensor(preprocessing.std, dtype=_float32()).view(3, 1, 1) * 255
    return (pixels - mean) / std


def to_unit(pixels: "torch.Tensor") -> "torch.Tensor":
    """uint8 B,3,H,W -> float32 in [-1, 1]: the reconstruction's target, the same for every backbone."""
    return pixels.to(_float32()) / 127.5 - 1


def from_unit(images: "torch.Tensor") -> "torch.Tensor":
    """float B,3,H,W in [-1, 1] -> uint8, clamped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def _float32():
    import torch

    return torch.float32


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue

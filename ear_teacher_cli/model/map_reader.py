"""The embedding and the feature maps of a timm backbone, in one pass.

B images, H = W = image_size pixels, C channels of a map, s its stride, G = H / s cells along its side.
"""

from typing import Any

import torch

from ..errors import ConfigError

Maps = dict[int, torch.Tensor]  # stride in pixels -> map B,C,G,G


class MapReader:
    """Returns the feature maps of timm backbones of one architecture: the last, and those before it whose stride is
    `finest` pixels or more (None: the last alone).

    `shapes`: stride -> (C, G, G), measured on one image. `option`, `otherwise`: the option that needs the maps, and its
    value that does not. Raises ConfigError with them if timm gives no such maps of `backbone` or two of one stride
    (vision transformers, with `finest`), or if the embedding is not made of the last.
    """

    def __init__(self, backbone: Any, image_size: int, finest: int | None, option: str, otherwise: str):
        self._option, self._otherwise = option, otherwise
        strides = [stage["reduction"] for stage in getattr(backbone, "feature_info", [])]
        if not strides or not hasattr(backbone, "forward_intermediates"):
            raise self.error("the backbone has no feature maps")
        last = len(strides) - 1
        self.places = [i for i, stride in enumerate(strides) if i == last or finest is not None and stride >= finest]
        self.strides = [strides[i] for i in self.places]
        if len(set(self.strides)) < len(self.strides):
            raise self.error("the backbone has no feature maps of several strides")
        image, was_training = (
            torch.linspace(-1, 1, 3 * image_size**2).view(1, 3, image_size, image_size),
            backbone.training,
        )
        backbone.eval()
        with torch.no_grad():
            embedding, maps = self(backbone, image)
            if not torch.allclose(embedding, backbone(image), atol=1e-5):
                raise self.error("the backbone's embedding is not made of its maps")
        backbone.train(was_training)
        self.shapes = {stride: tuple(found.shape[1:]) for stride, found in maps.items()}

    def __call__(self, backbone: Any, images: torch.Tensor) -> tuple[torch.Tensor, Maps]:
        """Return (embedding B,D, maps) of normalised images B,3,H,W: the embedding is `backbone(images)`."""
        features, maps = backbone.forward_intermediates(images, indices=self.places, output_fmt="NCHW")
        return backbone.forward_head(features), dict(zip(self.strides, maps, strict=True))

    def error(self, found: str) -> ConfigError:
        """Return the error of the option that needs the maps."""
        return ConfigError(self._option, found, f"choose another backbone, or {self._otherwise}")

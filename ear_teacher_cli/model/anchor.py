"""The anchor: the frozen pretrained backbone at a higher resolution, whose feature maps the teacher's maps predict.

Fine-tuning on few unlabelled images loses part of what pretraining learned, and does so in the feature maps, too. The
anchor keeps it, and adds what the pretrained backbone sees of the same image at twice the side (dense distillation from
high to low resolution; DINOv3, Simeoni et al. 2025, sec. 4.3 and 5.1, anchors maps to an earlier teacher at a higher
resolution by their Gram matrices).

B images, H = W = image_size pixels, C channels of a map, s its stride, G = H / s cells along its side.
"""

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..data.preprocessing import Preprocessing, normalise
from .map_reader import MapReader, Maps

FINEST = 8  # stride of the finest map; finer ones have learned edges and colours, which all images share
SCALE = 2  # side of the anchor's input as a multiple of the teacher's
# Least deviation that a channel is divided by, absolute and as a share of the channels' mean: behind a ReLU some channels
# are 0 almost everywhere, and would otherwise have most of the gradient.
LEAST, LEAST_SHARE = 1e-3, 0.01


class Anchor(nn.Module):
    """Predict the anchor's maps from the teacher's with one 1 x 1 convolution for each pair of maps.

    The pairs: each stride s with the same stride of the anchor, averaged to G x G cells (the convolution starts as the
    identity); and each stride s but the last with the anchor's next stride, which has G x G cells at twice the side.
    """

    def __init__(self, backbone: nn.Module, preprocessing: Preprocessing):
        """Copy `backbone`, the teacher's. Raises ConfigError if it has no feature maps (see MapReader)."""
        super().__init__()
        self.backbone, self.preprocessing = copy.deepcopy(backbone).requires_grad_(False).eval(), preprocessing
        self.reader = MapReader(self.backbone, preprocessing.image_size, FINEST, "anchor_weight", "0")
        width, strides = {stride: shape[0] for stride, shape in self.reader.shapes.items()}, self.reader.strides
        if len(strides) < 2:
            raise self.reader.error("the backbone has no feature maps of several strides")
        following = [(a, b) for a, b in pairwise(strides) if b == SCALE * a]
        self.pairs = [*((stride, stride) for stride in strides), *following]
        self.predictors = nn.ModuleDict({f"{a}_{b}": nn.Conv2d(width[a], width[b], 1) for a, b in self.pairs})
        for stride in strides:
            convolution = self.predictors[f"{stride}_{stride}"]
            nn.init.dirac_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def train(self, mode: bool = True) -> "Anchor":
        """Set training mode, except for the frozen backbone."""
        super().train(mode)
        self.backbone.eval()
        return self

    def follow(self, backbone: nn.Module) -> None:
        """Take the weights of `backbone`: the pretrained ones."""
        self.backbone.load_state_dict(backbone.state_dict())

    def targets(self, pixels: torch.Tensor) -> Maps:
        """Return the frozen backbone's maps of uint8 B,3,H,W, enlarged to twice the side."""
        with torch.no_grad():
            larger = F.interpolate(pixels.float(), scale_factor=SCALE, mode="bicubic").clamp(0, 255)
            larger = larger.contiguous(memory_format=torch.channels_last)
            return self.reader(self.backbone, normalise(larger, self.preprocessing))[1]

    def forward(self, maps: Maps, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean over the pairs of smooth L1 plus 1 - cosine of standardised maps, a scalar.

        `maps`: the teacher's, of a view; `pixels`: uint8 B,3,H,W, the same view without changes of colour. Each channel
        is standardised over the batch.
        """
        targets = self.targets(pixels)
        found = [self._distance(maps[a].float(), targets[b].float(), a, b) for a, b in self.pairs]
        return torch.stack(found).mean()

    def _distance(self, given: torch.Tensor, target: torch.Tensor, stride: int, of: int) -> torch.Tensor:
        """Return the loss of a pair: `given` B,C,G,G of `stride`, `target` B,C',G',G' of the anchor's stride `of`."""
        target = F.adaptive_avg_pool2d(target, given.shape[-2:])
        deviation, mean = torch.std_mean(target, dim=(0, 2, 3), keepdim=True)  # 1,C',1,1
        deviation = deviation.maximum((LEAST_SHARE * deviation.mean()).clamp_min(LEAST))
        target = (target - mean) / deviation
        if of == stride:
            given = (given - mean) / deviation
        predicted = self.predictors[f"{stride}_{of}"](given).float()
        return F.smooth_l1_loss(predicted, target) + (1 - F.cosine_similarity(predicted, target, dim=1)).mean()

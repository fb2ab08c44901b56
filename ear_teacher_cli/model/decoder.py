"""The decoder, which reconstructs an image from the feature map of the last stage, before pooling, or from its embedding.

Shapes: B images, H = W = image_size pixels, D = embedding dimension, C channels and G x G cells of the map, K principal
components of S x S pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..config import TrainConfig

COMPONENTS = 256  # K: principal components of the training images that the linear part of the decoder combines
BASIS_SIDE = 64  # S at most: finer detail is left to the convolutions, and at 224 px the components would take 150 MB
# Cells along the side of a map at most, for the linear part: a larger one is averaged. At 224 px 7 x 7 cells of 768
# channels would be 37,632 values to regress on.
LINEAR_CELLS = 4


def build_decoder(config: TrainConfig, shape: tuple[int, ...]) -> nn.Module:
    """Return the decoder of a configuration: B,*shape -> B,3,H,W on the scale of [-1, 1]. `shape`: (D,) or (C, G, G)."""
    kind = LinearStart if config.decoder_start == "linear" else Decoder
    return kind(shape, config.image_size)


class Decoder(nn.Module):
    """Map an embedding B,D or a feature map B,C,G,G (`shape`: without B) to B,3,H,W on the scale of [-1, 1], not clamped.

    A linear layer, or a 1 x 1 convolution of the map, to a grid of H/32 x W/32, five transposed convolutions with batch
    normalisation and ReLU, and a final convolution.
    """

    def __init__(self, shape: tuple[int, ...], image_size: int):
        super().__init__()
        self.grid, self.reads_map = image_size // 32, len(shape) > 1
        widths = (256, 128, 96, 64, 32, 16)
        self.start: nn.Module = (
            nn.Conv2d(shape[0], widths[0], 1) if self.reads_map else nn.Linear(shape[0], widths[0] * self.grid**2)
        )
        steps: list[nn.Module] = []
        for wide, narrow in zip(widths, widths[1:], strict=False):
            # the kernel is a multiple of the stride, which avoids checkerboard artefacts (Odena et al. 2016)
            steps += [
                nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(inplace=True),
            ]
        # transposed convolutions alone leave a grid of dots on the image; a final plain one removes it
        self.steps = nn.Sequential(*steps, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return images B,3,H,W for embeddings B,D, or maps B,C,G,G."""
        if self.reads_map:
            grid = self.start(averaged(given, self.grid))  # B,C,G,G -> B,256,H/32,W/32
        else:
            grid = self.start(given).unflatten(1, (-1, self.grid, self.grid))  # B,D -> B,256,H/32,W/32
        return self.steps(grid)  # -> B,3,H,W


class LinearStart(Decoder):
    """A linear map to principal components of the training images, plus the transposed convolutions of `Decoder`.

    The image is mean + sum_k c_k component_k, resized bilinearly from S to H, with the coefficients c = code(values),
    plus the output of the convolutions, whose last layer starts at 0. The values are those of the embedding or of the
    map, standardised and divided by the square root of their number D': AdamW moves all weights by like amounts, and
    would move the sum of so many values too far otherwise. Before training `set_linear` sets the components and the best
    linear `code` (training/decoder_start.py); the convolutions then learn what it cannot show. Until then the components
    are 0, and it is a `Decoder` that starts at mid-grey.
    """

    def __init__(self, shape: tuple[int, ...], image_size: int):
        super().__init__(shape, image_size)
        self.size, self.side, self.cells = image_size, basis_side(image_size), min(shape[-1], LINEAR_CELLS)
        count = shape[0] * self.cells**2 if self.reads_map else shape[0]  # D'
        self.code = nn.Linear(count, COMPONENTS)
        # constants, of P = 3SS and D' values; no buffers, which would be copied in every step (guards.py, DDP)
        self.mean = nn.Parameter(torch.zeros(3 * self.side**2), requires_grad=False)
        self.components = nn.Parameter(torch.zeros(COMPONENTS, 3 * self.side**2), requires_grad=False)
        self.centre = nn.Parameter(torch.zeros(count), requires_grad=False)
        self.scale = nn.Parameter(torch.full((count,), count**-0.5), requires_grad=False)
        for tensor in self.steps[-1].parameters():
            nn.init.zeros_(tensor)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return images B,3,H,W for embeddings B,D, or maps B,C,G,G."""
        code = self.code((self.values(given) - self.centre) * self.scale)
        linear = self.mean + code @ self.components  # B,K x K,P -> B,P
        images = linear.unflatten(1, (3, self.side, self.side))
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear") + super().forward(given)

    def values(self, given: torch.Tensor) -> torch.Tensor:
        """Return what the linear part reads, B,D': the embedding, or the map in at most LINEAR_CELLS x LINEAR_CELLS
        cells."""
        return averaged(given, self.cells).flatten(1) if self.reads_map else given

    @torch.no_grad()
    def set_linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        components: torch.Tensor,
        centre: torch.Tensor,
        deviations: torch.Tensor,
    ) -> None:
        """Set the linear part: `weight` K',D' and `bias` K' of the code, `mean` P and `components` K',P of the image,
        with K' <= K; the other components stay 0. `centre`, `deviations` D': mean and standard deviation of the values."""
        found = len(components)
        for tensor in (self.components, self.code.weight, self.code.bias):
            tensor.zero_()
        self.mean.copy_(mean)
        self.components[:found].copy_(components)
        least = max(_LEAST_SHARE * float(deviations.mean()), 1e-6)
        scale = 1 / (deviations.clamp_min(least) * len(deviations) ** 0.5)
        self.centre.copy_(centre)
        self.scale.copy_(scale)
        self.code.weight[:found].copy_(weight / scale)
        self.code.bias[:found].copy_(bias + weight @ centre)


# Least deviation of a value that it is divided by, as a share of the mean: behind a ReLU some are 0 almost everywhere.
_LEAST_SHARE = 0.01


def averaged(maps: torch.Tensor, cells: int) -> torch.Tensor:
    """Return maps B,C,G,G averaged to B,C,cells,cells, as `adaptive_avg_pool2d` does, whose gradient on a GPU is not
    deterministic."""
    if maps.shape[-1] == cells:
        return maps
    weights = F.adaptive_avg_pool1d(torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device), cells)  # G,cells
    return weights.T @ maps @ weights


def basis_side(image_size: int) -> int:
    """Return S, the side in pixels of the images that principal components are computed on."""
    return min(image_size, BASIS_SIDE)

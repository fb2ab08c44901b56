"""The decoder, which reconstructs an image from its embedding.

Shapes: B images, H = W = image_size pixels, D = embedding dimension, K principal components of S x S pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..config import TrainConfig

COMPONENTS = 256  # K: principal components of the training images that the linear part of the decoder combines
BASIS_SIDE = 64  # S at most: finer detail is left to the convolutions, and at 224 px the components would take 150 MB


def build_decoder(config: TrainConfig, embedding_dim: int) -> nn.Module:
    """Return the decoder of a configuration: B,D -> B,3,H,W on the scale of [-1, 1]."""
    kind = LinearStart if config.decoder_start == "linear" else Decoder
    return kind(embedding_dim, config.image_size)


class Decoder(nn.Module):
    """Map B,D to B,3,H,W on the scale of [-1, 1], not clamped: a linear layer to a grid of H/32 x W/32, five
    transposed convolutions with batch normalisation and ReLU, and a final convolution."""

    def __init__(self, embedding_dim: int, image_size: int):
        super().__init__()
        self.grid = image_size // 32
        widths = (256, 128, 96, 64, 32, 16)
        self.start = nn.Linear(embedding_dim, widths[0] * self.grid**2)
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

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return images B,3,H,W for embeddings B,D."""
        grid = self.start(embedding).unflatten(1, (-1, self.grid, self.grid))  # B,D -> B,256,H/32,W/32
        return self.steps(grid)  # -> B,3,H,W


class LinearStart(Decoder):
    """A linear map to principal components of the training images, plus the transposed convolutions of `Decoder`.

    The image is mean + sum_k c_k component_k, resized bilinearly from S to H, with the coefficients c = code(embedding),
    plus the output of the convolutions, whose last layer starts at 0. Before training `set_linear` sets the components
    and the best linear `code` (training/decoder_start.py); the convolutions then learn what it cannot show. Until then
    the components are 0, and it is a `Decoder` that starts at mid-grey.
    """

    def __init__(self, embedding_dim: int, image_size: int):
        super().__init__(embedding_dim, image_size)
        self.size, self.side = image_size, basis_side(image_size)
        self.code = nn.Linear(embedding_dim, COMPONENTS)
        # constants, of P = 3SS values; no buffers, which would be copied in every step (guards.py, DDP)
        self.mean = nn.Parameter(torch.zeros(3 * self.side**2), requires_grad=False)
        self.components = nn.Parameter(torch.zeros(COMPONENTS, 3 * self.side**2), requires_grad=False)
        for tensor in self.steps[-1].parameters():
            nn.init.zeros_(tensor)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return images B,3,H,W for embeddings B,D."""
        linear = self.mean + self.code(embedding) @ self.components  # B,K x K,P -> B,P
        images = linear.unflatten(1, (3, self.side, self.side))
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear") + super().forward(embedding)

    @torch.no_grad()
    def set_linear(
        self, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, components: torch.Tensor
    ) -> None:
        """Set the linear part: `weight` K',D and `bias` K' of the code, `mean` P and `components` K',P of the image,
        with K' <= K; the other components stay 0."""
        found = len(components)
        for tensor in (self.components, self.code.weight, self.code.bias):
            tensor.zero_()
        self.mean.copy_(mean)
        self.components[:found].copy_(components)
        self.code.weight[:found].copy_(weight)
        self.code.bias[:found].copy_(bias)


def basis_side(image_size: int) -> int:
    """Return S, the side in pixels of the images that principal components are computed on."""
    return min(image_size, BASIS_SIDE)

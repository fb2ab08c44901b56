"""The decoder, which reconstructs an image from its embedding.

Shapes: B images, H = W = image_size pixels, D = embedding dimension.
"""

import torch
from torch import nn

from ..config import TrainConfig


def build_decoder(config: TrainConfig, embedding_dim: int) -> nn.Module:
    """Return the decoder of a configuration: B,D -> B,3,H,W on the scale of [-1, 1]."""
    return Decoder(embedding_dim, config.image_size)


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

"""The decoder: an image from its embedding.

B images, H = W = image_size pixels, D embedding.
"""

import torch
from torch import nn


class Decoder(nn.Module):
    """B,D -> B,3,H,W on the scale of [-1, 1]: a linear map to a grid of H/32, then five transposed convolutions
    with batch normalisation, and a plain one."""

    def __init__(self, embedding_dim: int, image_size: int):
        super().__init__()
        self.grid = image_size // 32
        widths = (256, 128, 96, 64, 32, 16)
        self.start = nn.Linear(embedding_dim, widths[0] * self.grid**2)
        steps: list[nn.Module] = []
        for wide, narrow in zip(widths, widths[1:], strict=False):
            # kernel 4, stride 2: kernel a multiple of the stride, so no checkerboard (Odena et al. 2016)
            steps += [
                nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(inplace=True),
            ]
        # the last convolution is plain: transposed ones alone leave a grid of dots on the image
        self.steps = nn.Sequential(*steps, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        grid = self.start(embedding).unflatten(1, (-1, self.grid, self.grid))  # B,D -> B,256,H/32,W/32
        return self.steps(grid)  # -> B,3,H,W

"""Random variation of a crop, from one seed per picture and epoch.

`policy` is that of `--augment`: it never cuts helix or lobe away (scale 0.8-1.1, shift 5 %). `hflip` is apart
from it, and 0 unless asked for: a flipped left ear is a right ear.
"""

import torch
from torchvision.transforms import v2

from .pixels import Preprocessing


class Augment:
    """uint8 3,H,W -> uint8 3,H,W, a function of (picture, seed) alone: the same for any number of workers."""

    def __init__(self, preprocessing: Preprocessing, policy: bool = True, hflip: float = 0.0):
        fill, bilinear = list(preprocessing.fill), v2.InterpolationMode.BILINEAR
        noise = [
            v2.ToDtype(torch.float32, scale=True),
            v2.GaussianNoise(sigma=0.03),
            v2.ToDtype(torch.uint8, scale=True),
        ]
        steps = [
            v2.RandomAffine(15, translate=(0.05, 0.05), scale=(0.8, 1.1), fill=fill, interpolation=bilinear),
            v2.ColorJitter(brightness=0.3, contrast=0.3),
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.5))], p=0.3),
            v2.RandomApply(noise, p=0.3),
        ]
        self.transform = v2.Compose([*(steps if policy else []), v2.RandomHorizontalFlip(hflip)])

    def __call__(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            return self.transform(pixels)

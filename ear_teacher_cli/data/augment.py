"""Random variation of a crop, from one seed per image, epoch and view.

No policy cuts helix or lobe away (scale 0.8-1.1, shift 5 %). `hflip` is apart from them, and 0 unless asked
for: a flipped left ear is a right ear. H = W = image_size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from .preprocessing import Preprocessing


class Augment:
    """uint8 3,H,W -> uint8 3,H,W, a function of (image, seed) alone: the same for any number of workers.

    `policy`: a name of config.AUGMENTATIONS, or None for no variation but `hflip`.
    """

    def __init__(self, preprocessing: Preprocessing, policy: str | None = "mild", hflip: float = 0.0):
        fill, bilinear = list(preprocessing.fill), v2.InterpolationMode.BILINEAR
        move = v2.RandomAffine(15, translate=(0.05, 0.05), scale=(0.8, 1.1), fill=fill, interpolation=bilinear)
        self.geometry = v2.Compose([move] if policy else [nn.Identity()])
        self.light = v2.Compose([*_LIGHT[policy]()] if policy else [nn.Identity()])
        self.flip = v2.RandomHorizontalFlip(hflip)

    def __call__(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        return self.with_target(pixels, seed)[0]

    def with_target(self, pixels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(the varied image, the same in its own light: moved and flipped alike, else untouched)."""
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            moved = self.geometry(pixels)
            return self.flip(torch.stack([self.light(moved), moved])).unbind(0)


def _mild() -> list[nn.Module]:
    return [v2.ColorJitter(brightness=0.3, contrast=0.3), *_blur_and_noise()]


def _strong() -> list[nn.Module]:
    """Another camera, as far as a photograph can be made to look like one: its colours, its light, its resolution."""
    return [
        v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5),
        v2.RandomGrayscale(0.25),
        ColourCast(cast=0.25, gamma=0.5),
        v2.RandomApply([LostResolution(least=0.2)], p=0.6),
        *_blur_and_noise(),
    ]


def _blur_and_noise() -> list[nn.Module]:
    noise = [v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(sigma=0.03), v2.ToDtype(torch.uint8, scale=True)]
    return [v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.5))], p=0.3), v2.RandomApply(noise, p=0.3)]


_LIGHT = {"mild": _mild, "strong": _strong}


class ColourCast(nn.Module):
    """Another white balance and tone curve: each channel times 1 +- `cast`, then a power of e^(+-`gamma`)."""

    def __init__(self, cast: float, gamma: float):
        super().__init__()
        self.cast, self.gamma = cast, gamma

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        gain = 1 + self.cast * (2 * torch.rand(3, 1) - 1)  # 3,1
        power = torch.exp(self.gamma * (2 * torch.rand(()) - 1))
        levels = torch.linspace(0, 1, 256)  # uint8 has 256 of them: a table is exact, and cheap
        table = ((gain * levels).clamp(0, 1) ** power * 255).round().byte()  # 3,256
        return torch.stack([t[p] for t, p in zip(table, pixels.int(), strict=True)])


class LostResolution(nn.Module):
    """Down to a random size, log-uniform in [`least`, 1] of the image's, and up again: an ear seen from afar."""

    def __init__(self, least: float):
        super().__init__()
        self.least = least

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        side = pixels.shape[-1]
        small = max(8, round(side * self.least ** float(torch.rand(()))))
        down = F.interpolate(pixels[None].float(), size=(small, small), mode="bilinear", antialias=True)
        return F.interpolate(down, size=(side, side), mode="bilinear")[0].round().clamp(0, 255).byte()

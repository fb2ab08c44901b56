"""Random augmentation of a crop, determined by one seed per image, epoch and view. H = W = image_size.

On a GPU the transforms compute there, and draw the same random numbers: torchvision draws those of its transforms on the
CPU, and so do the ones here.

To add a policy, write a function that returns its transforms and add one line to POLICIES (and its name to
config.AUGMENTATIONS, which the command line offers). To add a transform, put it into one of these functions.

No policy cuts off helix or lobe (scale 0.8 to 1.1, shift 5 %). `hflip` is independent of the policy and 0 by default:
a flipped left ear looks like a right ear.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from .preprocessing import Preprocessing


class Augment:
    """Map uint8 3,H,W to uint8 3,H,W, as a function of (image, seed) alone: independent of the number of workers.

    `policy`: a key of POLICIES, or None for no augmentation but `hflip` (a probability).
    """

    def __init__(self, preprocessing: Preprocessing, policy: str | None = "mild", hflip: float = 0.0):
        fill, bilinear = list(preprocessing.fill), v2.InterpolationMode.BILINEAR
        affine = v2.RandomAffine(15, translate=(0.05, 0.05), scale=(0.8, 1.1), fill=fill, interpolation=bilinear)
        self.geometry = v2.Compose([affine] if policy else [nn.Identity()])
        self.photometry = v2.Compose(POLICIES[policy]() if policy else [nn.Identity()])
        self.flip = v2.RandomHorizontalFlip(hflip)

    def __call__(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the augmented image."""
        return self.with_clean(pixels, seed)[0]

    def with_clean(self, pixels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (augmented image, clean image): the clean one is moved and flipped alike, in its own colours."""
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            moved = self.geometry(pixels)
            return self.flip(torch.stack([self.photometry(moved), moved])).unbind(0)


class Views:
    """What a step sees of an image, as a function of (image, seed) alone.

    `augment` makes the first view, `view` a second one; None: the image as it is, and none. `clean`: the first view is
    wanted without its changes of colour, too.
    """

    def __init__(self, augment: Augment | None = None, view: Augment | None = None, clean: bool = False):
        self.augment, self.view, self.clean = augment, view, clean

    def __call__(self, pixels: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        """Return {'pixels' [, 'view'][, 'clean']} of uint8 3,H,W: images like it, on its device."""
        found = {"pixels": pixels}
        if self.augment:
            found["pixels"], clean = self.augment.with_clean(pixels, seed)
            if self.clean:
                found["clean"] = clean
        if self.view:  # beside an augmented image it needs a seed of its own
            found["view"] = self.view(pixels, derive_seed(seed, 1) if self.augment else seed)
        return found

    def of_batch(self, pixels: torch.Tensor, seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the same of B images, uint8 B,3,H,W, on their device."""
        found = [self(image, seed) for image, seed in zip(pixels, seeds, strict=True)]
        return {name: torch.stack([views[name] for views in found]) for name in found[0]}


def _mild() -> list[nn.Module]:
    """Small changes of brightness and contrast, blur, noise."""
    return [v2.ColorJitter(brightness=0.3, contrast=0.3), *_blur_and_noise()]


def _strong() -> list[nn.Module]:
    """Imitate another camera: its colours, lighting and resolution."""
    return [
        v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5),
        v2.RandomGrayscale(0.25),
        ColourCast(cast=0.25, gamma=0.5),
        v2.RandomApply([LostResolution(least=0.2)], p=0.6),
        *_blur_and_noise(),
    ]


def _blur_and_noise() -> list[nn.Module]:
    noise = [v2.ToDtype(torch.float32, scale=True), GaussianNoise(sigma=0.03), v2.ToDtype(torch.uint8, scale=True)]
    return [v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.5))], p=0.3), v2.RandomApply(noise, p=0.3)]


# Name of a policy -> its transforms of colour, noise and sharpness, applied after the geometric one.
POLICIES: dict[str, Callable[[], list[nn.Module]]] = {"mild": _mild, "strong": _strong}


class ColourCast(nn.Module):
    """Change white balance and tone curve: multiply each channel by 1 +- `cast`, then raise to e^(+-`gamma`)."""

    def __init__(self, cast: float, gamma: float):
        super().__init__()
        self.cast, self.gamma = cast, gamma

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map uint8 3,H,W to uint8 3,H,W."""
        gain = 1 + self.cast * (2 * torch.rand(3, 1) - 1)  # 3,1
        power = torch.exp(self.gamma * (2 * torch.rand(()) - 1))
        levels = torch.linspace(0, 1, 256)  # of uint8: a table of 256 values is exact, and cheap
        table = ((gain * levels).clamp(0, 1) ** power * 255).round().byte()  # 3,256
        table = table.to(pixels.device, non_blocking=True)
        return torch.stack([t[p] for t, p in zip(table, pixels.int(), strict=True)])


class GaussianNoise(nn.Module):
    """Add normal noise of standard deviation `sigma`. torchvision's draws on the device of the image: other numbers."""

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map float 3,H,W on [0, 1] to the same."""
        noise = torch.randn(pixels.shape).to(pixels.device, non_blocking=True)
        return (pixels + noise * self.sigma).clamp(0, 1)


class LostResolution(nn.Module):
    """Scale down to a random share of the size, log-uniform in [`least`, 1], and up again: an ear seen from afar."""

    def __init__(self, least: float):
        super().__init__()
        self.least = least

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map uint8 3,H,W to uint8 3,H,W."""
        side = pixels.shape[-1]
        small = max(8, round(side * self.least ** float(torch.rand(()))))
        down = F.interpolate(pixels[None].float(), size=(small, small), mode="bilinear", antialias=True)
        return F.interpolate(down, size=(side, side), mode="bilinear")[0].round().clamp(0, 255).byte()


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)

"""What the PSNR of reconstructions is compared with: the mean training image and PCA of the pixels; and the verdict.

N training crops, B crops, K components, P = 3HW pixel values; M embeddings of dimension D. Crops are uint8 B,3,H,W; pixel
values are on [-1, 1].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..data.preprocessing import to_unit

# Most crops that a basis is fitted on: their Gram matrix grows with the square of their number.
FITTED_ON = 2048
COMPONENTS = 64
# The PSNR of the decoder must exceed that of the mean image by this many dB: a squared error lower by a tenth. In
# examples/docs/metrics.md.
BETTER_BY = 0.5
# Penalties that `ridge` chooses from.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_FEWEST = 10  # images that a penalty is chosen on
# Names of the references among the metrics, without `val/`.
REFERENCES = MEAN_IMAGE, PCA = "psnr_mean_image", f"psnr_pca{COMPONENTS}"
# Pixel values, less 128, are at most 128: the sum of so many products is an integer that float32 holds exactly.
_BLOCK = 1024
# Eigenvalues below this share of the largest are zero but for rounding.
_ZERO = 1e-10


def psnr(mse: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on [-1, 1]: 10 log10(4 / MSE)."""
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


@dataclass(frozen=True)
class PixelBasis:
    """Mean and principal components of the pixel values of training crops, on the CPU.

    `mean`: float32 P, in the order of 3,H,W. `components`: float32 K,P, orthonormal rows, the largest variance first;
    the value of largest magnitude in each is positive. `deviations`: float32 K, the standard deviation of each
    coefficient over the N crops (of the population: divided by N).
    """

    mean: torch.Tensor
    components: torch.Tensor
    deviations: torch.Tensor

    @classmethod
    def fit(cls, crops: torch.Tensor, components: int) -> "PixelBasis":
        """Fit the mean and the first `components` principal components to crops uint8 N,3,H,W; N at least 1.

        There are fewer components where the crops span fewer: at most N - 1. Beside the crops it needs memory for
        N x N and K x P numbers.
        """
        pixels = crops.flatten(1)  # N,P
        images, values = pixels.shape
        gram, means = torch.zeros(images, images, dtype=torch.float64), torch.empty(values, dtype=torch.float64)
        for part in _blocks(values):
            shifted = pixels[:, part].float() - 128
            gram += shifted @ shifted.T
            means[part] = shifted.mean(0, dtype=torch.float64)
        gram -= gram.mean(0, keepdim=True)  # about the mean
        gram -= gram.mean(1, keepdim=True)
        variances, vectors = torch.linalg.eigh(gram)  # ascending
        variances, vectors = variances.flip(0), vectors.flip(1)
        spanned = int((variances > _ZERO * variances[0]).sum()) if variances[0] > 0 else 0
        count = min(components, images - 1, spanned)
        lengths = variances[:count].sqrt()
        weights = (vectors[:, :count] / lengths).T.float()  # K,N
        found = torch.empty(count, values)
        for part in _blocks(values):
            about = pixels[:, part].float() - (means[part] + 128).float()
            found[:, part] = weights @ about
        if count:
            largest = found.gather(1, found.abs().argmax(1, keepdim=True))  # K,1
            found *= largest.sign()
        deviations = (lengths / (127.5 * images**0.5)).float()
        return cls(((means + 128) / 127.5 - 1).float(), found, deviations)

    def first(self, components: int) -> "PixelBasis":
        """Return the basis of the first `components` of the K components; unchanged if it has no more."""
        return PixelBasis(self.mean, self.components[:components], self.deviations[:components])

    def project(self, crops: torch.Tensor) -> torch.Tensor:
        """Return the coefficients of crops uint8 B,3,H,W: float32 B,K, whose mean over the N crops is 0."""
        return (to_unit(crops).flatten(1) - self.mean) @ self.components.T

    def reconstruct(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return the pixel values of coefficients float32 B,K: float32 B,P."""
        return self.mean + coefficients @ self.components


def _blocks(values: int) -> Iterator[slice]:
    """Yield slices of at most _BLOCK of the pixel values."""
    yield from (slice(start, min(start + _BLOCK, values)) for start in range(0, values, _BLOCK))


def ridge(embeddings: torch.Tensor, codes: torch.Tensor, deviations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit codes ~ embeddings @ weight.T + bias by ridge regression: weight float32 K,D and bias K.

    `embeddings` M,D, or other values, `codes` M,K of mean 0; `deviations` K scale the squared errors of the codes. The penalty is the one
    of RIDGES, times the mean eigenvalue of the embeddings' scatter matrix, that predicts every fifth image best from the
    others; the largest if there are fewer than _FEWEST images.
    """
    rows, targets, held_out = embeddings.double(), codes.double(), torch.arange(len(embeddings)) % 5 == 0
    mean = rows.mean(0)
    rows = rows - mean

    def fit(chosen: torch.Tensor) -> Callable[[float], torch.Tensor]:
        """Return penalty -> weights D,K, fitted to the chosen rows."""
        given, dim = rows[chosen], rows.shape[1]
        if len(given) < dim:  # the same solution from the smaller Gram matrix of the rows
            values, vectors = torch.linalg.eigh(given @ given.T)  # M; M,M
            turned = vectors.T @ targets[chosen]  # M,K
            mean = values.sum() / dim
            return lambda penalty: (
                given.T @ (vectors @ (turned / (values.clamp_min(0) + penalty * mean + 1e-12)[:, None]))
            )
        values, vectors = torch.linalg.eigh(rows[chosen].T @ rows[chosen])  # D; D,D
        turned = vectors.T @ (rows[chosen].T @ targets[chosen])  # D,K
        return lambda penalty: vectors @ (turned / (values.clamp_min(0) + penalty * values.mean() + 1e-12)[:, None])

    best = RIDGES[-1]
    if len(rows) >= _FEWEST:
        candidate = fit(~held_out)
        missed = [rows[held_out] @ candidate(penalty) - targets[held_out] for penalty in RIDGES]
        errors = [float((each * deviations.double()).square().sum()) for each in missed]
        best = RIDGES[errors.index(min(errors))]
    weight = fit(torch.ones_like(held_out))(best)
    return weight.T.float(), -(mean @ weight).float()


def reference_psnr(basis: PixelBasis, crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the PSNR in dB of each of the crops uint8 B,3,H,W, float32 B: of the mean image in place of the crop, and
    of its projection onto the mean and the first COMPONENTS components."""
    basis, pixels = basis.first(COMPONENTS), to_unit(crops).flatten(1)
    given = {MEAN_IMAGE: basis.mean, PCA: basis.reconstruct(basis.project(crops))}
    return {name: psnr((image - pixels).square().mean(1)) for name, image in given.items()}


def in_words(metrics: Mapping[str, float], at: str = "") -> str:
    """Return `13.9 dB; the mean training image gives 13.8, PCA with 64 components 23.3`, as far as it is known.

    `metrics`: name -> value, without `val/`; '' without `psnr`. `at`: when it was measured, after the unit.
    """
    if "psnr" not in metrics:
        return ""
    labels = {MEAN_IMAGE: "the mean training image gives", PCA: f"PCA with {COMPONENTS} components"}
    known = [f"{label} {metrics[name]:.1f}" for name, label in labels.items() if name in metrics]
    return f"{metrics['psnr']:.1f} dB{at}" + (f"; {', '.join(known)}" if known else "")


def judge(metrics: Mapping[str, float]) -> str:
    """Return what is wrong with the reconstructions; '' if nothing is, or if a metric is missing.

    `metrics`: as in `in_words`. Wrong: the PSNR is less than BETTER_BY above that of the mean image, or is not a number.
    """
    if not {"psnr", MEAN_IMAGE} <= metrics.keys() or metrics["psnr"] >= metrics[MEAN_IMAGE] + BETTER_BY:
        return ""
    return f"no better than the mean image ({metrics['psnr']:.1f} dB against {metrics[MEAN_IMAGE]:.1f})"

"""Centring and PCA whitening of embeddings. This module does not import torch.

Whitening: Jegou and Chum, "Negative evidences and co-occurences in image retrieval: the benefit of PCA and whitening"
(ECCV 2012). Fit both on training embeddings: fitted on the test embeddings they would leak information about the test.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import EarTeachError

SHRINK = 0.1  # default of `fit`, chosen on people held out of training
_BLOCK = 4096  # rows converted to float64 at a time


@dataclass(frozen=True)
class Whitening:
    """x -> (x / |x| - mean) @ matrix, then unit length. `mean`: float64 [D]. `matrix`: float64 [D, K]; None: centre
    only."""

    mean: np.ndarray
    matrix: np.ndarray | None

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Transform `rows` [N, D] to float32 [N, K] of unit length. A row equal to the mean becomes 0."""
        centred = unit(rows) - self.mean
        return unit(centred if self.matrix is None else centred @ self.matrix).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    """Return `rows` [N, D] as float64 scaled to length 1; a row of zeros stays zero."""
    rows = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def centre(rows: np.ndarray) -> Whitening:
    """Fit centring: the mean of the unit rows of [N, D]."""
    total = sum(unit(rows[start : start + _BLOCK]).sum(0) for start in range(0, len(rows), _BLOCK))
    return Whitening(total / len(rows), None)


def fit(rows: np.ndarray, dim: int | None = None, shrink: float = SHRINK) -> Whitening:
    """Fit PCA whitening to the unit rows of [N, D], keeping `dim` principal components (None: all with variance).

    `shrink`, 0 to 1, moves the covariance towards the multiple of the identity with the same trace (Ledoit and Wolf,
    2004): with few rows the small components are mostly noise, which whitening would scale up to the size of the
    others. Raises EarTeachError if fewer than `dim` components have variance, or if a value is not finite.
    """
    if not np.isfinite(rows).all():
        raise EarTeachError("whitening: a row holds NaN or infinity; the model has diverged")
    mean = centre(rows).mean
    size = len(mean)
    covariance = np.zeros((size, size))
    for start in range(0, len(rows), _BLOCK):
        centred = unit(rows[start : start + _BLOCK]) - mean
        covariance += centred.T @ centred  # n,D -> D,D
    covariance /= len(rows)
    covariance = (1 - shrink) * covariance + shrink * np.trace(covariance) / size * np.eye(size)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]  # in descending order
    varying = int((values > max(values[0], 0) * 1e-10).sum())
    if not varying or (dim or 0) > varying:
        raise EarTeachError(
            f"whitening: {len(rows)} rows of {size} values vary in {varying} directions, {dim or 1} needed; "
            "fit it on more rows, or keep fewer dimensions"
        )
    kept = slice(0, dim or varying)
    return Whitening(mean, vectors[:, kept] / np.sqrt(values[kept]))

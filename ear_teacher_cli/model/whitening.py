"""Centring and PCA whitening of embeddings, fitted on another file's rows. No torch here.

Whitening: Jegou and Chum, "Negative evidences and co-occurences in image retrieval: the benefit of PCA and whitening"
(ECCV 2012). Both must be fitted on training embeddings: a mean of the test rows is knowledge of the test.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import EarTeachError

# What few images say of the small components is noise: the covariance goes a tenth of the way to a multiple of the
# identity (chosen on people held out of training).
SHRINK = 0.1
_BLOCK = 4096


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) @ matrix, then unit length. `mean` float64 [D]; `matrix` float64 [D, K], or None: centre only."""

    mean: np.ndarray
    matrix: np.ndarray | None

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """[N, D] rows (at unit length first) -> float32 [N, K] unit rows. A row at the mean becomes 0."""
        centred = unit(rows) - self.mean
        return unit(centred if self.matrix is None else centred @ self.matrix).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    """[N, D] -> float64 rows of length 1; a row of zeros stays."""
    rows = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def centre(rows: np.ndarray) -> Whitening:
    """The mean of the unit rows of [N, D]."""
    total = sum(unit(rows[start : start + _BLOCK]).sum(0) for start in range(0, len(rows), _BLOCK))
    return Whitening(total / len(rows), None)


def fit(rows: np.ndarray, dim: int | None = None, shrink: float = SHRINK) -> Whitening:
    """PCA whitening of the unit rows of [N, D] to their first `dim` principal components (None: all that vary).

    `shrink`, 0 to 1, moves the covariance towards the multiple of the identity of the same trace (Ledoit and Wolf,
    2004): with few rows the small components are noise, and whitening makes them as large as the others.
    Raises EarTeachError if so many components do not vary, or a row is not finite.
    """
    if not np.isfinite(rows).all():
        raise EarTeachError("whitening: a row holds NaN or infinity; the model has diverged")
    mean = centre(rows).mean
    size = len(mean)
    covariance = np.zeros((size, size))
    for start in range(0, len(rows), _BLOCK):
        part = unit(rows[start : start + _BLOCK]) - mean
        covariance += part.T @ part  # n,D -> D,D
    covariance /= len(rows)
    covariance = (1 - shrink) * covariance + shrink * np.trace(covariance) / size * np.eye(size)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]  # the largest first
    varying = int((values > max(values[0], 0) * 1e-10).sum())
    if not varying or (dim or 0) > varying:
        raise EarTeachError(
            f"whitening: {len(rows)} rows of {size} vary in {varying} directions, not in {dim or 'any'}; "
            "fit it on more rows, or keep fewer dimensions"
        )
    kept = slice(0, dim or varying)
    return Whitening(mean, vectors[:, kept] / np.sqrt(values[kept]))

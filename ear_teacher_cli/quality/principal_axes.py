"""The principal axes of embeddings: the directions in which they vary most. This module does not import torch.

N embeddings, D dimensions, K axes, M steps along an axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Variances below this share of the largest, or of the mean squared length of the embeddings (float32), are rounding.
_ZERO, _ROUNDING = 1e-10, 1e-14


@dataclass(frozen=True)
class PrincipalAxes:
    """Mean and principal axes of embeddings, all float64.

    `mean`: D. `axes`: K,D, orthonormal rows, the largest variance first; the value of largest magnitude in each is
    positive. `deviations`: K, the standard deviation of the embeddings along each axis (of the population: divided by N).
    `shares`: K, the variance along each axis as a share of the total variance.
    """

    mean: np.ndarray
    axes: np.ndarray
    deviations: np.ndarray
    shares: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray, count: int) -> "PrincipalAxes":
        """Fit the mean and the first `count` principal axes to finite embeddings N,D; N at least 1.

        There are fewer axes where the embeddings vary in fewer directions: at most N - 1, none if all are equal.
        """
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        about = rows - mean
        variances, vectors = np.linalg.eigh(about.T @ about / len(rows))  # ascending
        variances, vectors = variances[::-1], vectors[:, ::-1]
        least = max(_ZERO * variances[0], _ROUNDING * np.square(rows).sum(1).mean())
        kept = min(count, len(rows) - 1, int((variances > least).sum()))
        variances, axes = variances[:kept], vectors[:, :kept].T
        largest = np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), 1)  # K,1
        total = np.square(about).sum(1).mean()
        return cls(mean, axes * np.sign(largest), np.sqrt(variances), variances / total if kept else variances)

    def along(self, steps: Sequence[float]) -> np.ndarray:
        """Return the mean, moved along each axis by each of `steps`, in its standard deviations: float64 K,M,D."""
        moves = np.multiply.outer(self.deviations, np.asarray(steps, np.float64))  # K,M
        return self.mean + moves[:, :, None] * self.axes[:, None]

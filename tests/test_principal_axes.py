"""Principal axes of embeddings, against numpy's singular values."""

import numpy as np
import pytest
from conftest import apart

from ear_teacher_cli.quality.principal_axes import PrincipalAxes

SIZE = 12  # D


def embeddings(rows: int = 60, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """float32 N,D about a mean that is not 0, with a spectrum that falls."""
    random = np.random.default_rng(seed)
    turned = np.linalg.qr(random.normal(size=(size, size)))[0] * np.geomspace(3, 0.02, size)[:, None]
    return (random.normal(size=size) + random.normal(size=(rows, size)) @ turned).astype(np.float32)


@pytest.mark.parametrize("shape", [(60, 12), (9, 40)])
def test_the_axes_are_those_of_the_singular_vectors(shape):
    rows = embeddings(*shape)
    found = PrincipalAxes.fit(rows, 5)
    about = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    _, singular, vectors = np.linalg.svd(about, full_matrices=False)
    assert apart(found.mean, rows.mean(0, dtype=np.float64)) < 1e-12
    assert apart(found.deviations, singular[:5] / len(rows) ** 0.5) < 1e-10
    assert apart(found.shares, singular[:5] ** 2 / (singular**2).sum()) < 1e-10
    assert apart((found.axes @ vectors[:5].T) ** 2, np.eye(5)) < 1e-8  # equal but for the sign
    assert apart(found.axes @ found.axes.T, np.eye(5)) < 1e-10
    assert apart((about @ found.axes.T).std(0), found.deviations) < 1e-10


def test_the_sign_is_that_of_the_largest_value_however_the_rows_are_ordered():
    rows = embeddings()
    found, other = PrincipalAxes.fit(rows, 6), PrincipalAxes.fit(rows[::-1], 6)
    assert (np.take_along_axis(found.axes, np.abs(found.axes).argmax(1, keepdims=True), 1) > 0).all()
    assert apart(other.axes, found.axes) < 1e-9
    assert np.array_equal(PrincipalAxes.fit(rows, 6).axes, found.axes)


@pytest.mark.parametrize(("rows", "axes"), [(1, 0), (2, 1), (4, 3), (60, 6)])
def test_there_are_no_more_axes_than_directions_in_which_embeddings_vary(rows, axes):
    found = PrincipalAxes.fit(embeddings(rows), 6)
    assert found.axes.shape == (axes, SIZE) and len(found.deviations) == len(found.shares) == axes
    assert found.along((-1, 0, 1)).shape == (axes, 3, SIZE)
    assert found.shares.sum() <= 1 + 1e-12


def test_equal_embeddings_have_no_axes():
    rows = np.repeat(embeddings(1), 50, axis=0)
    rows[::2] *= np.float32(1 + 1e-7)  # rounding
    assert len(PrincipalAxes.fit(rows, 6).axes) == 0


def test_steps_are_in_standard_deviations():
    found = PrincipalAxes.fit(embeddings(), 3)
    moved = found.along((-2, 0, 3))
    assert apart(moved[:, 1], np.tile(found.mean, (3, 1))) < 1e-12
    assert apart(moved[2, 2], found.mean + 3 * found.deviations[2] * found.axes[2]) < 1e-12
    assert apart(moved[0, 0], found.mean - 2 * found.deviations[0] * found.axes[0]) < 1e-12

"""Principal axes of embeddings: against numpy's singular values, and as the decoder of a checkpoint draws them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import apart, small_config

from ear_teacher_cli.data.preprocessing import from_unit, preprocessing_for
from ear_teacher_cli.drawing import labelled_grid
from ear_teacher_cli.errors import WeightsError
from ear_teacher_cli.model.checkpoint import Checkpoint
from ear_teacher_cli.model.decoder import build_decoder
from ear_teacher_cli.quality.principal_axes import PrincipalAxes
from ear_teacher_cli.quality.reconstruction import MEAN_IMAGE
from ear_teacher_cli.report import principal_axes
from ear_teacher_cli.report.principal_axes import AXES, STEPS, DrawnAxes, draw_principal_axes

SIZE = 12  # D
GOOD = {"psnr": 20.1, MEAN_IMAGE: 18.0}


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


def checkpoint_of(start: str) -> tuple[Checkpoint, torch.nn.Module]:
    """A checkpoint with a decoder that reacts to its embedding, and that decoder, in training mode."""
    config = small_config(["", "train.npy", "", "val.npy"], decoder_start=start)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = build_decoder(config, SIZE)
        for name, tensor in decoder.state_dict().items():
            if tensor.is_floating_point() and "running" not in name:
                tensor.normal_(0, {"linear": 0.05, "random": 0.25}[start])
    state = {f"model.decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    state["model.backbone.stem.weight"] = torch.zeros(1)
    return Checkpoint(Path("best.ckpt"), config, preprocessing_for(config), SIZE, 3, 0, {"state_dict": state}), decoder


@pytest.mark.parametrize("start", ["linear", "random"])
def test_the_grid_is_what_the_decoder_of_the_checkpoint_makes_in_evaluation_mode(start, monkeypatch):
    checkpoint, decoder = checkpoint_of(start)
    drawn: list = []
    monkeypatch.setattr(principal_axes, "labelled_grid", lambda *words: drawn.append(words) or labelled_grid(*words))
    rows = embeddings()
    found = draw_principal_axes(checkpoint, rows, GOOD)
    images, labels, heads = drawn[0]
    moved = torch.from_numpy(PrincipalAxes.fit(rows, AXES).along(STEPS)).float()
    with torch.no_grad():
        expected = from_unit(decoder.eval()(moved[1]))
    assert images.shape == (6, 5, 3, 64, 64) and images[1].equal(expected)
    assert len({tuple(image.flatten().tolist()) for image in images[1]}) == 5  # not all black or white
    assert heads == ["-3 sd", "-2 sd", "mean", "+2 sd", "+3 sd"]
    share = PrincipalAxes.fit(rows, 1).shares[0]
    assert labels[0] == ("axis 1", f"{100 * share:.0f} % of the variance") and len(labels) == 6
    assert labels[5][1] == "under 1 % of the variance"
    assert found.description.startswith(f"axis 1: {100 * share:.0f} % of the variance, axis 2: ") and not found.why_not
    again = draw_principal_axes(checkpoint, rows, GOOD)
    assert again.image.tobytes() == found.image.tobytes()
    assert max(found.image.size) < 1800 and found.image.width > found.image.height > 6 * 128


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"psnr": 18.3, MEAN_IMAGE: 18.0}, "reconstructions are 0.3 dB above the mean image; 2 dB above it are needed"),
        ({"psnr": 16.8, MEAN_IMAGE: 18.0}, "reconstructions are 1.2 dB below the mean image; 2 dB above it are needed"),
        ({"psnr": 19.94, MEAN_IMAGE: 18.0}, "reconstructions are 1.9 dB above the mean image"),
        ({"psnr": float("nan"), MEAN_IMAGE: 18.0}, "reconstructions are not finite"),
        ({"psnr": 18.3}, "metrics.csv has no val/psnr or no val/psnr_mean_image of this epoch"),
        ({}, "metrics.csv has no val/psnr"),
    ],
)
def test_poor_reconstructions_are_not_shown(metrics, why):
    found = draw_principal_axes(checkpoint_of("random")[0], embeddings(), metrics)
    assert found.image is None and found.why_not.startswith(why)


def test_equal_embeddings_are_not_drawn():
    rows = np.ones((9, SIZE), np.float32)
    found = draw_principal_axes(checkpoint_of("random")[0], rows, GOOD)
    assert found == DrawnAxes(why_not="the embeddings do not differ")


def test_a_decoder_that_does_not_fit_is_one_line():
    checkpoint, _ = checkpoint_of("random")
    del checkpoint.content["state_dict"]["model.decoder.start.bias"]
    with pytest.raises(WeightsError, match=r"^best\.ckpt: its decoder does not fit its configuration; use another"):
        draw_principal_axes(checkpoint, embeddings(), GOOD)

"""Principal axes of embeddings: against numpy's singular values, and as the decoder of a checkpoint draws them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import apart, small_config

from ear_teacher_cli.console import Console
from ear_teacher_cli.data.dataset import EarDataset
from ear_teacher_cli.data.manifest import Manifest
from ear_teacher_cli.data.preprocessing import from_unit
from ear_teacher_cli.drawing import labelled_grid
from ear_teacher_cli.embedding.files import Embeddings
from ear_teacher_cli.errors import EarTeachError, WeightsError
from ear_teacher_cli.model.checkpoint import Checkpoint
from ear_teacher_cli.quality.principal_axes import PrincipalAxes
from ear_teacher_cli.quality.reconstruction import MEAN_IMAGE
from ear_teacher_cli.report import principal_axes
from ear_teacher_cli.report.principal_axes import AXES, STEPS, DrawnAxes, draw_principal_axes
from ear_teacher_cli.report.validation_embeddings import ValidationEmbeddings
from ear_teacher_cli.training.module import EarTeacherLightningModule, module_of

SIZE = 12  # D
QUIET = Console(quiet=True)
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


def run_of(tmp_path: Path, ears: Path, people: int = 3, **options) -> tuple[Checkpoint, ValidationEmbeddings]:
    """A checkpoint of drawn ears with a decoder that reacts to what it reads, and its validation embeddings."""
    paths = sorted(str(path) for path in ears.rglob("*.jpg"))[: 4 * people]
    manifest = Manifest("val.npy", None, paths, [None] * len(paths), range(len(paths)))
    config = small_config(["", "train.npy", "", "val.npy"], metric_loss="none", **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = EarTeacherLightningModule(config)
        for name, tensor in module.model.decoder.state_dict().items():
            if tensor.is_floating_point() and "running" not in name:
                tensor.normal_(0, {"linear": 0.05, "random": 0.25}[config.decoder_start])
    state = {f"model.{name}": tensor for name, tensor in module.model.state_dict().items()}
    size = module.model.embedding_dim
    checkpoint = Checkpoint(Path("best.ckpt"), config, module.preprocessing, size, 3, 0, {"state_dict": state})
    return checkpoint, embeddings_of(manifest, module)


def embeddings_of(manifest: Manifest, module: EarTeacherLightningModule) -> ValidationEmbeddings:
    with torch.no_grad():
        rows = module.eval()(crops(manifest, module)).numpy()
    unit = Embeddings("val.npy", rows, manifest.paths, manifest.boxes)
    return ValidationEmbeddings(None, unit, unit, rows, None, len(rows))


def crops(manifest: Manifest, module: EarTeacherLightningModule) -> torch.Tensor:
    dataset = EarDataset(manifest, module.preprocessing)
    return torch.stack([dataset[row]["pixels"] for row in range(len(manifest))])


@pytest.fixture
def drawn(monkeypatch) -> list:
    """What was drawn: (images, labels, heads)."""
    found: list = []
    monkeypatch.setattr(principal_axes, "labelled_grid", lambda *words: found.append(words) or labelled_grid(*words))
    return found


@pytest.mark.parametrize("start", ["linear", "random"])
def test_the_grid_is_what_the_decoder_of_the_checkpoint_makes_in_evaluation_mode(start, ears, tmp_path, drawn):
    checkpoint, found = run_of(tmp_path, ears, decoder_start=start, decoder_input="embedding")
    image = draw_principal_axes(checkpoint, found, GOOD, QUIET)
    images, labels, heads = drawn[0]
    moved = torch.from_numpy(PrincipalAxes.fit(found.unscaled, AXES).along(STEPS)).float()
    with torch.no_grad():
        expected = from_unit(module_of(checkpoint).model.decoder(moved[1]))
    assert images.shape == (6, 5, 3, 64, 64) and images[1].equal(expected)
    assert len({tuple(each.flatten().tolist()) for each in images[1]}) == 5  # not all black or white
    assert heads == ["-3 sd", "-2 sd", "mean", "+2 sd", "+3 sd"]
    share = PrincipalAxes.fit(found.unscaled, 1).shares[0]
    assert labels[0] == ("axis 1", f"{100 * share:.0f} % of the variance") and len(labels) == 6
    assert image.description.startswith(f"axis 1: {100 * share:.0f} % of the variance, axis 2: ") and not image.why_not
    again = draw_principal_axes(checkpoint, found, GOOD, QUIET)
    assert again.image.tobytes() == image.image.tobytes()
    assert max(image.image.size) < 1800 and image.image.height > 6 * 128 and image.image.width > 5 * 128


def test_a_decoder_of_maps_draws_the_map_that_goes_with_the_embedding(ears, tmp_path, drawn):
    """The map is a linear function of the embeddings here, so that the regression has to find it."""
    checkpoint, found = run_of(tmp_path, ears, decoder_input="map")
    module = module_of(checkpoint)
    axes = PrincipalAxes.fit(found.unscaled, AXES)
    with torch.no_grad():
        maps = module.model.decoder_input(*module.features(crops(found.manifest(), module))).double()
    scores = torch.from_numpy((found.unscaled - axes.mean) @ axes.axes.T)  # N,K; uncorrelated, of mean 0
    draw_principal_axes(checkpoint, found, GOOD, QUIET)
    images = drawn[0][0]
    for axis in range(len(axes.axes)):
        slope, *_ = torch.linalg.lstsq(scores[:, axis : axis + 1], (maps - maps.mean(0)).flatten(1))
        moved = torch.stack([maps.mean(0).flatten() + step * axes.deviations[axis] * slope[0] for step in STEPS])
        with torch.no_grad():
            expected = from_unit(module.model.decoder(moved.view(-1, *maps.shape[1:]).float()))
        assert (images[axis].int() - expected.int()).abs().max() <= 1
    assert not images[0, 0].equal(images[0, -1])


def test_the_maps_of_a_part_of_many_images_are_enough(ears, tmp_path, drawn, monkeypatch):
    checkpoint, found = run_of(tmp_path, ears, decoder_input="map")
    monkeypatch.setattr(principal_axes, "FITTED_ON", 5)
    read: list = []
    original = principal_axes.crops_of
    monkeypatch.setattr(principal_axes, "crops_of", lambda *words: read.extend(words[-1]) or original(*words))
    assert draw_principal_axes(checkpoint, found, GOOD, QUIET).image is not None
    assert read == [0, 3, 6, 9]


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
def test_poor_reconstructions_are_not_shown(metrics, why, ears, tmp_path):
    found = draw_principal_axes(*run_of(tmp_path, ears, people=1), metrics, QUIET)
    assert found.image is None and found.why_not.startswith(why)


def test_equal_embeddings_are_not_drawn(ears, tmp_path):
    checkpoint, found = run_of(tmp_path, ears, people=1)
    same = replace(found, unscaled=np.ones((9, SIZE), np.float32))
    assert draw_principal_axes(checkpoint, same, GOOD, QUIET) == DrawnAxes(why_not="the embeddings do not differ")


def test_a_decoder_that_does_not_fit_is_one_line(ears, tmp_path):
    checkpoint, found = run_of(tmp_path, ears)
    del checkpoint.content["state_dict"]["model.decoder.start.bias"]
    with pytest.raises(WeightsError, match=r"^best\.ckpt: .*decoder\.start\.bias"):
        draw_principal_axes(checkpoint, found, GOOD, QUIET)


def test_images_that_are_gone_are_one_line(ears, tmp_path):
    checkpoint, found = run_of(tmp_path, ears, decoder_input="map")
    gone = replace(found.teacher, paths=[f"{path}.gone" for path in found.teacher.paths])
    with pytest.raises(EarTeachError, match="no image can be read any more"):
        draw_principal_axes(checkpoint, replace(found, teacher=gone), GOOD, QUIET)

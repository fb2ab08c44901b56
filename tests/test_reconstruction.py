"""What the PSNR of reconstructions is compared with: against numpy, in a run, and in what a run says."""

import csv
import html
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, apart, read_table, small_config

from ear_teacher_cli.console import Console
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.dataset import UnreadableImage
from ear_teacher_cli.model.checkpoint import read_checkpoint, write_checkpoint
from ear_teacher_cli.quality import reconstruction
from ear_teacher_cli.quality.reconstruction import (
    MEAN_IMAGE,
    PCA,
    REFERENCES,
    PixelBasis,
    in_words,
    judge,
    reference_psnr,
)
from ear_teacher_cli.training import losses
from ear_teacher_cli.training.describe import reconstruction_in_words
from ear_teacher_cli.training.epoch_metrics import ReferencePSNR
from ear_teacher_cli.training.progress import cells, references
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)
KEYS = {f"val/{name}" for name in REFERENCES}


def crops(count: int, height: int = 6, width: int = 5, seed: int = 0) -> torch.Tensor:
    """uint8 N,3,H,W with a spectrum that falls, as that of photos does."""
    random = np.random.default_rng(seed)
    basis = random.normal(size=(12, 3 * height * width)) * np.geomspace(40, 0.5, 12)[:, None]
    pixels = 120 + random.normal(size=(count, 12)) @ basis + random.normal(size=(count, 3 * height * width))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).reshape(count, 3, height, width)


def by_svd(fitted: torch.Tensor, components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, components and deviations, all float64, from the singular vectors of all pixels."""
    pixels = fitted.flatten(1).numpy().astype(np.float64) / 127.5 - 1
    mean = pixels.mean(0)
    _, singular, vectors = np.linalg.svd(pixels - mean, full_matrices=False)
    return mean, vectors[:components], singular[:components] / len(pixels) ** 0.5


def test_the_basis_is_that_of_the_singular_vectors():
    fitted, other = crops(40), crops(7, seed=1)
    mean, components, deviations = by_svd(fitted, 10)
    basis = PixelBasis.fit(fitted, 10)
    assert apart(basis.mean, mean) < 1e-6 and apart(basis.deviations, deviations) < 1e-6
    assert apart(basis.components @ basis.components.T, np.eye(10)) < 1e-6
    assert apart((basis.components.numpy() @ components.T) ** 2, np.eye(10)) < 1e-5  # equal but for the sign
    assert (basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True)) > 0).all()
    pixels = other.flatten(1).numpy() / 127.5 - 1
    expected = mean + (pixels - mean) @ components.T @ components
    assert apart(basis.reconstruct(basis.project(other)), expected) < 1e-6
    coefficients = basis.project(fitted)
    assert coefficients.mean(0).abs().max() < 1e-5
    assert apart(coefficients.std(0, correction=0), deviations) < 1e-5
    first = basis.first(3)
    assert first.components.equal(basis.components[:3]) and len(first.deviations) == 3


@pytest.mark.parametrize(("images", "components"), [(1, 0), (2, 1), (5, 4), (70, 64)])
def test_there_are_no_more_components_than_the_crops_span(images, components):
    basis = PixelBasis.fit(crops(images), 64)
    assert len(basis.components) == len(basis.deviations) == components
    assert basis.project(crops(3)).shape == (3, components) and basis.reconstruct(basis.project(crops(3))).shape == (
        3,
        90,
    )


def test_equal_crops_have_no_component_and_repeated_ones_no_further():
    one, two = crops(1).repeat(6, 1, 1, 1), crops(3).repeat(4, 1, 1, 1)
    assert len(PixelBasis.fit(one, 64).components) == 0 and len(PixelBasis.fit(two, 64).components) == 2
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    basis = PixelBasis.fit(black_and_white, 64)
    assert basis.mean.abs().max() < 1e-7 and basis.deviations.tolist() == pytest.approx([48**0.5])
    assert reference_psnr(basis, black_and_white)[MEAN_IMAGE].tolist() == pytest.approx([10 * np.log10(4)] * 2)


def test_the_basis_is_the_same_each_time_and_whatever_the_blocks(monkeypatch):
    fitted = crops(30, 24, 20)  # more than one block
    basis, again = PixelBasis.fit(fitted, 8), PixelBasis.fit(fitted, 8)
    monkeypatch.setattr(reconstruction, "_BLOCK", 100)
    blocks = PixelBasis.fit(fitted, 8)
    for name in ("mean", "components", "deviations"):
        assert getattr(basis, name).equal(getattr(again, name))
        assert apart(getattr(blocks, name), getattr(basis, name)) < 1e-6


def test_the_references_are_the_psnr_of_each_image_whatever_the_batch():
    fitted, held_out = crops(90), crops(11, seed=2)
    mean, components, _ = by_svd(fitted, 64)
    pixels = held_out.flatten(1).numpy() / 127.5 - 1
    found = reference_psnr(PixelBasis.fit(fitted, 80), held_out)
    for name, image in ((MEAN_IMAGE, mean), (PCA, mean + (pixels - mean) @ components.T @ components)):
        assert apart(found[name], 10 * np.log10(4 / ((image - pixels) ** 2).mean(1))) < 1e-5
    parts = [reference_psnr(PixelBasis.fit(fitted, 64), part) for part in held_out.split(4)]
    for name in REFERENCES:
        assert apart(torch.cat([part[name] for part in parts]), found[name]) < 1e-5
    assert losses.psnr is reconstruction.psnr and (found[PCA] > found[MEAN_IMAGE]).all()


def test_fitting_needs_little_memory_beside_the_crops():
    """Not P x P, nor all the crops as floats: what is allocated is counted tensor by tensor."""
    sizes: list[int] = []
    fitted = crops(20, 100, 100)  # P = 30,000

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend(x.nbytes for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor))
            return found

    with Allocations():
        PixelBasis.fit(fitted, 4)
    assert max(sizes) <= fitted.nbytes  # uint8; as floats four times as many


class _Two:
    """A Trainer of two processes, as much of it as is asked for."""

    def __init__(self, world_size: int):
        self.world_size = world_size


def test_an_image_that_two_processes_share_counts_once(monkeypatch):
    basis, held_out = PixelBasis.fit(crops(20), 64), crops(5, seed=3)

    def collected(rows: list[int]) -> ReferencePSNR:
        found = ReferencePSNR(basis)
        for row in rows:
            found.add(torch.tensor([row]), held_out[[row]])
        return found

    alone = collected([0, 1, 2, 3, 4]).finish(_Two(1))
    other = [torch.cat(column) for column in zip(*collected([1, 3, 0])._batches, strict=True)]

    def gather(everything, mine):
        everything[:] = [mine, other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert collected([0, 2, 4]).finish(_Two(2)) == pytest.approx(alone, rel=1e-6)
    assert list(alone) == list(REFERENCES) and collected([]).finish(_Two(1)) == {}


def test_the_verdict_asks_for_half_a_decibel():
    metrics = {"psnr": 13.9, MEAN_IMAGE: 13.8, PCA: 23.3}
    assert judge(metrics) == "no better than the mean image (13.9 dB against 13.8)"
    assert judge(metrics | {"psnr": 9.0}) and judge(metrics | {"psnr": float("nan")})
    assert judge(metrics | {"psnr": 14.4}) == "" == judge({"psnr": 13.9}) == judge({MEAN_IMAGE: 13.8})
    assert in_words(metrics) == "13.9 dB; the mean training image gives 13.8, PCA with 64 components 23.3"
    assert in_words({"psnr": 13.94}, " at epoch 2") == "13.9 dB at epoch 2" and in_words({}) == ""


def test_the_terminal_has_no_column_of_a_constant_and_a_log_has_it_once():
    metrics = {"val/psnr": 13.9, f"val/{MEAN_IMAGE}": 13.8, f"val/{PCA}": 23.3}
    heads = [cell.head for cell in cells(small_config(["", "a", "", "b"]), "1/2", metrics, metrics)]
    assert sum("PSNR" in head or "mean" in head for head in heads) == 1
    assert references(metrics) == ["PSNR of the mean training image 13.8 dB", "PSNR of PCA with 64 components 23.3 dB"]


def expected_references(config) -> dict[str, float]:
    """The references from images that are read one by one, and numpy."""
    data = EarDataModule(config)
    data.setup()
    fitted, held_out = (
        torch.stack([each[i]["pixels"] for i in range(len(each))]) for each in (data.clean_set, data.val_set)
    )
    mean, components, _ = by_svd(fitted, 64)
    components = components[: len(fitted) - 1]
    pixels = held_out.flatten(1).numpy() / 127.5 - 1
    images = {MEAN_IMAGE: mean, PCA: mean + (pixels - mean) @ components.T @ components}
    return {name: float((10 * np.log10(4 / ((image - pixels) ** 2).mean(1))).mean()) for name, image in images.items()}


def test_a_run_has_them_in_every_row_and_in_its_checkpoint(run, manifests):
    expected = expected_references(small_config(manifests))
    rows = read_table(run / "metrics.csv")
    assert len(rows) == 7
    for row in rows:
        assert {name: float(row[f"val/{name}"]) for name in REFERENCES} == pytest.approx(expected, rel=1e-5)
    start = read_checkpoint(run / "checkpoints" / "last.ckpt").content["earteach"]["start"]
    assert {name: start[name] for name in REFERENCES} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_has_them_from_its_checkpoint_and_an_older_one_goes_on_without(run, tmp_path, monkeypatch):
    copy, old = (Path(shutil.copytree(run, tmp_path / name / run.name)) for name in ("new", "old"))

    def not_again(*_: object):
        raise AssertionError("measured again")

    monkeypatch.setattr("ear_teacher_cli.training.passes.fit_pixel_basis", not_again)
    resume(copy, QUIET, max_epochs=7)
    rows = read_table(copy / "metrics.csv")
    assert [row["epoch"] for row in rows] == list("01234567")
    assert all(len({row[key] for row in rows}) == 1 for key in KEYS)
    for path in (old / "checkpoints").glob("*.ckpt"):
        content = read_checkpoint(path).content
        for name in REFERENCES:
            del content["earteach"]["start"][name]
        write_checkpoint(content, path)
    rows = [{key: value for key, value in row.items() if key not in KEYS} for row in read_table(old / "metrics.csv")]
    with open(old / "metrics.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    outcome = resume(old, QUIET, max_epochs=7)
    assert outcome.epochs == 7 and not KEYS & read_table(old / "metrics.csv")[-1].keys()
    assert len(outcome.reconstruction) == 1 and "mean" not in outcome.reconstruction[0]


def with_psnr(run: Path, into: Path, above: float, weight: float = 1.0) -> Path:
    """A copy of the run whose decoder is so many dB above the mean image."""
    copy = Path(shutil.copytree(run, into / run.name))
    rows = read_table(copy / "metrics.csv")
    for row in rows[1:]:
        row["val/psnr"] = str(float(row[f"val/{MEAN_IMAGE}"]) + above)
    with open(copy / "metrics.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = (copy / "config.toml").read_text()
    changed = re.sub(r"reconstruction_weight = \S+", f"reconstruction_weight = {weight}", text)
    (copy / "config.toml").write_text(changed)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(("above", "weight", "wrong"), [(0.1, 1.0, True), (0.6, 1.0, False), (0.1, 0.0, False)])
def test_the_report_shows_them_and_the_verdict(run, tmp_path, earteach, above, weight, wrong):
    copy = with_psnr(run, tmp_path, above, weight)
    assert earteach("report", copy).code == 0
    text = html.unescape((copy / "report.html").read_text())
    assert ("no better than the mean image (" in text) == wrong
    assert (
        "<td>PSNR of the mean training image, dB</td>" in text and "<td>PSNR of PCA with 64 components, dB</td>" in text
    )
    assert "<!-- mean training image -->" in text and "<!-- PCA, 64 components -->" in text  # in the legend
    tile = re.search(r'<b( class="bad")?>[^<]* dB</b><span>PSNR of reconstructions ([^<]*)', text)
    assert tile and bool(tile[1]) == wrong and "PCA with 64 components" in tile[2]


def test_the_end_of_a_run_has_the_verdict_on_its_best(run, tmp_path, manifests):
    best = Path("best-epoch_0002-val_loss_1.ckpt")
    config = small_config(manifests, reconstruction_weight=1.0)
    said = reconstruction_in_words(with_psnr(run, tmp_path / "a", 0.1), best, config)
    assert re.fullmatch(
        r"[\d.]+ dB at epoch 2; the mean training image gives [\d.]+, PCA with 64 components [\d.]+", said[0]
    )
    assert re.fullmatch(r"reconstructions: no better than the mean image \([\d.]+ dB against [\d.]+\)", said[1])
    good = with_psnr(run, tmp_path / "b", 0.6)
    assert len(reconstruction_in_words(good, best, config)) == 1
    assert reconstruction_in_words(good, best, small_config(manifests, reconstruction_weight=0.0)) == ()
    assert reconstruction_in_words(good, None, config) == ()


@pytest.mark.slow
def test_train_says_so_and_exits_with_0(manifests, tmp_path, earteach):
    words = ["--output-dir", tmp_path, "--max-epochs", 1, *SMALL, "--fail-on-collapse", "--decoder-start", "random"]
    said = earteach("train", *manifests, *words, "--learning-rate", 1e-6)
    assert said.code == 0, said.err
    assert re.search(r"\nPSNR: [\d.]+ dB at epoch 1; the mean training image gives", said.err)
    assert "\n    reconstructions: no better than the mean image (" in said.err
    assert re.search(r"\nbefore training: .*PSNR of the mean training image [\d.]+ dB", said.err)
    said = earteach("train", *manifests, *words, "--overwrite", "--reconstruction-weight", 0)
    assert said.code == 0 and "no better than the mean image" not in said.err and "\nPSNR: " not in said.err


@pytest.mark.slow
def test_an_unreadable_image_is_left_out(ears, tmp_path):
    copy = Path(shutil.copytree(ears, tmp_path / "ears"))
    lists = ["", str(copy / "train_teacher.npy"), "", str(copy / "val_teacher.npy")]
    config = small_config(lists, output_dir=str(tmp_path), max_epochs=1, max_bad=0.5)
    data = EarDataModule(config)
    data.setup()
    for part in (data.clean_set, data.val_set):
        Path(part.manifest.file(0)).write_bytes(b"x")
    assert isinstance(data.val_set[0], UnreadableImage)
    outcome = train(config, QUIET)
    assert outcome.module.baseline.keys() >= set(REFERENCES)
    assert {split for split, _ in outcome.module.unreadable.errors} == {"train", "val"}

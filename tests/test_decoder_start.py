"""The start of the decoder: ridge regression of principal components of the training images on the embeddings."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import BACKBONE, SMALL, small_config

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.preprocessing import to_unit
from ear_teacher_cli.errors import EarTeachError
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.model.decoder import COMPONENTS, Decoder, LinearStart, basis_side, build_decoder
from ear_teacher_cli.quality.reconstruction import RIDGES, PixelBasis, psnr, ridge
from ear_teacher_cli.training.decoder_start import start_decoder
from ear_teacher_cli.training.guards import StepGuard
from ear_teacher_cli.training.module import EarTeacherLightningModule

PLAIN_TRAINER = dict(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Ridge regression


@pytest.mark.parametrize(("images", "dim"), [(40, 7), (12, 30)])
def test_ridge_is_the_closed_form_with_the_penalty_that_predicts_best(images, dim):
    rows = random_rows(images, dim)
    codes = rows @ random_rows(dim, 3, seed=1) + 0.5 * random_rows(images, 3, seed=2)
    codes -= codes.mean(0)
    deviations = torch.tensor([3.0, 2.0, 1.0])
    x, y, scale = rows.double().numpy(), codes.double().numpy(), deviations.double().numpy()
    x = x - x.mean(0)

    def solve(chosen, penalty):
        scatter = x[chosen].T @ x[chosen]
        return np.linalg.solve(scatter + penalty * np.trace(scatter) / dim * np.eye(dim), x[chosen].T @ y[chosen])

    held_out = np.arange(images) % 5 == 0
    errors = [(((x[held_out] @ solve(~held_out, penalty) - y[held_out]) * scale) ** 2).sum() for penalty in RIDGES]
    expected = solve(np.full(images, True), RIDGES[int(np.argmin(errors))])
    weight, bias = ridge(rows, codes, deviations)
    assert weight.shape == (3, dim) and bias.shape == (3,)
    assert weight.numpy().T == pytest.approx(expected, abs=1e-5)
    assert bias.numpy() == pytest.approx(-rows.double().numpy().mean(0) @ expected, abs=1e-5)


def test_ridge_of_few_or_equal_embeddings_predicts_the_mean():
    codes = random_rows(6, 2)
    weight, bias = ridge(torch.ones(6, 4), codes - codes.mean(0), torch.ones(2))
    assert weight.abs().max() < 1e-6 and bias.abs().max() < 1e-6
    few = ridge(random_rows(2, 4), torch.tensor([[1.0], [-1.0]]), torch.ones(1))[0]
    assert few.isfinite().all() and few.abs().max() > 0


# The decoder


def test_the_option_chooses_the_decoder():
    assert type(build_decoder(TrainConfig(decoder_start="linear", image_size=64), 8)) is LinearStart
    assert type(build_decoder(TrainConfig(decoder_start="random", image_size=64), 8)) is Decoder
    assert basis_side(32) == 32 and basis_side(224) == 64


def test_before_its_start_it_shows_mid_grey():
    decoder = LinearStart(8, 64).eval()
    assert torch.equal(decoder(random_rows(2, 8)), torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("side", [32, 64, 128])
def test_the_linear_part_by_hand(side):
    decoder, small = LinearStart(8, side).eval(), basis_side(side)
    weight, bias, rows = random_rows(5, 8), random_rows(5, seed=1), random_rows(3, 8, seed=2)
    mean, components = random_rows(3 * small**2, seed=3), random_rows(5, 3 * small**2, seed=4)
    decoder.set_linear(weight, bias, mean, components)
    expected = (mean + (rows @ weight.T + bias) @ components).view(3, 3, small, small)
    if side > small:
        expected = F.interpolate(expected, scale_factor=side / small, mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.allclose(decoder(rows), expected, atol=1e-4)
    assert decoder.components[5:].abs().sum() == decoder.code.weight[5:].abs().sum() == 0  # of COMPONENTS
    assert len(decoder.components) == COMPONENTS


def test_the_constants_do_not_learn_and_are_not_copied_in_every_step():
    decoder = LinearStart(8, 64).train()
    decoder(random_rows(2, 8)).square().mean().backward()
    assert {name for name, p in decoder.named_parameters() if p.grad is None} == {"mean", "components"}
    guard = StepGuard()
    guard.begin(decoder)
    assert sum(buffer.numel() for buffer in guard._buffers) < 1000


# The start


def fit_nothing(manifests, tmp_path, **options) -> EarTeacherLightningModule:
    """A module after the start of a run, before its first step."""
    config = small_config(manifests, output_dir=str(tmp_path), decoder_start="linear", metric_loss="none", **options)
    torch.manual_seed(0)
    module, data = EarTeacherLightningModule(config), EarDataModule(config)
    pl.Trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0, **PLAIN_TRAINER).fit(module, datamodule=data)
    return module.eval()


def clean_images(dataset) -> torch.Tensor:
    return torch.stack([dataset[row]["pixels"] for row in range(len(dataset))])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_starts_from_the_best_linear_map(manifests, tmp_path, workers):
    module = fit_nothing(manifests, tmp_path, num_workers=workers)
    data = module.trainer.datamodule
    crops = clean_images(data.clean_set)
    with torch.no_grad():
        rows, held_out = module(crops), clean_images(data.val_set)
        basis = PixelBasis.fit(crops, COMPONENTS)
        weight, bias = ridge(rows, basis.project(crops) / basis.deviations, basis.deviations)
        codes = (module(held_out) @ weight.T + bias) * basis.deviations
        found = module.model.decoder(module(held_out))
    expected = basis.reconstruct(codes).view(-1, 3, 64, 64)
    assert torch.allclose(found, expected, atol=1e-3)
    errors = [(each - to_unit(held_out)).square().mean((1, 2, 3)) for each in (found, basis.mean.view(3, 64, 64))]
    ours, of_the_mean = (float(psnr(each).mean()) for each in errors)
    assert ours > of_the_mean + 0.3  # of other people's ears, from random weights, in dB


def test_a_module_that_is_fitted_again_keeps_its_decoder(manifests, tmp_path):
    module = fit_nothing(manifests, tmp_path)
    with torch.no_grad():
        module.model.decoder.code.weight.fill_(0.5)  # as if it had learned
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0, **PLAIN_TRAINER)
    trainer.fit(module, datamodule=EarDataModule(module.config))
    assert (module.model.decoder.code.weight == 0.5).all()


def test_larger_images_start_from_components_of_64_pixels(manifests, tmp_path):
    module = fit_nothing(manifests, tmp_path, image_size=96)
    crops = clean_images(module.trainer.datamodule.clean_set)
    with torch.no_grad():
        error = (module.model.decoder(module(crops)) - to_unit(crops)).square().mean((1, 2, 3))
    of_the_mean = (to_unit(crops) - to_unit(crops).mean(0)).square().mean((1, 2, 3))
    assert psnr(error).mean() > psnr(of_the_mean).mean() + 1


def test_unreadable_images_are_left_out_of_it_and_counted(manifests, tmp_path):
    config = small_config(manifests, output_dir=str(tmp_path), decoder_start="linear", metric_loss="none", max_bad=0.5)
    module, data = EarTeacherLightningModule(config), EarDataModule(config)
    data.setup("fit")
    data.train_set.manifest.paths[3] = str(tmp_path / "gone.png")
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0, **PLAIN_TRAINER)
    trainer.fit(module, datamodule=data)
    assert [place for place in module.unreadable.errors] == [("train", 3)]
    assert module.model.decoder.components.abs().sum() > 0


def test_too_many_unreadable_images_end_the_run_there(manifests, tmp_path):
    config = small_config(manifests, output_dir=str(tmp_path), decoder_start="linear", metric_loss="none")
    module, data = EarTeacherLightningModule(config), EarDataModule(config)
    data.setup("fit")
    data.train_set.manifest.paths[3] = str(tmp_path / "gone.png")
    with pytest.raises(EarTeachError, match="more than --max-bad"):
        pl.Trainer(max_epochs=1, **PLAIN_TRAINER).fit(module, datamodule=data)
    assert module.model.decoder.components.abs().sum() == 0


def test_images_that_do_not_differ_leave_the_decoder_as_it_is(manifests, tmp_path, monkeypatch):
    from ear_teacher_cli.training import decoder_start

    same = torch.full((4, 3, 64, 64), 9, dtype=torch.uint8)
    monkeypatch.setattr(decoder_start, "clean_train_batches", lambda *_: [{"pixels": same}])
    module = fit_nothing(manifests, tmp_path)
    assert module.model.decoder.components.abs().sum() == 0
    monkeypatch.setattr(decoder_start, "clean_train_batches", lambda *_: [])
    start_decoder(module)
    assert module.model.decoder.mean.abs().sum() == 0


def test_ctrl_c_while_the_decoder_is_started_ends_the_run(manifests, tmp_path, monkeypatch, earteach):
    from ear_teacher_cli.training import decoder_start

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder_start, "clean_train_batches", interrupted)
    words = ["train", *manifests, *SMALL, "--max-epochs", 1, "--output-dir", tmp_path, "--decoder-start", "linear"]
    said = earteach(*words)
    assert said.code == 130 and "Traceback" not in said.err, said.err
    monkeypatch.undo()
    assert not list((tmp_path / "ear_teacher").rglob("*.ckpt"))


def test_a_checkpoint_of_an_earlier_version_opens_with_the_decoder_it_has(manifests, tmp_path):
    """Its hyper-parameters lack the options that came later; their defaults would build another model."""
    module = EarTeacherLightningModule(small_config(manifests, decoder_start="random"))
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **PLAIN_TRAINER)
    trainer.fit(module, datamodule=EarDataModule(module.config))
    path = tmp_path / "old.ckpt"
    trainer.save_checkpoint(path)
    content = read_checkpoint(path).content
    given = content["hyper_parameters"]
    for name in ("decoder_start", "anchor_weight"):
        del given[name]
    given["head_rate"], given["pretrained"] = given.pop("head_lr_mult"), True
    torch.save(content, path)
    back = EarTeacherLightningModule.load_from_checkpoint(path)
    assert type(back.model.decoder) is Decoder and back.model.anchor is None
    assert back.config.head_lr_mult == module.config.head_lr_mult and back.config.backbone == BACKBONE
    changed = EarTeacherLightningModule.load_from_checkpoint(path, learning_rate=0.5, map_location="cpu")
    assert changed.config.learning_rate == 0.5 and changed.config.image_size == 64
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), module.state_dict().values(), strict=True))

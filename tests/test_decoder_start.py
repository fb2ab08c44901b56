"""The start of the decoder: ridge regression of principal components of the training images on the embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import BACKBONE, SMALL, small_config

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.manifest import read_manifest, write_manifest
from ear_teacher_cli.data.preprocessing import to_unit
from ear_teacher_cli.errors import ConfigError, EarTeachError
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.model.decoder import COMPONENTS, Decoder, LinearStart, basis_side, build_decoder
from ear_teacher_cli.model.map_reader import MapReader
from ear_teacher_cli.quality.reconstruction import RIDGES, PixelBasis, psnr, ridge
from ear_teacher_cli.training.decoder_start import start_decoder
from ear_teacher_cli.training.guards import StepGuard
from ear_teacher_cli.training.module import EarTeacherLightningModule

PLAIN_TRAINER = dict(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def centre_and_deviations(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.mean(0), rows.std(0, correction=0)


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
    assert type(build_decoder(TrainConfig(decoder_start="linear", image_size=64), (8,))) is LinearStart
    assert type(build_decoder(TrainConfig(decoder_start="random", image_size=64), (8,))) is Decoder
    assert basis_side(32) == 32 and basis_side(224) == 64


def test_before_its_start_it_shows_mid_grey():
    decoder = LinearStart((8,), 64).eval()
    assert torch.equal(decoder(random_rows(2, 8)), torch.zeros(2, 3, 64, 64))


def test_the_linear_part_of_a_map_by_hand():
    """5 x 5 cells are averaged to 4 x 4; the convolutions get them on the grid of H/32 = 2 cells."""
    decoder, cells = LinearStart((3, 5, 5), 64).eval(), 4
    weight, bias, values = random_rows(2, 3 * cells**2), random_rows(2, seed=1), random_rows(30, 3 * cells**2, seed=5)
    mean, components = random_rows(3 * 64**2, seed=3), random_rows(2, 3 * 64**2, seed=4)
    decoder.set_linear(weight, bias, mean, components, *centre_and_deviations(values))
    maps = random_rows(2, 3, 5, 5, seed=2)
    averaged = [
        maps[:, :, i * 5 // 4 : -(-(i + 1) * 5 // 4), j * 5 // 4 : -(-(j + 1) * 5 // 4)].mean((2, 3))
        for i in range(cells)
        for j in range(cells)
    ]
    flat = torch.stack(averaged, 2).flatten(1)
    expected = (mean + (flat @ weight.T + bias) @ components).view(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(decoder(maps), expected, atol=1e-4)
        decoder.steps[-1].bias.fill_(0.5)
        assert torch.allclose(decoder(maps), expected + 0.5, atol=1e-4)
    assert decoder.start(F.adaptive_avg_pool2d(maps, 2)).shape == (2, 256, 2, 2)


@pytest.mark.parametrize("values", [10, 2000])
def test_a_step_of_adamw_moves_the_image_by_little_however_many_values_it_reads(values):
    """Unscaled, a step of 1e-3 on 2,000 values moves it by 0.2 standard deviations and more."""
    decoder = LinearStart((values,), 32).train()
    rows = 5 + 3 * random_rows(64, values)
    components = torch.linalg.qr(random_rows(3 * 32**2, 4))[0].T
    zeros = torch.zeros(4, values), torch.zeros(4), torch.zeros(3 * 32**2)
    decoder.set_linear(*zeros, components, *centre_and_deviations(rows))
    before = decoder(rows).detach()
    optimiser = torch.optim.AdamW([decoder.code.weight], lr=1e-3, weight_decay=0)
    (decoder(rows) - random_rows(64, 3, 32, 32, seed=9)).square().mean().backward()
    optimiser.step()
    moved = (decoder(rows) - before).detach().flatten(1) @ components.T  # of coefficients of unit variance
    assert 1e-4 < moved.square().mean().sqrt() < 1e-2


@pytest.mark.parametrize("side", [32, 64, 128])
def test_the_linear_part_by_hand(side):
    decoder, small = LinearStart((8,), side).eval(), basis_side(side)
    weight, bias, rows = random_rows(5, 8), random_rows(5, seed=1), random_rows(3, 8, seed=2)
    mean, components = random_rows(3 * small**2, seed=3), random_rows(5, 3 * small**2, seed=4)
    decoder.set_linear(weight, bias, mean, components, *centre_and_deviations(random_rows(30, 8, seed=5)))
    expected = (mean + (rows @ weight.T + bias) @ components).view(3, 3, small, small)
    if side > small:
        expected = F.interpolate(expected, scale_factor=side / small, mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.allclose(decoder(rows), expected, atol=1e-4)
    assert decoder.components[5:].abs().sum() == decoder.code.weight[5:].abs().sum() == 0  # of COMPONENTS
    assert len(decoder.components) == COMPONENTS


def test_the_constants_do_not_learn_and_are_not_copied_in_every_step():
    decoder = LinearStart((8,), 64).train()
    decoder(random_rows(2, 8)).square().mean().backward()
    assert {name for name, p in decoder.named_parameters() if p.grad is None} == {
        *("mean", "components", "centre", "scale")
    }
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


def test_a_run_that_decodes_maps_starts_from_the_best_linear_map_of_them(manifests, tmp_path):
    of_maps, of_embeddings = (fit_nothing(manifests, tmp_path, decoder_input=name) for name in ("map", "embedding"))
    crops = clean_images(of_maps.trainer.datamodule.clean_set)
    with torch.no_grad():
        maps = of_maps.model.decoder_input(*of_maps.features(crops))
        assert maps.shape == (24, 64, 2, 2) and torch.equal(of_maps.features(crops)[0], of_maps(crops))
        basis = PixelBasis.fit(crops, COMPONENTS)
        weight, bias = ridge(maps.flatten(1), basis.project(crops) / basis.deviations, basis.deviations)
        expected = basis.reconstruct((maps.flatten(1) @ weight.T + bias) * basis.deviations).view(-1, 3, 64, 64)
        assert torch.allclose(of_maps.model.decoder(maps), expected, atol=1e-3)
        errors = [
            (module.model.decoder(module.model.decoder_input(*module.features(crops))) - to_unit(crops)).square().mean()
            for module in (of_maps, of_embeddings)
        ]
        shown = of_maps.reconstruct(crops)
    assert errors[0] < errors[1]  # it keeps where things are
    assert (to_unit(shown) - expected.clamp(-1, 1)).abs().max() < 0.02


def test_a_random_backbone_starts_with_the_statistics_of_its_batches(manifests, tmp_path):
    """Its stored batch-norm statistics are those of no image: the first steps would see other embeddings."""
    options = dict(backbone="test_efficientnet", batch_size=24, decoder_input="map")
    module = fit_nothing(manifests, tmp_path, **options)
    fresh = EarTeacherLightningModule(module.config).model.backbone.state_dict()
    kept = [name for name in fresh if "running" in name or "num_batches" in name]
    assert kept and all(torch.equal(module.model.backbone.state_dict()[name], fresh[name]) for name in kept)
    crops = clean_images(module.trainer.datamodule.clean_set)
    module.train()
    with torch.no_grad():
        found = module.model.decoder(module.model.decoder_input(*module.features(crops)))
    of_the_mean = (to_unit(crops) - to_unit(crops).mean(0)).square().mean((1, 2, 3))
    assert psnr((found - to_unit(crops)).square().mean((1, 2, 3))).mean() > psnr(of_the_mean).mean() + 1


def test_the_loss_on_maps_does_not_need_the_embedding(manifests):
    """Its gradient ends in the last map: the average of the map is free for the other losses."""
    module = EarTeacherLightningModule(
        small_config(manifests, metric_loss="none", decoder_input="map", decoder_start="random")
    )
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    outputs = module.training_outputs({"pixels": pixels}, None)
    embedding, maps = outputs.embedding, outputs.maps
    loss = module.objective.training(outputs).total
    to_embedding, to_map = torch.autograd.grad(loss, [embedding, maps[32]], retain_graph=True)
    assert to_embedding.abs().sum() == 0 and to_map.abs().sum() > 0
    loss.backward()
    # DistributedDataParallel refuses parameters without one
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("backbone", ["test_vit", "test_byobnet"])
def test_backbones_of_other_kinds_have_a_last_map(manifests, backbone):
    config = small_config(manifests, metric_loss="none", backbone=backbone, image_size=160, decoder_input="map")
    module = EarTeacherLightningModule(config)
    pixels = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    assert module.reconstruct(pixels).shape == pixels.shape


def test_a_backbone_without_maps_is_refused_in_one_line():
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 32, 32), torch.nn.Flatten())
    with pytest.raises(
        ConfigError, match="decoder_input: .*has no feature maps; choose another backbone, or embedding"
    ):
        MapReader(plain, 32, None, "decoder_input", "embedding")


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


def without_an_image(manifests, tmp_path, **options):
    """The configuration of a run whose fourth training image is missing."""
    manifest = read_manifest(manifests[1])
    paths = [*manifest.paths[:3], "gone.png", *manifest.paths[4:]]
    write_manifest(replace(manifest, paths=paths), tmp_path / "train.csv")
    options |= dict(output_dir=str(tmp_path), decoder_start="linear", metric_loss="none")
    return small_config(manifests, train_metadata=str(tmp_path / "train.csv"), root_dir=str(manifest.root), **options)


def test_unreadable_images_are_left_out_of_it_and_counted(manifests, tmp_path):
    config = without_an_image(manifests, tmp_path, max_bad=0.5)
    module, data = EarTeacherLightningModule(config), EarDataModule(config)
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0, **PLAIN_TRAINER)
    trainer.fit(module, datamodule=data)
    assert [place for place in module.unreadable.errors] == [("train", 3)]
    assert module.model.decoder.components.abs().sum() > 0


def test_too_many_unreadable_images_end_the_run_there(manifests, tmp_path):
    config = without_an_image(manifests, tmp_path)
    module, data = EarTeacherLightningModule(config), EarDataModule(config)
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

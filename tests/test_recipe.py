"""The recipe beside reconstruction and classes: two views, gentle fine-tuning, moving average, whitening, sides."""

import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import BACKBONE, SMALL, read_epochs, read_table, small_config

from ear_teacher_cli import run_folder
from ear_teacher_cli.config import PRESETS, TrainConfig
from ear_teacher_cli.config_files import from_dict
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.augment import Augment
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.manifest import read_manifest, write_manifest
from ear_teacher_cli.data.preprocessing import preprocessing_of
from ear_teacher_cli.errors import ConfigError, EarTeachError
from ear_teacher_cli.model.checkpoint import read_checkpoint, read_safetensors
from ear_teacher_cli.model.freezing import freeze_to_stride, keep_statistics
from ear_teacher_cli.quality import collapse
from ear_teacher_cli.training.losses import consistency_loss, contrastive_loss
from ear_teacher_cli.training.optimisation import parameter_groups
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)
# The recommended recipe on a small scale.
RECOMMENDED = PRESETS["recommended"] | {"max_epochs": 2, "learning_rate": 1e-3}


def test_contrastive_loss_by_hand():
    views = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)  # 3 images, twice
    expected = 0.0
    for i in range(6):
        others = sum(math.exp(float(views[i] @ views[k]) / 0.2) for k in range(6) if k != i)
        expected -= math.log(math.exp(float(views[i] @ views[(i + 3) % 6]) / 0.2) / others) / 6
    assert float(contrastive_loss(7 * views, 0.2)) == pytest.approx(expected, rel=1e-5)
    assert float(contrastive_loss(torch.ones(8, 4), 0.2)) == pytest.approx(math.log(7), rel=1e-5)  # at chance


def test_contrastive_loss_is_lightlys():
    lightly = pytest.importorskip("lightly.loss", reason="compared with the package lightly where it is installed")
    views = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    theirs = lightly.NTXentLoss(temperature=0.3)(views[:6], views[6:])
    assert float(contrastive_loss(views, 0.3)) == pytest.approx(float(theirs), rel=1e-5)


def test_consistency_loss_pulls_predictions_and_leaves_projections_alone():
    projections = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    predictions = projections.detach().roll(3, 0).requires_grad_()
    loss = consistency_loss(predictions, projections)
    assert loss.item() == pytest.approx(-1)
    consistency_loss(torch.randn(6, 5).requires_grad_(), projections).backward()
    assert projections.grad is None


@pytest.mark.parametrize(
    ("name", "stride", "last_kept", "first_free"),
    [("convnext_atto", 8, "stages.1.", "stages.2."), ("tf_efficientnet_lite0", 8, "blocks.2.", "blocks.3.")],
)
def test_early_stages_are_kept_and_their_statistics_with_them(name, stride, last_kept, first_free):
    backbone = timm.create_model(name, num_classes=0)
    freeze_to_stride(backbone, stride)
    learns = {key: parameter.requires_grad for key, parameter in backbone.named_parameters()}
    assert not any(flag for key, flag in learns.items() if key.startswith((last_kept, "stem", "conv_stem", "bn1")))
    assert all(flag for key, flag in learns.items() if key.startswith(first_free))
    backbone.train()
    keep_statistics(backbone, everywhere=False)
    modes = {key: module.training for key, module in backbone.named_modules() if "BatchNorm" in type(module).__name__}
    assert not any(mode for key, mode in modes.items() if key.startswith((last_kept, "bn1")))
    assert all(mode for key, mode in modes.items() if key.startswith(first_free))


def test_a_stride_that_ends_no_stage_is_refused():
    with pytest.raises(ConfigError, match="freeze_stride: 8 ends no early stage"):
        freeze_to_stride(timm.create_model("vit_tiny_patch16_224", num_classes=0), 8)


def test_the_rate_falls_towards_the_stem_and_is_higher_in_the_heads():
    config = TrainConfig(layer_decay=0.5, head_lr_mult=4, learning_rate=1e-3, backbone=BACKBONE)
    whole = torch.nn.ModuleDict({"backbone": timm.create_model(BACKBONE, num_classes=0), "head": torch.nn.Linear(3, 2)})
    rate = {}
    for group in parameter_groups(whole, whole["backbone"], config):
        rate |= {id(parameter): group["lr"] for parameter in group["params"]}
    assert len(rate) == len(list(whole.parameters()))  # every one, once
    backbone = whole["backbone"]
    assert rate[id(whole["head"].weight)] == 4e-3
    assert rate[id(backbone.head.norm.weight)] == 1e-3  # the backbone's last layer has the whole rate
    stem, late = rate[id(backbone.stem[0].weight)], rate[id(backbone.stages[3].blocks[0].conv_dw.weight)]
    assert stem < late / 4


@pytest.fixture(scope="module")
def recommended(manifests, tmp_path_factory):
    """A run of the recommended recipe with a moving average, on random weights (where nothing is frozen)."""
    options = RECOMMENDED | {"ema_decay": 0.5, "denoise": True, "consistency_weight": 0.1, "layer_decay": 0.8}
    config = small_config(manifests, output_dir=str(tmp_path_factory.mktemp("recipe")), **options)
    return train(config, QUIET).experiment


@pytest.mark.slow
def test_the_recommended_recipe_is_exact_on_resume(recommended, manifests, tmp_path):
    copy = shutil.copytree(recommended, tmp_path / recommended.name)
    for path in (copy / "checkpoints").glob("*.ckpt"):
        if read_checkpoint(path).epoch != 1:
            path.unlink()
    resume(copy, QUIET)
    ours, theirs = (read_checkpoint(p / "checkpoints" / "last.ckpt").content for p in (copy, recommended))
    for part in ("state_dict", "learning_state", "whitening"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    assert [row["val/retrieval"] for row in read_table(copy / "metrics.csv")] == [
        row["val/retrieval"] for row in read_table(recommended / "metrics.csv")
    ]


def test_validation_and_checkpoints_have_the_moving_average(recommended):
    content = read_checkpoint(recommended / "checkpoints" / "last.ckpt").content
    average, now = content["state_dict"], content["learning_state"]
    assert set(average) == set(now) and "prototypes" in average
    moved = "model.backbone.stages.3.blocks.0.conv_dw.weight"
    assert not torch.equal(average[moved], now[moved])
    assert (average[moved] - now[moved]).abs().max() < 0.1  # one half-life of a few small steps away


def test_every_loss_of_two_views_is_written(recommended):
    row = read_epochs(recommended)[-1]
    total = sum(
        weight * float(row[f"train/{name}_loss"])
        for name, weight in {"recon": 3.0, "metric": 0.5, "contrastive": 1.0, "consistency": 0.1}.items()
    )
    assert float(row["train/loss"]) == pytest.approx(total, rel=1e-3)
    assert 0 < float(row["val/contrastive_loss"]) and -1 <= float(row["val/consistency_loss"]) <= 0.1


def test_embed_whitens_as_the_run_fitted_it_and_the_export_too(recommended, ears, tmp_path, earteach):
    out = tmp_path / "teacher.safetensors"
    said = earteach("export-backbone", recommended, out)
    assert said.code == 0 and "teacher.whitening.safetensors" in said.err
    for weights, name in ((recommended, "run"), (out, "export")):
        assert earteach("embed", ears / "eval.csv", tmp_path / f"{name}.npy", "--weights", weights).code == 0
    raw = earteach("embed", ears / "eval.csv", tmp_path / "raw.npy", "--weights", out, "--no-whiten")
    assert raw.code == 0
    run, export, plain = (np.load(tmp_path / f"{name}.npy") for name in ("run", "export", "raw"))  # noqa: TID251  (what our users will call)
    assert np.array_equal(run, export) and not np.allclose(run[:, : plain.shape[1]], plain[:, : run.shape[1]])
    fitted = read_safetensors(tmp_path / "teacher.whitening.safetensors")[0]
    expected = (plain - fitted["mean"].numpy()) @ fitted["matrix"].numpy()
    assert np.allclose(run, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)
    about = [json.loads((tmp_path / f"{name}.json").read_text())["whitened"] for name in ("run", "raw")]
    assert about == [True, False]
    (tmp_path / "teacher.whitening.safetensors").unlink()
    said = earteach("embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", out)
    assert said.code == 1 and "its whitening, teacher.whitening.safetensors, is not beside it" in said.err


def test_whitened_training_embeddings_are_white(recommended, ears, tmp_path, earteach):
    assert (
        earteach("embed", ears / "train_teacher.npy", tmp_path / "x.npy", "--weights", recommended, "--no-whiten").code
        == 0
    )
    rows = np.load(tmp_path / "x.npy").astype(float)  # noqa: TID251  (what our users will call)
    state = read_checkpoint(run_folder.best_checkpoint(recommended)).content["whitening"]
    white = (rows - state["mean"].numpy()) @ state["matrix"].numpy()
    assert np.abs(white.mean(0)).max() < 1e-3
    covariance = np.cov(white, rowvar=False, bias=True)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-2  # uncorrelated
    assert np.diag(covariance)[0] == pytest.approx(1, abs=0.2)  # shrinkage leaves the small components below 1


@pytest.mark.slow
@pytest.mark.parametrize(("monitor", "pick"), [("val/psnr", max), ("val/retrieval", max), ("val/recon_loss", min)])
def test_the_monitor_picks_the_best(monitor, pick, manifests, tmp_path):
    folder = train(small_config(manifests, output_dir=str(tmp_path), max_epochs=3, monitor=monitor), QUIET).experiment
    rows = read_epochs(folder)
    wanted = pick(float(row[monitor]) for row in rows)
    best = read_checkpoint(run_folder.best_checkpoint(folder)).epoch
    assert float(rows[best - 1][monitor]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_early_stop_ends_a_run_that_no_longer_improves(manifests, tmp_path):
    options = dict(max_epochs=6, learning_rate=1e-12, monitor="val/retrieval", early_stop=2)
    outcome = train(small_config(manifests, output_dir=str(tmp_path), **options), QUIET)
    assert outcome.epochs < 6


def test_two_views_differ_and_the_denoising_target_is_in_the_images_own_light(manifests):
    data = EarDataModule(small_config(manifests, **RECOMMENDED | {"denoise": True}))
    data.setup()
    item = data.train_set[3]
    assert not torch.equal(item["pixels"], item["view"])
    assert not torch.equal(item["pixels"], item["clean"])
    preprocessing = data.train_set.preprocessing
    clean, strong = data.clean_set[3]["pixels"], Augment(preprocessing, "strong")
    varied, target = strong.with_clean(clean, 5)
    assert torch.equal(varied, strong(clean, 5)) and varied.dtype == torch.uint8
    moved = Augment(preprocessing, "mild").with_clean(clean, 5)[1]
    assert torch.equal(target, moved)  # the light is the policy's, the place the seed's


def test_identity_classes_are_the_manifests_own(ears, tmp_path):
    manifest = read_manifest(ears / "ears.jsonl").subset(range(16))
    write_manifest(manifest, tmp_path / "known.csv")
    options = ["--train-metadata", str(tmp_path / "known.csv"), "--val-metadata", str(ears / "val_teacher.npy")]
    config = small_config(
        options, root_dir=str(ears), output_dir=str(tmp_path), pseudo_classes="identity", max_epochs=1
    )
    folder = train(config, QUIET).experiment
    state = read_checkpoint(folder / "checkpoints" / "last.ckpt").content["pseudo_classes"]
    pairs = list(zip(manifest.identities, manifest.sides, strict=True))
    assert state["count"] == len(set(pairs))
    labels = state["labels"].tolist()
    assert all((labels[i] == labels[j]) == (pairs[i] == pairs[j]) for i in range(16) for j in range(16))


def test_identity_classes_need_identities(manifests, tmp_path, earteach):
    said = earteach("train", *manifests, *SMALL, "--pseudo-classes", "identity", "--output-dir", tmp_path)
    assert said.code == 1 and "names 0 identities" in said.err and "choose kmeans" in said.err


@pytest.fixture
def sided(ears, tmp_path) -> list[str]:
    """The drawn ears with their sides."""
    whole = read_manifest(ears / "ears.jsonl")
    for name, rows in (("train", range(24)), ("val", range(24, 32))):
        write_manifest(whole.subset(rows), tmp_path / f"{name}.csv")
    return ["--train-metadata", str(tmp_path / "train.csv"), "--val-metadata", str(tmp_path / "val.csv")]


def test_separate_sides_share_no_class(sided, ears, tmp_path):
    config = small_config(sided, root_dir=str(ears), output_dir=str(tmp_path), side_policy="separate", max_epochs=1)
    folder = train(config, QUIET).experiment
    labels = read_checkpoint(folder / "checkpoints" / "last.ckpt").content["pseudo_classes"]["labels"].tolist()
    sides = read_manifest(sided[1], ears).sides
    by_side = {side: {x for x, s in zip(labels, sides, strict=True) if s == side} for side in set(sides)}
    assert len(by_side) == 2 and not set.intersection(*by_side.values()) and min(labels) == 0


@pytest.mark.slow
def test_mirroring_turns_right_ears_into_left_ones_wherever_the_run_goes(sided, ears, tmp_path, earteach):
    plain, mirrored = (
        EarDataModule(small_config(sided, root_dir=str(ears), side_policy=policy)) for policy in ("as-is", "mirror")
    )
    for data in (plain, mirrored):
        data.setup()
    for i, side in enumerate(plain.train_set.manifest.sides):
        expected = plain.clean_set[i]["pixels"]
        assert torch.equal(mirrored.clean_set[i]["pixels"], expected.flip(-1) if side == "right" else expected)
    config = small_config(sided, root_dir=str(ears), output_dir=str(tmp_path), side_policy="mirror", max_epochs=1)
    run = train(config, QUIET).experiment
    out = tmp_path / "teacher.safetensors"
    assert earteach("export-backbone", run, out).code == 0
    assert earteach("embed", sided[3], tmp_path / "x.npy", "--weights", out, "--root-dir", ears).code == 0
    assert json.loads((tmp_path / "x.json").read_text())["preprocessing"]["mirror"] is True


def test_a_side_policy_needs_sides(manifests, tmp_path, earteach):
    said = earteach("train", *manifests, *SMALL, "--side-policy", "mirror", "--output-dir", tmp_path)
    assert said.code == 1 and "has no side" in said.err and "leave --side-policy at as-is" in said.err


def test_random_weights_are_not_frozen(manifests):
    config = small_config(manifests, freeze_stride=8, freeze_statistics=True)
    assert config.kept_stride == 0 and not config.keeps_statistics
    assert TrainConfig(freeze_stride=8).kept_stride == 8 and TrainConfig().keeps_statistics


def test_the_recommended_preset_is_what_a_bare_train_does():
    assert TrainConfig(**PRESETS["recommended"]) == TrainConfig()
    assert set(PRESETS["recommended"]) == set(PRESETS["original"])


def test_augmentation_is_a_function_of_the_seed():
    preprocessing = preprocessing_of(BACKBONE, 64, 0.1, True)
    pixels = torch.arange(3 * 64 * 64).reshape(3, 64, 64).to(torch.uint8)
    strong = Augment(preprocessing, "strong", hflip=0.5)
    before = torch.random.get_rng_state()
    assert all(torch.equal(strong(pixels, seed), strong(pixels, seed)) for seed in range(8))
    assert len({strong(pixels, seed).float().mean().item() for seed in range(8)}) == 8
    assert torch.equal(before, torch.random.get_rng_state())  # and leaves the global generator alone


@pytest.mark.slow
def test_a_collapse_is_named_and_can_end_the_run(manifests, tmp_path, monkeypatch, earteach):

    monkeypatch.setattr(collapse, "FALLEN_RANK", 1e9)  # whatever it is, it counts as fallen
    words = ["train", *manifests, *SMALL, "--max-epochs", 1, "--output-dir", tmp_path]
    said = earteach(*words, "--experiment-name", "a")
    assert said.code == 0 and "embeddings COLLAPSED: effective rank" in said.err
    said = earteach(*words, "--experiment-name", "b", "--fail-on-collapse")
    assert said.code == 1 and "the embeddings collapse: effective rank" in said.err
    with pytest.raises(EarTeachError, match="holds no checkpoint"):
        run_folder.checkpoint_of(tmp_path / "b", best=True)


def test_a_monitor_that_cannot_be_measured_is_refused_before_training(manifests, tmp_path, earteach):
    lists = [manifests[0], manifests[3], manifests[2], manifests[1]]  # the training list names nobody
    said = earteach("train", *lists, *SMALL, "--monitor", "val/rank1", "--output-dir", tmp_path)
    assert (
        said.code == 2
        and "--monitor: val/rank1 needs identities with several images" in said.err
        and "epoch 1" not in said.err
    )


def test_a_checkpoint_of_before_these_options_keeps_its_recipe():
    old = {
        name: value for name, value in TrainConfig().as_dict().items() if name not in ("views", "contrastive_weight")
    }
    assert (from_dict(old, "old.ckpt").views, from_dict(old, "old.ckpt").contrastive_weight) == (1, 0.0)


def test_margin_presets_give_way_to_what_is_given():
    assert (TrainConfig().scale, TrainConfig().margin) == (30, 0.2)
    paper = TrainConfig(margin_preset="paper")
    assert (paper.scale, paper.margin) == (64, 0.5)
    assert (TrainConfig(arcface_margin=0.3).scale, TrainConfig(arcface_margin=0.3).margin) == (30, 0.3)


@pytest.fixture
def from_pretrained(run, manifests, tmp_path, earteach):
    """A run that starts from another run's backbone and keeps half of it."""
    assert earteach("export-backbone", run, tmp_path / "start.safetensors").code == 0
    options = RECOMMENDED | {"pretrained": True, "pretrained_path": str(tmp_path / "start.safetensors")}
    options |= {"anchor_weight": 0.0, "freeze_stride": 8, "baseline_weight": 0.5}
    return train(small_config(manifests, output_dir=str(tmp_path / "out"), **options), QUIET).experiment


def test_half_of_the_start_is_kept_in_what_is_handed_on(from_pretrained, tmp_path):
    start = read_safetensors(tmp_path / "start.safetensors")[0]
    checkpoint = read_checkpoint(from_pretrained / "checkpoints" / "last.ckpt")
    learned = checkpoint.content["learning_state"]
    moved = 0
    for name, tensor in checkpoint.backbone_state.items():
        half = (start[name] + learned[f"model.backbone.{name}"]) / 2
        assert torch.allclose(tensor, half, atol=1e-6), name
        moved += not torch.equal(start[name], learned[f"model.backbone.{name}"])
        assert not name.startswith(("stem.", "stages.0.", "stages.1.")) or torch.equal(tensor, start[name])
    assert moved > 10


@pytest.mark.slow
def test_keeping_half_is_exact_on_resume(from_pretrained, tmp_path):
    copy = shutil.copytree(from_pretrained, tmp_path / "again" / from_pretrained.name)
    for path in (copy / "checkpoints").glob("*.ckpt"):
        if read_checkpoint(path).epoch != 1:
            path.unlink()
    resume(copy, QUIET)
    ours, theirs = (read_checkpoint(p / "checkpoints" / "last.ckpt").content for p in (copy, from_pretrained))
    for part in ("state_dict", "learning_state", "whitening"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])

"""The anchor loss: feature maps of the teacher against those of the frozen pretrained backbone at twice the side."""

import functools
import shutil
import sys
from pathlib import Path

import forked
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL, metrics_of, read_epochs, small_config
from safetensors.torch import save_file

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.augment import Augment
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.preprocessing import normalise, preprocessing_of
from ear_teacher_cli.errors import ConfigError, EarTeachError
from ear_teacher_cli.model.anchor import Anchor
from ear_teacher_cli.model.checkpoint import read_checkpoint, read_safetensors
from ear_teacher_cli.model.teacher import TeacherModel, build_backbone
from ear_teacher_cli.training.averaging import Averages
from ear_teacher_cli.training.describe import describe
from ear_teacher_cli.training.dry_run import estimate
from ear_teacher_cli.training.module import EarTeacherLightningModule
from ear_teacher_cli.training.objectives import Objective, Outputs
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)
ANCHORED = {"pretrained": True, "anchor_weight": 3.0}
# What a run with an anchor has in its checkpoints; the rest as short as possible.
RECIPE = {
    **ANCHORED,
    "decoder_start": "linear",
    "augment": True,
    "augmentation": "strong",
    "metric_loss": "none",
    "max_epochs": 2,
}


def pixels_of(count: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth images uint8 B,3,H,W."""
    drawn = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(drawn.float(), size=(side, side), mode="bicubic").clamp(0, 255).byte()


def teacher(backbone: str = "test_convnext", **options) -> TeacherModel:
    torch.manual_seed(0)
    return TeacherModel(small_config([""] * 4, backbone=backbone, **ANCHORED | options), heads=())


def loss_of(model: TeacherModel, pixels: torch.Tensor) -> torch.Tensor:
    assert model.anchor is not None
    return model.anchor(model.embed_with_maps(normalise(pixels, model.anchor.preprocessing))[1], pixels)


# The maps


@pytest.mark.parametrize("backbone", ["test_convnext", "test_efficientnet", "test_resnet", "test_nfnet"])
@pytest.mark.parametrize("training", [False, True])
def test_the_maps_come_with_the_embedding_that_is_exported(backbone, training):
    model = teacher(backbone).train(training)
    images = normalise(pixels_of(2), model.anchor.preprocessing)
    with torch.no_grad():
        embedding, maps = model.embed_with_maps(images)
        assert torch.equal(embedding, model.embed(images))
    assert {stride: found.shape[2:] for stride, found in maps.items()} == {8: (8, 8), 16: (4, 4), 32: (2, 2)}
    assert model.anchor.pairs == [(8, 8), (16, 16), (32, 32), (8, 16), (16, 32)]
    assert {stride: tuple(found.shape[1:]) for stride, found in maps.items()} == model.anchor.reader.shapes


def test_without_an_anchor_and_a_decoder_of_maps_there_are_no_maps():
    model = teacher(anchor_weight=0, decoder_input="embedding").eval()
    images = torch.randn(1, 3, 64, 64)
    embedding, maps = model.embed_with_maps(images)
    assert maps == {} and torch.equal(embedding, model.embed(images))


@pytest.mark.parametrize(
    ("backbone", "options", "found"),
    [
        ("test_vit", {}, "test_vit takes images of one size only"),
        ("mixer_s32_224", {"image_size": 224}, "takes images of one size only"),
    ],
)
def test_a_backbone_without_maps_is_refused_in_one_line(backbone, options, found):
    with pytest.raises(ConfigError, match=f"anchor_weight: .*{found}.*; choose another backbone, or 0"):
        teacher(backbone, freeze_stride=0, **options)
    other = {"anchor_weight": 0, "decoder_input": "embedding"}
    assert teacher(backbone, freeze_stride=0, **options, **other).anchor is None


def test_a_module_that_timm_gives_no_maps_of_is_refused():
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 32, 32), torch.nn.Flatten())
    with pytest.raises(ConfigError, match="has no feature maps; choose another backbone, or 0"):
        Anchor(plain, preprocessing_of("test_convnext", 64, 0.1, True))


def test_a_backbone_whose_embedding_is_not_made_of_its_maps_is_refused():
    backbone = build_backbone("test_convnext", 64).eval()
    backbone.forward_features = lambda images: torch.zeros(len(images), 64, 2, 2)
    with pytest.raises(ConfigError, match="embedding is not made of its maps"):
        Anchor(backbone, preprocessing_of("test_convnext", 64, 0.1, True))


def test_train_refuses_it_before_anything_is_written(manifests, tmp_path, earteach):
    words = [*manifests, *SMALL, "--pretrained", "--anchor-weight", 1, "--backbone", "test_vit"]
    said = earteach("train", *words, "--output-dir", tmp_path / "out")
    assert said.code == 2 and not (tmp_path / "out").exists()
    assert said.err.strip().splitlines()[-1].startswith("earteach: --anchor-weight: test_vit takes images of one size")


# The loss


def by_hand(model: TeacherModel, pixels: torch.Tensor) -> float:
    """The loss from its description."""
    anchor, pairs = model.anchor, []
    mean, std = (torch.tensor(getattr(anchor.preprocessing, name)).view(1, 3, 1, 1) for name in ("mean", "std"))
    larger = F.interpolate(pixels.float(), size=(128, 128), mode="bicubic").clamp(0, 255) / 255
    with torch.no_grad():
        small = model.backbone.forward_intermediates((pixels / 255 - mean) / std, intermediates_only=True)
        large = anchor.backbone.forward_intermediates((larger - mean) / std, intermediates_only=True)
        ours, theirs = ({64 // found.shape[-1] * k: found for found in maps} for maps, k in ((small, 1), (large, 2)))
        for stride, of in [(8, 8), (16, 16), (32, 32), (8, 16), (16, 32)]:
            given, target = ours[stride], theirs[of]
            if of == stride:
                target = F.avg_pool2d(target, 2)
            average = target.mean((0, 2, 3)).view(1, -1, 1, 1)
            deviation = target.transpose(0, 1).flatten(1).std(1).view(1, -1, 1, 1)
            deviation = deviation.clamp_min(max(1e-3, 0.01 * float(deviation.mean())))
            target = (target - average) / deviation
            given = (given - average) / deviation if of == stride else given
            weights = anchor.predictors[f"{stride}_{of}"]
            predicted = torch.einsum("oi,bihw->bohw", weights.weight[:, :, 0, 0], given) + weights.bias.view(
                1, -1, 1, 1
            )
            error = (predicted - target).abs()
            smooth = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
            cosine = (predicted * target).sum(1) / (predicted.norm(dim=1) * target.norm(dim=1))
            pairs.append(smooth + (1 - cosine).mean())
    return float(torch.stack(pairs).mean())


@pytest.mark.parametrize("backbone", ["test_convnext", "test_resnet"])
def test_the_loss_by_hand(backbone):
    model, pixels = teacher(backbone).eval(), pixels_of(4)
    assert loss_of(model, pixels).item() == pytest.approx(by_hand(model, pixels), rel=1e-4)


def test_the_targets_are_those_of_the_image_at_twice_the_side():
    anchor = teacher().anchor
    flat = torch.full((1, 3, 64, 64), 77, dtype=torch.uint8)  # enlarged it is the same
    expected = anchor.reader(anchor.backbone, normalise(flat.new_full((1, 3, 128, 128), 77), anchor.preprocessing))[1]
    found = anchor.targets(flat)
    assert {stride: maps.shape[2:] for stride, maps in found.items()} == {8: (16, 16), 16: (8, 8), 32: (4, 4)}
    for stride, maps in found.items():
        assert torch.allclose(maps, expected[stride], atol=1e-4), stride


def test_equal_strides_start_as_the_identity():
    anchor = teacher().anchor
    for stride in anchor.reader.strides:
        given = torch.randn(2, anchor.reader.shapes[stride][0], 4, 4)
        assert torch.allclose(anchor.predictors[f"{stride}_{stride}"](given), given, atol=1e-6)


def test_a_channel_that_hardly_varies_does_not_have_all_the_gradient():
    """Behind a ReLU a channel may be 0 in a whole batch; standardised by a tiny deviation, any other value would count
    a thousandfold."""
    model = teacher("test_resnet").eval()
    maps = model.anchor.targets(pixels_of(4))
    target = maps[16].clone()
    target[:, 0] = 0
    given = F.avg_pool2d(target, 2).requires_grad_()
    model.anchor._distance(given + 0.01, target, 16, 16).backward()
    share = given.grad[:, 0].abs().mean() / given.grad[:, 1:].abs().mean(dim=(0, 2, 3)).median()
    assert share < 200


def test_the_loss_falls_and_the_frozen_backbone_stays(manifests):
    model = teacher("test_efficientnet", freeze_stride=0, freeze_statistics=False).train()
    assert model.anchor.training and not any(module.training for module in model.anchor.backbone.modules())
    before = {name: tensor.clone() for name, tensor in model.anchor.backbone.state_dict().items()}
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, pixels, losses = torch.optim.AdamW(learned, 1e-3), pixels_of(8), []
    for _ in range(6):
        loss = loss_of(model, pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in model.anchor.backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.anchor.backbone.state_dict().items())
    moved = dict(model.backbone.named_parameters())["conv_stem.weight"]
    assert moved.grad is not None and moved.grad.abs().sum() > 0  # it reaches the stem through the maps


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_half_precision_changes_the_loss_little(precision):
    model, pixels = teacher().eval(), pixels_of(4)
    with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
        loss = loss_of(model, pixels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_of(model, pixels).item(), rel=0.02)


# In the objective


def test_the_term_is_part_of_runs_with_pretrained_weights_only():
    config = TrainConfig(anchor_weight=2.0, image_size=96)
    assert "2 anchor (maps of the pretrained backbone at 192 px)" in dict(describe(config))["learns by"]
    assert not [term for term in Objective(TrainConfig(pretrained=False)).terms if term.name == "anchor"]
    assert EarTeacherLightningModule(small_config([""] * 4, anchor_weight=3.0)).model.anchor is None


def test_without_pretrained_weights_the_anchor_alone_leaves_nothing_to_learn():
    options = {"reconstruction_weight": 0, "contrastive_weight": 0, "metric_weight": 0, "anchor_weight": 1}
    assert TrainConfig(**options).is_anchored
    with pytest.raises(ConfigError, match="0 leaves nothing to learn"):
        TrainConfig(**options, pretrained=False)


@pytest.fixture(scope="module")
def batch(manifests):
    """A training batch of a run with an anchor."""
    data = EarDataModule(small_config(manifests, **RECIPE, views=2))
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_the_first_view_is_compared_with_itself_without_changes_of_colour(batch, manifests):
    config = small_config(manifests, **RECIPE, views=2, contrastive_weight=1.0)
    module = EarTeacherLightningModule(config).eval()
    assert not torch.equal(batch["clean"], batch["pixels"])
    with torch.no_grad():
        found = module.objective.training(module.training_outputs(batch, None))
        maps = module.model.embed_with_maps(normalise(batch["pixels"], module.preprocessing))[1]
        expected = module.model.anchor(maps, batch["clean"])
    assert found.metrics["anchor_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    parts = {"recon": 1, "anchor": 3, "contrastive": 1}
    total = sum(weight * found.metrics[f"{name}_loss"].item() for name, weight in parts.items())
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    # without --denoise the reconstruction is still of the view itself
    assert torch.equal(module.training_outputs(batch, None).target, batch["pixels"])


def test_reconstruction_and_anchor_alone_have_no_ratio_of_gradients(batch, manifests):
    module = EarTeacherLightningModule(small_config(manifests, **RECIPE)).train()
    outputs = module.training_outputs({name: batch[name] for name in ("pixels", "clean")}, None)
    found = module.objective.training(outputs)
    assert module.objective.gradient_ratio(found, outputs) is None  # the anchor acts on the maps alone
    found.total.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)  # as DDP demands


def test_a_validation_batch_of_one_image_has_no_anchor_loss(batch, manifests):
    module = EarTeacherLightningModule(small_config(manifests, **RECIPE)).eval()
    one = batch["pixels"][:1]
    with torch.no_grad():
        embedding, maps = module.model.embed_with_maps(normalise(one, module.preprocessing))
        found = module.objective.validation(Outputs(module.model, embedding, one, None, one, maps))
    assert set(found.metrics) == {"loss", "recon_loss", "psnr"}


def test_data_of_another_configuration_are_refused(manifests):
    """The anchor's image would have the changes of colour, and nobody would notice."""
    from ear_teacher_cli.training.guards import require_data

    config = small_config(manifests, **RECIPE)
    data = EarDataModule(small_config(manifests, augment=True))
    data.setup("fit")
    with pytest.raises(EarTeachError, match="give EarDataModule the same anchor_weight"):
        require_data(config, data.train_set.preprocessing, data)


def test_the_clean_image_has_the_geometry_of_the_view():
    pixels, preprocessing = pixels_of(1)[0], preprocessing_of("test_convnext", 64, 0.1, True)
    view, clean = Augment(preprocessing, "strong", hflip=1.0).with_clean(pixels, 7)
    assert not torch.equal(view, clean) and not torch.equal(clean, pixels)
    without = Augment(preprocessing, "strong", hflip=0.0).with_clean(pixels, 7)[1]
    assert torch.equal(clean, without.flip(-1))


# In a run


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Weights to start from."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def anchored(manifests, start, tmp_path_factory) -> Path:
    """An experiment with anchor, linear start of the decoder, moving average and mean with the initial weights."""
    options = RECIPE | {"pretrained_path": str(start), "ema_decay": 0.5, "baseline_weight": 0.5, "freeze_stride": 8}
    folder = tmp_path_factory.mktemp("anchored")
    return train(small_config(manifests, output_dir=str(folder), **options), QUIET).experiment


def last(run: Path):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_a_run_keeps_the_pretrained_weights_as_its_anchor(anchored, start):
    state, given = last(anchored).model_state, read_safetensors(start)[0]
    for name, tensor in given.items():
        assert torch.equal(state[f"anchor.backbone.{name}"], tensor), name
    rows = read_epochs(anchored)
    assert float(rows[1]["train/anchor_loss"]) < float(rows[0]["train/anchor_loss"])
    assert 0 < float(rows[1]["val/anchor_loss"]) < 5
    for row in rows:
        total = float(row["train/recon_loss"]) + 3 * float(row["train/anchor_loss"])
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_what_is_frozen_is_saved_once_and_not_averaged(anchored):
    content = last(anchored).content
    average, state, learning = content["averages"]["average"], content["state_dict"], content["learning_state"]
    frozen = ("model.anchor.backbone.", "model.backbone.stem.", "model.decoder.components", "model.decoder.mean")
    assert "model.anchor.predictors.8_8.weight" in average and "model.decoder.code.weight" in average
    assert not [name for name in average if name.startswith(frozen)]
    assert set(state) == set(learning)
    for name in state:
        if name.startswith(frozen):
            assert state[name].data_ptr() == learning[name].data_ptr(), name


@pytest.mark.slow
def test_resume_with_anchor_and_linear_start_is_exact_without_the_pretrained_file(anchored, start, tmp_path):
    copy = shutil.copytree(anchored, tmp_path / anchored.name)
    for path in (copy / "checkpoints").glob("*.ckpt"):
        if read_checkpoint(path).epoch != 1:
            path.unlink()
    hidden = start.rename(start.with_suffix(".hidden"))
    try:
        resume(copy, QUIET)
    finally:
        hidden.rename(start)
    ours, theirs = last(copy).content, last(anchored).content
    for part in ("state_dict", "learning_state"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    assert metrics_of(copy) == metrics_of(anchored)


@pytest.mark.slow
def test_exports_and_embeddings_have_nothing_of_the_anchor(anchored, ears, tmp_path, earteach):
    out = tmp_path / "teacher.safetensors"
    assert earteach("export-backbone", anchored, out).code == 0
    tensors, header = read_safetensors(out)
    assert tensors.keys() == timm.create_model("test_convnext", num_classes=0).state_dict().keys()
    assert not [name for name in header if "anchor" in name]
    assert earteach("verify", out, "--against", anchored).code == 0
    assert earteach("embed", ears / "eval.csv", tmp_path / "rows.npy", "--weights", anchored).code == 0
    said = earteach("collage", anchored, "-o", tmp_path / "collage.png")
    assert said.code == 0, said.err
    module = EarTeacherLightningModule.load_from_checkpoint(anchored / "checkpoints" / "last.ckpt")
    assert module.model.anchor is not None and not module.config.denoise


@pytest.mark.slow
def test_the_initial_weights_of_another_run_are_its_backbone_not_its_anchor(anchored, manifests):
    path = anchored / "checkpoints" / "last.ckpt"
    module = EarTeacherLightningModule(small_config(manifests, **ANCHORED, pretrained_path=str(path)))
    module.load_pretrained()
    for name, tensor in last(anchored).backbone_state.items():
        assert torch.equal(module.model.backbone.state_dict()[name], tensor)
        assert torch.equal(module.model.anchor.backbone.state_dict()[name], tensor)


@pytest.mark.slow
def test_dry_run_counts_the_anchor(manifests, start):
    common = {**RECIPE, "pretrained_path": str(start), "max_epochs": 5, "decoder_start": "random"}
    with_anchor, without = (
        estimate(small_config(manifests, **common | {"anchor_weight": weight}), QUIET)[1] for weight in (3.0, 0.0)
    )
    frozen = 4 * sum(p.numel() for p in build_backbone("test_convnext", 64).parameters())
    predictors = 4 * sum(p.numel() for p in teacher().anchor.predictors.parameters())
    # three best, one of five epochs, of which the last is another name; predictors with AdamW's two moments
    each = (with_anchor.bytes - without.bytes) / (frozen + 3 * predictors)
    assert each == 4
    assert with_anchor.loss > without.loss


@pytest.mark.slow
def test_two_processes_train_with_one_anchor_and_one_start(manifests, start, tmp_path):
    words = ["train", *manifests, *SMALL, "--batch-size", 4, "--max-epochs", 1, "--output-dir", tmp_path]
    words += ["--pretrained", "--pretrained-path", start, "--anchor-weight", 3, "--decoder-start", "linear"]
    words += ["--metric-loss", "none", "--devices", 2, "--accelerator", "cpu", "--freeze-stride", 8]
    done = forked.run([sys.executable, "-m", "ear_teacher_cli", *map(str, words)])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    state, given = last(tmp_path / "ear_teacher").model_state, read_safetensors(start)[0]
    for name, tensor in given.items():
        assert torch.equal(state[f"anchor.backbone.{name}"], tensor), name
    assert state["decoder.components"].abs().sum() > 0
    assert 0 < float(read_epochs(tmp_path / "ear_teacher")[0]["train/anchor_loss"]) < 10


def test_averages_leave_out_what_is_frozen():
    module = EarTeacherLightningModule(small_config([""] * 4, **ANCHORED, freeze_stride=8))
    copies = Averages(0.9, 0.5)._result(module)
    assert set(copies) < set(module.state_dict())
    assert not [name for name in copies if name.startswith(("model.anchor.backbone", "model.backbone.stem"))]
    assert "model.backbone.stages.3.blocks.0.conv_dw.weight" in copies


@pytest.mark.slow
def test_compiling_covers_the_maps_and_changes_nothing(monkeypatch):
    """With the compiler that runs the captured graphs as they are: a break of the graph is an error."""
    model, pixels = teacher().eval(), pixels_of(2)
    expected, names = loss_of(model, pixels).item(), list(model.state_dict())
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_parts()
    assert loss_of(model, pixels).item() == pytest.approx(expected, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the teacher and its anchor
    assert list(model.state_dict()) == names

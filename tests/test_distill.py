"""Test distillation: `earteach distill` from teacher to opened student, and the losses for students of one's own."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import metrics_of
from PIL import Image
from safetensors.torch import load_file
from test_resume import assert_same_weights, copy_back_to
from torch import nn

import ear_teacher_cli.distillation.distillation as losses
from ear_teacher_cli import run_folder
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.config_files import read_config
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.distill_config import NOT_OF_DISTILLATION, SET_BY_COMMAND, DistillConfig
from ear_teacher_cli.distillation import Distillation, Teacher, config_for
from ear_teacher_cli.errors import ConfigError, EarTeachError, WeightsError
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)
WORDS = ["--no-pretrained", "--batch-size", "8", "--num-workers", "0", "--no-report"]


def small(teacher: Path, manifests: list[str], outputs: Path, **changes) -> DistillConfig:
    options = {
        "train_metadata": manifests[1],
        "val_metadata": manifests[3],
        "backbone": "test_convnext2",
        "pretrained": False,
        "batch_size": 8,
        "num_workers": 0,
        "report": False,
        "max_epochs": 2,
        "output_dir": str(outputs),
        "experiment_name": "student",
    }
    return config_for(teacher, **options | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "size", "out"),
    [
        ("mobilenetv3_small_050", 64, "student.safetensors"),
        ("resnet10t", 32, "student/"),
        ("convnext_atto", 96, "student.onnx"),
    ],
)
def test_a_student_of_timm_is_distilled_exported_and_opened(exports, manifests, tmp_path, earteach, student, size, out):
    words = [exports / "teacher", f"{tmp_path}/{out}", "--student", student, "--student-size", size, *manifests, *WORDS]
    made = earteach("distill", *words, "--max-epochs", 1, "--output-dir", tmp_path / "runs")
    assert made.code == 0, made.err
    assert f"teacher: {exports}/teacher at 64 px" in made.err
    assert "1 map loss (strides 4, 8, 16), 1 embedding loss, 1 relation loss" in made.err
    assert earteach("verify", f"{tmp_path}/{out}").code == 0
    images = torch.rand(2, 3, size, size)
    if out == "student.safetensors":
        opened = timm.create_model(student, num_classes=0, checkpoint_path=tmp_path / out).eval()
        assert opened(images).ndim == 2
    elif out == "student/":
        maps = timm.create_model(f"local-dir:{tmp_path / out}", pretrained=True, features_only=True).eval()
        assert [each.shape[-1] for each in maps(images)] == [16, 8, 4, 2, 1]
        card = (tmp_path / out / "README.md").read_text()
        fingerprint = json.loads((exports / "teacher" / "features.json").read_text())["fingerprint"]
        assert "student" in card and fingerprint in card and str(exports) not in card
    metrics = metrics_of(tmp_path / "runs" / "student")[-1]
    for name in ("map", "embedding", "relation"):
        assert 0 < float(metrics[f"val/{name}_loss"]) < 3
    assert not any("psnr" in name or "recon" in name for name in metrics)


@pytest.mark.slow
def test_distillation_brings_the_student_to_the_teacher(exports, manifests, tmp_path):
    outcome = train(small(exports / "teacher", manifests, tmp_path, max_epochs=8, batch_size=2), QUIET)
    first, last = (metrics_of(outcome.experiment)[epoch] for epoch in (1, -1))
    for name in ("map", "embedding", "relation"):
        assert float(last[f"train/{name}_loss"]) < 0.9 * float(first[f"train/{name}_loss"]), name


@pytest.mark.slow
def test_a_resumed_distillation_is_the_uninterrupted_one_and_exports(exports, manifests, tmp_path, earteach):
    teacher, out = exports / "teacher.safetensors", tmp_path / "student.safetensors"  # maps are measured at the start
    options = {"max_epochs": 3, "checkpoint_every_n_epochs": 1, "ema_decay": 0.5, "out": str(out)}
    whole = train(small(teacher, manifests, tmp_path, **options), QUIET).experiment
    copy = copy_back_to(whole, 2, tmp_path)
    said = earteach("resume", copy)
    assert said.code == 0, said.err
    assert_same_weights(whole, copy)
    assert metrics_of(copy) == metrics_of(whole)
    backbone = read_checkpoint(run_folder.checkpoint_of(copy, best=True)).backbone_state
    exported = load_file(out)
    assert all(torch.equal(exported[name], backbone[name]) for name in exported)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_teacher_it_began_with(exports, run, manifests, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(exports / "teacher.safetensors", teacher)
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path)
    whole = train(small(teacher, manifests, tmp_path, checkpoint_every_n_epochs=1), QUIET).experiment
    copy = copy_back_to(whole, 1, tmp_path)
    teacher.unlink()
    with pytest.raises(WeightsError, match="no such file"):
        resume(copy, QUIET)
    from ear_teacher_cli.export.export import export_backbone

    export_backbone(run, teacher)
    with pytest.raises(WeightsError, match="is not the teacher that this run began with"):
        resume(copy, QUIET)


@pytest.mark.slow
def test_the_run_of_a_student_can_be_read_and_reported(exports, manifests, tmp_path, earteach):
    config = small(exports / "teacher", manifests, tmp_path, max_epochs=1)
    outcome = train(config, QUIET)
    assert read_config(outcome.experiment / "config.toml") == config.__class__(
        **{**config.as_dict(), "precision": "32-true"}
    )
    assert earteach("report", outcome.experiment).code == 0
    page = (outcome.experiment / "report.html").read_text()
    assert "Map loss" in page and "PSNR" not in page and str(exports) not in page
    said = earteach("collage", outcome.experiment, "-o", tmp_path / "collage.png")
    assert said.code == 1 and "reconstructs nothing" in said.err
    assert earteach("embed", manifests[3], tmp_path / "rows.npy", "--weights", outcome.experiment).code == 0


@pytest.mark.parametrize("teacher", ["teacher", "teacher.safetensors"])
def test_a_dry_run_writes_nothing(teacher, exports, manifests, tmp_path, earteach):
    words = [exports / teacher, tmp_path / "s.onnx", "--student", "test_resnet", *manifests, *WORDS, "--dry-run"]
    said = earteach("distill", *words, "--output-dir", tmp_path)
    assert said.code == 0 and "one training step" in said.err, said.err
    assert 'backbone = "test_resnet"' in said.out.decode() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("teacher", "words", "said"),
    [
        ("nothing", ["--student", "resnet10t"], "nothing: no such file"),
        ("text.safetensors", ["--student", "resnet10t"], "damaged, or not a safetensors file"),
        ("foreign.safetensors", ["--student", "resnet10t"], "was not written by earteach"),
        ("teacher.onnx", ["--student", "resnet10t"], "is for onnxruntime; give the checkpoint or a .safetensors export"),
        ("teacher", [], "--student: no model was named"),
        ("teacher", ["--student", "resnet10"], "--student: timm has no model 'resnet10'; did you mean"),
        ("teacher", ["--student", "resnet10t", "--student-size", "100"], "--student-size: 100 is not a multiple of 32"),
        ("teacher", ["--student", "resnet10t", "--strides", "four"], "--strides: 'four' is no list of whole numbers"),
        ("teacher", ["--student", "resnet10t", "--strides", ","], "--strides: ',' names no stride"),
        ("teacher", ["--student", "resnet10t", "--strides", "4,6"], "strides 4, 8, 16, 32, none of 6"),
        ("teacher", ["--student", "levit_128s", "--strides", "4"], "--strides: levit_128s has maps of 16, 32, 64, not of 4"),
        ("teacher", ["--student", "vit_tiny_patch16_224"], "--map-weight: the backbone has no feature maps"),
        ("teacher", ["--student", "resnet10t", "--map-weight", "0", "--embedding-weight", "0", "--relation-weight", "0"],
         "--map-weight: 0 leaves nothing to learn"),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_is_told_in_one_line(exports, manifests, tmp_path, earteach, teacher, words, said):
    (tmp_path / "text.safetensors").write_text("no weights")
    shutil.copy(exports / "teacher.onnx", tmp_path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    given = exports / "teacher" if teacher == "teacher" else tmp_path / teacher
    found = earteach(
        "distill", "-q", given, tmp_path / "s.safetensors", *words, *manifests, *WORDS, "--output-dir", tmp_path
    )
    assert found.code in (1, 2) and said in found.err, found.err
    assert len(found.err.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.safetensors").exists()


def test_an_output_that_exists_is_not_replaced(exports, manifests, tmp_path, earteach):
    (tmp_path / "s.safetensors").write_text("mine")
    said = earteach("distill", exports / "teacher", tmp_path / "s.safetensors", "--student", "test_resnet", *manifests)
    assert said.code == 2 and "exists already" in said.err
    assert (tmp_path / "s.safetensors").read_text() == "mine"


def test_a_folder_of_the_runs_name_is_not_its_output(exports, manifests, tmp_path, earteach):
    words = ["distill", exports / "teacher", f"{tmp_path}/s/", "--student", "test_resnet", *manifests]
    said = earteach(*words, "--output-dir", tmp_path)
    assert said.code == 2 and "--experiment-name: the run (" in said.err and "would lie in one another" in said.err


@pytest.mark.slow
def test_a_teacher_is_never_overwritten(exports, run, manifests, tmp_path, earteach):
    copy = shutil.copytree(run, tmp_path / "runs" / "first")
    teacher = shutil.copytree(exports / "teacher", tmp_path / "teacher")
    (tmp_path / "runs" / "model").mkdir()
    words = ["--student", "test_resnet", *manifests, *WORDS, "--overwrite", "--output-dir", tmp_path / "runs"]
    for given, out in (
        (copy, tmp_path / "first.safetensors"),
        (teacher, f"{teacher}/"),
        (teacher, teacher / "model.safetensors"),
        (teacher, tmp_path / "runs" / "model" / "model.safetensors"),
    ):
        said = earteach("distill", given, out, *words)
        assert said.code == 2 and "would lie in one another" in said.err, said.err
    assert (copy / "checkpoints").is_dir() and (teacher / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_export_is_written_again_by_its_run_only(exports, manifests, tmp_path, earteach):
    out = tmp_path / "student.safetensors"
    words = ["distill", exports / "teacher", out, "--student", "test_resnet", *manifests, *WORDS, "--max-epochs", 1]
    made = earteach(*words, "--output-dir", tmp_path / "runs")
    assert made.code == 0, made.err
    first, folder = out.read_bytes(), tmp_path / "runs" / "student"
    finished = earteach("resume", folder)  # nothing to train, and nothing to export
    assert finished.code == 0 and "collage" not in finished.err and "earteach verify" in finished.err
    out.unlink()
    out.with_suffix(".whitening.safetensors").unlink()
    assert earteach("resume", folder).code == 0 and out.read_bytes() == first
    assert earteach("resume", folder, "--max-epochs", 2).code == 0  # it may replace its own
    out.write_bytes(b"of somebody else")
    said = earteach("resume", folder, "--max-epochs", 3)
    assert said.code == 2 and "exists already" in said.err and len(metrics_of(folder)) == 3  # nothing was trained
    assert out.read_bytes() == b"of somebody else"


@pytest.mark.slow
def test_a_whitening_of_another_export_stops_before_training(exports, manifests, tmp_path, earteach):
    shutil.copy(exports / "teacher.safetensors", tmp_path / "a.safetensors")
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path / "a.whitening.safetensors")
    words = ["distill", exports / "teacher", tmp_path / "a.onnx", "--student", "test_resnet", *manifests, *WORDS]
    said = earteach(*words, "--output-dir", tmp_path / "runs")
    assert said.code == 2 and "belongs to a.safetensors" in said.err and not (tmp_path / "runs").exists()


def test_a_configuration_of_a_distillation_is_read_by_distill_only(exports, manifests, tmp_path, earteach):
    words = ["distill", exports / "teacher", tmp_path / "s.onnx", "--student", "test_resnet", *manifests, *WORDS]
    text = earteach(*words, "--strides", "8,16", "--dry-run").out.decode()
    (tmp_path / "c.toml").write_text(text)
    again = earteach("distill", exports / "teacher", tmp_path / "s.onnx", "--config", tmp_path / "c.toml", "--dry-run")
    assert again.code == 0 and again.out.decode() == text
    said = earteach("train", "--config", tmp_path / "c.toml")
    assert said.code == 1 and "is an option of earteach distill; give the file to that command" in said.err


def test_a_monitor_that_a_student_has_not_is_refused(exports, manifests, tmp_path, earteach):
    words = ["distill", exports / "teacher", tmp_path / "s.onnx", "--student", "test_resnet", *manifests]
    said = earteach(*words, "--monitor", "val/psnr")
    assert said.code == 2 and "--monitor: 'val/psnr' is not known; choose one of val/loss" in said.err


def test_every_option_of_training_is_offered_or_has_a_reason_not_to_be(earteach):
    text = earteach("distill", "--help-all").out.decode()
    for name in DistillConfig.__dataclass_fields__:
        offered = re.search(rf"--{name.replace('_', '-')}(?![\w-])", text) is not None
        assert offered == (name not in {*SET_BY_COMMAND, *NOT_OF_DISTILLATION} or name == "pad"), name
    assert set(NOT_OF_DISTILLATION) <= set(TrainConfig.__dataclass_fields__)


def test_crops_are_loaded_for_the_larger_of_teacher_and_student(exports, manifests, tmp_path):
    config = small(exports / "teacher", manifests, tmp_path, image_size=32)
    assert (config.teacher_size, config.image_size, config.load_size) == (64, 32, 64)
    data = EarDataModule(config)
    data.setup("fit")
    assert data.train_set.preprocessing.image_size == 64
    assert small(exports / "teacher", manifests, tmp_path, image_size=96).load_size == 96


def test_whole_images_are_read_once_and_without_boxes(exports, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 255, (40, 80, 3), np.uint8)).save(tmp_path / f"{name}.png")
    rows = "image_path,x1,y1,x2,y2\n" + "".join(f"{n}.png,{x},0,{x + 30},40\n" for n in "abc" for x in (0, 40))
    (tmp_path / "train.csv").write_text(rows)
    (tmp_path / "val.csv").write_text(rows)
    options = {"train_metadata": str(tmp_path / "train.csv"), "val_metadata": str(tmp_path / "val.csv")}
    config = config_for(exports / "teacher", **options, backbone="test_resnet", allow_overlap=True, whole_images=True)
    data = EarDataModule(config)
    data.setup("fit")
    assert data.train_set.manifest.paths == ["a.png", "b.png", "c.png"] and set(data.train_set.manifest.boxes) == {None}
    names = replace(data.train_set.manifest, paths=["a", "b", "a"], boxes=[None] * 3, rows=[0, 1, 2])
    people = replace(names, identities=["p", "q", "r"], sides=["left", "right", "left"]).of_whole_images()
    assert people.paths == ["a", "b"] and people.identities == ["", "q"] and people.sides is None
    fill = torch.tensor(data.clean_set.preprocessing.fill, dtype=torch.uint8)
    assert torch.equal(data.clean_set[0]["pixels"][:, 0, 0], fill)  # 80 x 40 in a square: padded above and below


# The losses, for students of one's own


@pytest.fixture(scope="module")
def teacher(exports) -> Teacher:
    return Teacher(exports / "teacher", strides=(8, 16))


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_example_of_the_documentation_runs_and_learns(exports, crops):
    example = losses.__doc__.split("\n\n")[1].replace("    # of the student's maps", "").replace("lr=1e-3", "lr=1e-2")
    lines = [line.removeprefix("    ") for line in example.splitlines()]
    assert len(lines) <= 10

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine = nn.Conv2d(3, 88, 8, stride=8)
            self.coarse = nn.Conv2d(88, 96, 2, stride=2)

        def forward(self, images):
            fine = self.fine(images)
            return fine, self.coarse(fine)

    torch.manual_seed(0)
    seen = []

    class Recording(Distillation):
        def forward(self, *args, **keywords):
            seen.append(super().forward(*args, **keywords))
            return seen[-1]

    names = {
        "Teacher": lambda path, strides: Teacher(exports / path, strides),
        "Distillation": Recording,
        "torch": torch,
    }
    exec("\n".join(lines), names | {"student": Student(), "loader": [crops] * 30})
    assert seen[-1] < 0.7 * seen[0]


def test_the_map_loss_of_the_teacher_itself_is_zero(teacher, crops):
    targets = teacher(crops)
    distillation = Distillation(teacher, dict(teacher.channels))
    with torch.no_grad():
        for stride, convolution in distillation.projections.items():
            mean, deviation = teacher.statistics[int(stride)]
            convolution.weight.copy_(torch.diag(1 / deviation)[:, :, None, None])
            convolution.bias.copy_(-mean / deviation)
    assert distillation(targets, maps=targets.maps) < 1e-4
    assert distillation(crops, maps={stride: each.flip(-1) for stride, each in targets.maps.items()}) > 0.1


def test_losses_of_embeddings_are_those_of_numpy(teacher, crops):
    targets = teacher(crops)
    of_teacher = targets.embeddings.numpy().astype(np.float64)
    assert np.allclose(np.linalg.norm(of_teacher, axis=1), 1, atol=1e-6)
    given = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    distillation = Distillation(teacher, embedding_dim=10)
    found = {name: loss.detach() for name, loss in distillation.losses(targets, embedding=given).items()}
    projected = distillation.projection(given).detach().numpy().astype(np.float64)
    cosines = (projected * of_teacher).sum(1) / np.linalg.norm(projected, axis=1)
    assert np.isclose(float(found["embedding"]), 1 - cosines.mean(), atol=1e-5)
    unit = given.numpy() / np.linalg.norm(given.numpy(), axis=1, keepdims=True)
    difference = (unit @ unit.T - of_teacher @ of_teacher.T)[~np.eye(6, dtype=bool)]
    assert np.isclose(float(found["relation"]), np.square(difference).mean(), atol=1e-5)
    assert float(losses.relation_loss(targets.embeddings[:1], given[:1])) == 0
    weighted = Distillation(teacher, embedding_dim=10, embedding_weight=0.0, relation_weight=2.0)
    assert torch.isclose(weighted(targets, embedding=given).detach(), 2 * found["relation"])


def test_embeddings_are_those_of_embed(exports, crops):
    from ear_teacher_cli import load_embedder

    embedder = load_embedder(exports / "teacher")
    rows = embedder.unit_rows(embedder(crops))
    assert embedder.whitening is not None
    assert np.allclose(Teacher(exports / "teacher", ())(crops).embeddings.numpy(), rows, atol=1e-4)


def test_maps_of_another_size_are_averaged_to_the_coarser_cells(teacher, crops):
    torch.manual_seed(0)
    distillation = Distillation(teacher, {8: 5})
    for cells in (4, 8, 16):  # the teacher has 8
        maps = torch.randn(6, 5, cells, cells).requires_grad_()
        distillation(crops, maps={8: maps}).backward()
        assert maps.grad.abs().sum() > 0
    larger = torch.nn.functional.interpolate(crops, scale_factor=2)
    assert teacher(larger).maps[8].shape == teacher(crops).maps[8].shape == (6, teacher.channels[8], 8, 8)


def test_statistics_are_measured_or_read_from_the_folder(exports, manifests):
    data = EarDataModule(train_metadata=manifests[1], val_metadata=manifests[3], image_size=64, num_workers=0)
    data.setup("fit")
    read = Teacher(exports / "teacher")
    measured = Teacher(exports / "teacher.safetensors")
    early, maps = Distillation(measured, {8: 5}), {8: torch.zeros(2, 5, 8, 8)}
    with pytest.raises(EarTeachError, match="statistics of its maps are not known"):
        early(torch.zeros(2, 3, 64, 64), maps=maps)
    from ear_teacher_cli.data.dataset import EarDataset

    val = EarDataset(data.val_set.manifest, read.preprocessing)
    measured.measure([torch.stack([val[i]["pixels"] for i in range(len(val))])])
    assert early(torch.zeros(2, 3, 64, 64), maps=maps).isfinite()  # measured since
    for stride in (4, 8, 16):
        for a, b in zip(measured.statistics[stride], read.statistics[stride], strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_only_the_projections_are_trained_and_saved(teacher, crops):
    distillation = Distillation(teacher, {8: 5, 16: 6}, embedding_dim=7)
    names = {name.split(".")[0] for name in distillation.state_dict()}
    assert names == {"projections", "projection", "mean_8", "mean_16", "deviation_8", "deviation_16"}
    before = [p.clone() for p in teacher._embedder.backbone.parameters()]
    maps = {8: torch.randn(6, 5, 8, 8), 16: torch.randn(6, 6, 4, 4)}
    distillation(crops, maps=maps, embedding=torch.randn(6, 7)).backward()
    assert all(p.grad is not None for p in distillation.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher._embedder.backbone.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher._embedder.backbone.parameters())


def test_targets_are_of_32_bit_within_autocast(exports, crops):
    teacher = Teacher(exports / "teacher")
    plain = teacher(crops)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = teacher(crops)
        loss = losses.relation_loss(plain.embeddings, plain.embeddings)
    assert torch.equal(plain.embeddings, mixed.embeddings) and torch.equal(plain.maps[8], mixed.maps[8])
    assert loss.dtype == torch.float32 and loss < 1e-10


def test_an_untrained_teacher_has_other_weights_and_no_whitening(exports, crops):
    trained, random = Teacher(exports / "teacher", (8,)), Teacher(exports / "teacher", (8,), untrained=True)
    assert not random.statistics and trained.channels == random.channels
    assert not torch.allclose(trained(crops).maps[8], random(crops).maps[8], atol=1e-2)
    assert random(crops).embeddings.shape == (6, 64)


def test_what_is_missing_is_told(teacher, crops):
    with pytest.raises(EarTeachError, match="has nothing to compare"):
        Distillation(teacher)
    with pytest.raises(EarTeachError, match="maps: that of stride 16 is missing"):
        Distillation(teacher, {8: 5, 16: 6})(crops, maps={8: torch.zeros(6, 5, 8, 8)})
    with pytest.raises(EarTeachError, match="embedding: is missing"):
        Distillation(teacher, embedding_dim=5)(crops)
    with pytest.raises(TypeError, match="takes no bbox_buffer: the teacher decides it"):
        config_for("teacher", bbox_buffer=0.5)


def test_wrong_strides_are_told(exports, teacher):
    with pytest.raises(EarTeachError, match="was loaded with maps of strides 8, 16; load it with 4, too"):
        Distillation(teacher, {4: 5})
    with pytest.raises(ConfigError, match="strides"):
        DistillConfig(strides="x")
    with pytest.raises(WeightsError, match=r"features.json: damaged"):
        broken = exports / "teacher"
        copy = shutil.copytree(broken, broken.parent / "broken")
        (copy / "features.json").write_text("{}")
        Teacher(copy)

"""Test the student models: their metrics and augmentation, and the script that runs the whole experiment."""

import ast
import json
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
STUDENTS = ROOT / "examples" / "students"
sys.path.insert(0, str(STUDENTS))

import detector  # noqa: E402  (needs the path above)
import distillation  # noqa: E402  (the same)
import landmarker  # noqa: E402  (the same)


def test_students_import_only_public_packages():
    allowed = {"torch", "torchvision", "timm", "numpy", "PIL", "distillation"} | set(sys.stdlib_module_names)
    for path in STUDENTS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, (path.name, names)


def test_the_readme_states_the_sizes_of_the_models():
    text = (STUDENTS / "README.md").read_text()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (landmarker.Landmarker(), detector.Detector())]
    assert all(f"{size:,} parameters" in text for size in sizes), sizes
    assert sizes[0] < 350_000 and sizes[1] < 1_000_000
    assert landmarker.Landmarker()(torch.zeros(2, 3, 192, 192)).shape == (2, 55, 2)
    logits, boxes = detector.Detector()(torch.zeros(2, 3, 128, 128))
    assert logits.shape == (2, 16 * 16 + 8 * 8) and boxes.shape == (2, 320, 4)
    assert [tuple(m.shape[2:]) for m in landmarker.Landmarker().maps(torch.zeros(1, 3, 192, 192))] == [
        (48, 48),
        (24, 24),
        (12, 12),
    ]
    assert [tuple(m.shape[2:]) for m in detector.Detector().maps(torch.zeros(1, 3, 128, 128))] == [(16, 16), (8, 8)]


def test_landmarks_follow_the_image():
    random = torch.Generator().manual_seed(3)
    points = torch.rand(16, 1, 2, generator=random) * 0.4 + 0.3
    images = torch.full((16, 3, 192, 192), -1.0)
    for image, ((x, y),) in zip(images, (points * 192).tolist(), strict=True):
        image[:, round(y) - 4 : round(y) + 4, round(x) - 4 : round(x) + 4] = 1
    moved, followed = landmarker.augment(images, points, random)
    assert (followed - points).abs().max() > 0.05
    for image, point in zip(moved[:, 0], followed[:, 0] * 192, strict=True):
        rows, columns = (image > image.amin() + 0.75 * (image.amax() - image.amin())).nonzero().float().unbind(1)
        assert (torch.stack([columns.mean(), rows.mean()]) + 0.5 - point).norm() < 1.5


def test_boxes_follow_the_image():
    random = torch.Generator().manual_seed(3)
    boxes = torch.tensor([[40.0, 30.0, 70.0, 90.0]]).repeat(16, 1)
    images = torch.full((16, 3, 128, 128), -1.0)
    images[:, :, 30:90, 40:70] = 1
    moved, followed = detector.augment(images, boxes, random)
    assert (followed - boxes).abs().max() > 5
    for image, box in zip(moved[:, 0], followed, strict=True):
        rows, columns = (image > image.amin() + 0.75 * (image.amax() - image.amin())).nonzero().unbind(1)
        found = torch.stack([columns.amin(), rows.amin(), columns.amax() + 1, rows.amax() + 1])
        assert (found - box).abs().max() < 1.5


def test_average_precision_by_hand():
    truth = torch.tensor([[10.0, 10.0, 50.0, 50.0]] * 4)
    sure = torch.tensor([0.9])
    perfect = [(truth[:1], sure)] * 4
    assert detector.average_precision(perfect, truth) == pytest.approx(1)
    assert detector.average_precision([(truth[:1] + 60, sure)] * 4, truth) == 0
    narrow = torch.tensor([[10.0, 10.0, 38.9, 50.0]])  # IoU 0.7225: of ten thresholds, five are below
    assert detector.average_precision([(narrow, sure)] * 4, truth) == pytest.approx(0.5)
    half = (
        perfect[:2] + [(truth[:0], sure[:0])] * 2
    )  # half are detected, no false positives: recall 0 to 0.5, 51 of 101 values
    assert detector.average_precision(half, truth) == pytest.approx(51 / 101)
    twice = [(truth[:2], torch.tensor([0.9, 0.8]))] * 4  # the second box is a false positive, below all true positives
    assert detector.average_precision(twice, truth) == pytest.approx(1)
    false_positives_first = [(torch.cat([truth[:1] + 60, truth[:1]]), torch.tensor([0.9, 0.8]))] * 4
    assert detector.average_precision(false_positives_first, truth) == pytest.approx(0.5)  # four false, then four true


def test_positives_are_near_the_centre_at_the_stride_of_the_size():
    cells = detector.Detector().cells
    near = detector.positives(cells, torch.tensor([[20.0, 20.0, 44.0, 44.0], [10.0, 10.0, 110.0, 90.0]]))
    assert near.any(1).all()
    assert set(cells[near[0], 2].tolist()) == {8.0} and set(cells[near[1], 2].tolist()) == {16.0}
    assert (cells[near[0], :2] - 32).abs().max() <= 8


def test_landmarks_and_nme_are_fractions_of_the_side(ears):
    rows = distillation.read_ears(ears, "train")
    pixels, points = landmarker.crops(rows[:6])
    assert pixels.shape == (6, 3, 192, 192) and points.shape == (6, 55, 2)
    assert 0 < points.min() and points.max() < 1
    assert landmarker.nme(points + torch.tensor([0.03, 0.04]), points) == pytest.approx(0.05, abs=1e-6)
    whole, boxes = detector.photos(rows[:6])
    assert whole.shape == (6, 3, 128, 128) and (boxes[:, 2:] > boxes[:, :2]).all() and boxes.max() <= 128


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    from ear_teacher_cli.export.export import export_backbone

    path = tmp_path_factory.mktemp("students") / "teacher"
    export_backbone(run, path)
    return path


def test_the_teachers_maps_are_standardised_with_the_exports_statistics(folder, ears):
    from ear_teacher_cli import load_backbone, normalise

    pixels, _ = landmarker.crops(distillation.read_ears(ears, "val"))
    teacher = distillation.Teacher(folder, (4, 8, 16), pixels)
    assert teacher.channels == [24, 32, 48] and [stage.shape[2] for stage in teacher.maps] == [48, 24, 12]
    maps, preprocessing = load_backbone(folder, features_only=True)
    with torch.inference_mode():
        stages = maps(normalise(pixels, preprocessing))
    described = json.loads((folder / "features.json").read_text())["maps"]
    for stage, about, found in zip(stages, described, teacher.maps, strict=False):
        mean, variance = (torch.tensor(about[name])[:, None, None] for name in ("mean", "variance"))
        assert torch.allclose(
            (stage - mean) / variance.sqrt(), found.float(), atol=2e-2, rtol=1e-2
        )  # stored in float16
    untrained = distillation.Teacher(folder, (4, 8, 16), pixels, untrained=True)
    for stage in untrained.maps:  # with statistics of its first images
        assert stage.float().mean((0, 2, 3)).abs().max() < 0.01
        assert torch.allclose(stage.float().std((0, 2, 3)), torch.ones(stage.shape[1]), atol=0.02)


@pytest.mark.slow
def test_distillation_makes_the_students_maps_similar_to_the_teachers(folder, ears):
    pixels, _ = detector.photos(distillation.read_ears(ears, "train"))
    teacher = distillation.Teacher(folder, (8, 16), pixels)
    errors = []
    for steps in (1, 30):
        student = detector.build(0)
        distillation.distil(student, pixels, teacher, steps, 8, seed=0)
        with torch.inference_mode():
            stages = student.eval().maps(distillation.as_input(pixels))
        # residual of the best linear map to the teacher's map of stride 16
        own, theirs = (s.float().permute(0, 2, 3, 1).flatten(0, 2) for s in (stages[1], teacher.maps[1]))
        residual = theirs - own @ torch.linalg.lstsq(own, theirs).solution
        errors.append(float(residual.square().mean() / theirs.square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_one_script_runs_the_whole_experiment(tmp_path, monkeypatch):
    import steps
    import students

    small = "--people 8 --val-people 2 --eval-people 2 --epochs 1 --backbone test_convnext --size 64 --seeds 0 1 --start none"
    options = "-- --steps 2 --distil-steps 2 --labelled 8 --batch 4"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["students.py", "out", *small.split(), *options.split()])
    monkeypatch.setattr(steps, "subprocess", forked)
    students.steps()
    for name in ("landmarks", "detections"):
        table = (tmp_path / "out" / f"{name}.md").read_text()
        assert "| 8 |" in table and table.count("±") == 3 and "untrained" in table
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 800 and len(np.unique(np.asarray(image))) > 100
        runs = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert [run["kind"] for run in runs] == ["without", "untrained", "teacher"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out: exists already"):  # nothing is overwritten
        students.steps()

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

from ear_teacher_cli.data.manifest import read_manifest  # noqa: E402  (after the path)
from ear_teacher_cli.distillation import Teacher  # noqa: E402  (after the path)


def test_students_import_only_public_packages_and_this_one():
    allowed = {"torch", "torchvision", "timm", "numpy", "PIL", "distillation", "ear_teacher_cli"} | set(
        sys.stdlib_module_names
    )
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
    logits, offsets = detector.Detector()(torch.zeros(2, 3, 128, 128))
    assert logits.shape == (2, 896) and offsets.shape == (2, 896, 4)
    for model, side in ((landmarker.Landmarker(), 192), (detector.Detector(), 128)):
        maps = model.maps(torch.zeros(1, 3, side, side))
        shapes = {stride: (1, width, side // stride, side // stride) for stride, width in model.channels.items()}
        assert {stride: tuple(stage.shape) for stride, stage in maps.items()} == shapes
    assert detector.Detector.channels == {8: 88, 16: 96}


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
    boxes = torch.tensor([[40.0, 30.0, 70.0, 90.0], [0.0, 0.0, 0.0, 0.0]]).repeat(16, 1, 1)
    images = torch.full((16, 3, 128, 128), -1.0)
    images[:, :, 30:90, 40:70] = 1
    moved, followed = detector.augment(images, boxes, random)
    assert (followed - boxes).abs().max() > 5 and (followed[:, 1] == 0).all()
    for image, box in zip(moved[:, 0], followed[:, 0], strict=True):
        rows, columns = (image > image.amin() + 0.75 * (image.amax() - image.amin())).nonzero().unbind(1)
        found = torch.stack([columns.amin(), rows.amin(), columns.amax() + 1, rows.amax() + 1])
        assert (found - box).abs().max() < 1.5


def test_an_ear_that_leaves_the_photo_is_no_ear():
    random = torch.Generator().manual_seed(3)
    boxes = torch.tensor([[[0.0, 40.0, 6.0, 60.0]]]).repeat(64, 1, 1)
    _, followed = detector.augment(torch.zeros(64, 3, 128, 128), boxes, random)
    gone = followed.abs().sum((1, 2)) == 0
    assert 0 < gone.sum() < 64


def ap(found, truth):
    boxes = torch.stack([torch.cat([box.reshape(-1, 4), torch.zeros(3 - box.numel() // 4, 4)]) for box in truth])
    return detector.average_precision(detector.compared(found, (None, boxes)), np.ones(len(truth), int))


def test_average_precision_by_hand():
    truth = torch.tensor([[10.0, 10.0, 50.0, 50.0]] * 4)
    sure = torch.tensor([0.9])
    perfect = [(truth[:1], sure)] * 4
    assert ap(perfect, truth) == pytest.approx(100)
    assert ap([(truth[:1] + 60, sure)] * 4, truth) == 0
    narrow = torch.tensor([[10.0, 10.0, 38.9, 50.0]])  # IoU 0.7225: of ten thresholds, five are below
    assert ap([(narrow, sure)] * 4, truth) == pytest.approx(50)
    half = perfect[:2] + [(truth[:0], sure[:0])] * 2  # half are detected: recall 0 to 0.5, 51 of 101 values
    assert ap(half, truth) == pytest.approx(100 * 51 / 101)
    twice = [(truth[:2], torch.tensor([0.9, 0.8]))] * 4  # the second box is a false positive, below all true positives
    assert ap(twice, truth) == pytest.approx(100)
    false_positives_first = [(torch.cat([truth[:1] + 60, truth[:1]]), torch.tensor([0.9, 0.8]))] * 4
    assert ap(false_positives_first, truth) == pytest.approx(50)  # four false, then four true


def test_average_precision_of_photos_with_two_ears_and_of_drawn_photos():
    two = torch.tensor([[10.0, 10.0, 50.0, 50.0], [70.0, 70.0, 110.0, 110.0]])
    found = [(two, torch.tensor([0.9, 0.8])), (two[:1], torch.tensor([0.7]))]
    truth = [two, two[1:]]
    assert ap(found[:1], truth[:1]) == pytest.approx(100)
    hits = detector.compared(found, (None, torch.stack([two, torch.cat([two[1:], torch.zeros(1, 4)])])))
    assert hits.ears.tolist() == [2, 1] and hits.photo.tolist() == [0, 0, 1]
    assert hits.hit.all(0).tolist() == [True, True, False]
    assert detector.average_precision(hits, np.array([2, 0])) == pytest.approx(100)
    assert detector.average_precision(hits, np.array([0, 2])) == 0
    assert detector.average_precision(hits, np.array([1, 1])) == pytest.approx(100 * 67 / 101)


def test_anchors_match_the_ears_and_offsets_are_decoded_again():
    ears = torch.tensor([[20.0, 20.0, 30.0, 38.0], [40.0, 30.0, 95.0, 120.0], [0.0, 0.0, 0.0, 0.0]])
    kind, offsets = detector.matched(ears)
    assert {0.0, 1.0, -1.0} == set(kind.tolist()) and (kind == 1).sum() < 20
    boxes = detector.decode(offsets)[kind == 1]
    distances = (boxes[:, None] - ears[None, :2]).abs().amax(-1)  # to each ear
    assert distances.amin(1).max() < 1e-3 and distances.amin(0).max() < 1e-3
    assert detector.ANCHOR.shape == (896, 4) and not detector.matched(torch.zeros(2, 4))[0].any()


def test_weights_go_back_into_a_blazeface_without_batch_normalisation():
    student = detector.build(0)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    weights = detector.folded(student.eval())
    plain = detector.Detector()
    for block in plain.modules():
        if isinstance(block, distillation.Block):
            deep, point = block.convs
            block.convs[0] = torch.nn.Conv2d(deep.in_channels, deep.out_channels, 3, block.stride, groups=deep.groups)
            block.convs[1] = torch.nn.Conv2d(point.in_channels, point.out_channels, 1)
            block.norm = torch.nn.Identity()
    plain.load_state_dict(weights, strict=True)
    for name in ("backbone1.0.weight", "backbone1.2.convs.0.bias", "backbone2.4.convs.1.weight", "classifier_8.weight"):
        assert name in weights
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        for a, b in zip(student(images), plain.eval()(images), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_landmarks_and_nme_are_fractions_of_the_side(ears):
    rows = landmarker.read_ears(ears, "train")
    pixels, points = landmarker.crops(rows[:6])
    assert pixels.shape == (6, 3, 192, 192) and points.shape == (6, 55, 2)
    assert 0 < points.min() and points.max() < 1
    distances = landmarker.compared(points + torch.tensor([0.03, 0.04]), (pixels, points))
    assert landmarker.nme(distances, np.ones(6)) == pytest.approx(5, abs=1e-4)


def test_photos_are_squashed_with_all_their_ears(tmp_path):
    Image.new("RGB", (256, 64), (10, 200, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (128, 128), (90, 20, 30)).save(tmp_path / "b.png")
    (tmp_path / "boxes.csv").write_text(
        "image_path,x1,y1,x2,y2\na.png,0,0,64,32\nb.png,10,20,30,40\na.png,128,0,256,64\n"
    )
    pixels, boxes = detector.photos(read_manifest(tmp_path / "boxes.csv"), 160)
    assert pixels.shape == (2, 3, 160, 160) and pixels[0, :, 0, 0].tolist() == [10, 200, 30]
    assert boxes[0, :3].tolist() == [[0, 0, 32, 64], [64, 0, 128, 128], [0, 0, 0, 0]]
    assert boxes[1, :2].tolist() == [[10, 20, 30, 40], [0, 0, 0, 0]]


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    from ear_teacher_cli.export.export import export_backbone

    path = tmp_path_factory.mktemp("students") / "teacher"
    export_backbone(run, path)
    return path


@pytest.mark.slow
def test_distillation_makes_the_students_maps_similar_to_the_teachers(folder, ears):
    pixels, _ = detector.photos(read_manifest(ears / "train_teacher.npy"), 128)
    teacher = Teacher(folder, (8, 16), size=128)
    errors = []
    for steps in (1, 30):
        student = detector.build(0)
        torch.manual_seed(0)
        source = distillation.Source(pixels, 128, teacher, student.channels)
        distillation.distil(student, [source, source], steps, 8, seed=0)
        with torch.inference_mode():
            stage = student.eval().maps(distillation.as_input(pixels))[16]
        # residual of the best linear map to the teacher's map of stride 16
        own, theirs = (s.float().permute(0, 2, 3, 1).flatten(0, 2) for s in (stage, source.maps[16]))
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
        assert "| 8 |" in table and table.count("±") == 3 and "| teacher - untrained |" in table
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 800 and len(np.unique(np.asarray(image))) > 100
        runs = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert [run["kind"] for run in runs] == ["without", "untrained", "teacher"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out: exists already"):  # nothing is overwritten
        students.steps()

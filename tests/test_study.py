"""Test the study on a few drawn ears: its tables are reproducible, and its parts are correct."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

STUDY = Path(__file__).parent.parent / "examples" / "study"
sys.path.insert(0, str(STUDY))

import measure  # noqa: E402  (needs the path above, because the study is not a package)
import study  # noqa: E402  (the same)
import tables  # noqa: E402  (the same)

from ear_teacher_cli.data.crop import cut, points_in_crop  # noqa: E402  (after the imports above)
from ear_teacher_cli.data.preprocessing import preprocessing_of  # noqa: E402  (the same)


def arguments_of(ears: Path, start: Path) -> list[str]:
    return [
        *("--train", str(ears / "train_teacher.npy"), "--val", str(ears / "val_teacher.npy")),
        *("--backbone", "convnext_atto", "--weights", str(start), "--image-size", "32", "--epochs", "1"),
        *("--batch-size", "8", "--num-workers", "0"),
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    from random_start import main

    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    main("convnext_atto", str(path))
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Run jobs in this process: a small job would spend most of its time importing torch."""
    monkeypatch.setattr(study, "run_in_subprocess", lambda folder: measure.main(str(folder)))


@pytest.mark.slow
def test_a_job_runs_in_its_own_process(ears, start, tmp_path, capsys):
    arguments = [*arguments_of(ears, start), "--eval", f"drawn={ears / 'eval.csv'}", "--rows", "step0"]
    assert study.main([str(tmp_path / "out"), *arguments]) == 0, capsys.readouterr().err
    assert "Step 0 compared with the pretrained baseline: largest difference" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "step0-0" / "result.json").read_text())
    assert result["difference"] < 1e-4 and result["cpu_seconds"] > 0


@pytest.mark.slow
def test_the_same_study_gives_the_same_table(ears, start, tmp_path, capsys, in_this_process):
    arguments = [
        *arguments_of(ears, start),
        "--eval",
        f"drawn={ears / 'eval.csv'}",
        "--rows",
        "baseline,kmeans,shuffled",
    ]
    tables = []
    for name in ("once", "again"):
        assert study.main([str(tmp_path / name), *arguments]) == 0, capsys.readouterr().err
        tables.append((tmp_path / name / "table.md").read_text())
    assert tables[0] == tables[1]
    assert "| Pretrained baseline | – |" in tables[0] and "| k-means classes | 1 |" in tables[0]
    capsys.readouterr()
    assert study.main([str(tmp_path / "once"), *arguments]) == 0
    assert "study:" not in capsys.readouterr().err  # every run has a result already
    assert study.main([str(tmp_path / "once"), *arguments, "--epochs", "2"]) == 2
    assert "other options" in capsys.readouterr().err


def test_a_row_that_cannot_run_is_reported_and_the_others_run(
    ears, start, tmp_path, capsys, monkeypatch, in_this_process
):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    arguments = [*arguments_of(ears, start), "--choose-on", str(ears / "eval.csv"), "--rows", "grey,simclr"]
    assert study.main([str(tmp_path / "out"), *arguments]) == 1
    printed = capsys.readouterr()
    assert "lightly is not installed: pip install 'ear-teacher-cli[study]'" in printed.err
    assert "32 x 32 grey pixels" in printed.out and "**choose**" in printed.out


def test_the_error_of_a_failed_run_is_reported_without_frames(tmp_path):
    (tmp_path / "log.txt").write_text("output\n╭─ Error ─╮\n│ No such option: --preset │\n╰─────────╯\n")
    assert study._last_line(tmp_path / "log.txt").startswith("No such option: --preset (see ")


def test_a_manifest_with_training_images_is_rejected(ears, start, tmp_path, capsys):
    arguments = [*arguments_of(ears, start), "--eval", f"seen={ears / 'ears.jsonl'}"]
    assert study.main([str(tmp_path / "out"), *arguments]) == 1
    assert "evaluate on people who are not in the training manifest" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["simclr", "simsiam", "dino"])
def test_lightly_methods_train_on_two_views_and_write_a_teacher(name, ears, start, tmp_path):
    pytest.importorskip("lightly", reason="needs the package lightly")
    from rivals import train_rival

    from ear_teacher_cli.config import TrainConfig
    from ear_teacher_cli.embedding.embedder import load_embedder

    config = TrainConfig(
        train_metadata=str(ears / "train_teacher.npy"),
        val_metadata=str(ears / "val_teacher.npy"),
        backbone="convnext_atto",
        pretrained_path=str(start),
        image_size=32,
        batch_size=16,
        max_epochs=1,
        num_workers=0,
        freeze_stride=4,
        accelerator="cpu",
    )
    losses = train_rival(name, config, tmp_path / "teacher.safetensors")
    assert len(losses) == 1 and np.isfinite(losses).all()
    trained, baseline = (
        dict(embedder.backbone.named_parameters())
        for embedder in (
            load_embedder(str(tmp_path / "teacher.safetensors")),
            load_embedder(str(start), "convnext_atto", 32),
        )
    )
    changed = {key for key in trained if not torch.equal(trained[key].cpu(), baseline[key].cpu())}
    assert not any(key.startswith(("stem", "stages.0")) for key in changed)
    assert name == "dino" or any(
        key.startswith("stages.3") for key in changed
    )  # one step does not move the momentum teacher


def test_soft_argmax_finds_a_single_peak():
    from landmark_probe import soft_argmax

    heat = torch.zeros(1, 2, 8, 8)
    heat[0, 0, 2, 5] = heat[0, 1, 7, 0] = 1000.0
    places = soft_argmax(heat)
    assert places.tolist() == [[[5.5 / 8, 2.5 / 8], [0.5 / 8, 7.5 / 8]]]


@pytest.mark.parametrize("pad", [True, False])
def test_points_are_mapped_as_the_crop_is(pad):
    preprocessing = preprocessing_of("convnext_atto", 64, 0.1, pad)
    image, point = Image.new("RGB", (300, 200)), (131, 92)
    image.paste((255, 255, 255), (point[0] - 2, point[1] - 2, point[0] + 2, point[1] + 2))
    box = (100.0, 40.0, 180.0, 160.0)
    light = np.asarray(cut(image, box, preprocessing).convert("L"), float)
    light[light < 160] = 0  # the padding
    x, y = points_in_crop(point, image.size, box, preprocessing)
    rows, columns = np.nonzero(light)
    assert abs(columns.mean() + 0.5 - x) < 0.6 and abs(rows.mean() + 0.5 - y) < 0.6


@pytest.mark.slow
def test_the_probe_is_deterministic_and_tests_on_other_people(ears, start):
    from landmark_probe import draw, probe, read_ears

    from ear_teacher_cli.embedding.embedder import load_embedder

    embedder = load_embedder(str(start), "convnext_atto", 64)
    first, again = (probe(embedder, ears / "ears.jsonl", seed=1) for _ in range(2))
    assert first.nme == again.nme and 0 < first.nme < 0.2 and 0 < first.constant_nme < 0.1
    train, test = read_ears(ears / "ears.jsonl", embedder.preprocessing)
    assert (len(train.pixels), len(test.pixels)) == (32, 12)
    assert test.points.shape == (12, 55, 2) and 0 < test.points.min() < test.points.max() < 1
    draw(first, ears.parent / "points.png", count=3)


def test_differences_are_paired_by_resample():
    def run(rank1, draws):
        draws = {"rows": np.arange(4), **{f"{way}_rank1": np.array(draws) for way in tables.TREATMENTS}}
        return {"lists": {"x": {way: {"rank1": rank1} for way in tables.TREATMENTS}}, "draws": {"x": draws}}

    kmeans, baseline = [run(0.6, [0.5, 0.7]), run(0.8, [0.7, 0.9])], [run(0.5, [0.4, 0.6])]
    assert (
        tables.difference(kmeans, baseline, "x", "rank1") == "+20.0 [+20.0, +20.0] / +20.0 [+20.0, +20.0]"
    )  # 0.7 - 0.5, the same in both resamples


def test_a_masked_crop_keeps_only_the_surroundings_of_the_ear():
    preprocessing = preprocessing_of("convnext_atto", 64, 0.1, True)
    crop = Image.new("RGB", (64, 64), (255, 0, 0))
    measure.mask_ear(crop, (100, 100), None, preprocessing)
    assert crop.getpixel((32, 32)) == preprocessing.fill and crop.getpixel((2, 2)) == (255, 0, 0)

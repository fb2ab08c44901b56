"""Test the study on a few drawn ears: its tables are reproducible, and its parts are correct."""

import ast
import importlib.util
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
STUDY = EXAMPLES / "study"
sys.path.insert(0, str(STUDY))

import crops  # noqa: E402  (needs the path above, because the study is not a package)
import mask_probe  # noqa: E402  (the same)
import measure  # noqa: E402  (the same)
import recipes  # noqa: E402  (the same)
import study  # noqa: E402  (the same)
import tables  # noqa: E402  (the same)

from ear_teacher_cli.data.crop import cut, image_size, points_in_crop  # noqa: E402  (after the imports above)
from ear_teacher_cli.data.manifest import read_manifest  # noqa: E402  (the same)
from ear_teacher_cli.data.preprocessing import preprocessing_of  # noqa: E402  (the same)
from ear_teacher_cli.errors import ManifestError  # noqa: E402  (the same)


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


@pytest.fixture(scope="module")
def masked_ears(ears, tmp_path_factory) -> Path:
    """The list of boxes of the drawn ears, with masks."""
    from drawn_masks import main

    folder = tmp_path_factory.mktemp("masked") / "drawn"
    shutil.copytree(ears, folder)
    assert main([str(folder), "--seed", "1"]) == 0
    return folder / "boxes.csv"


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


@pytest.mark.slow
def test_a_study_has_the_mask_probe_and_the_ear_alone(ears, masked_ears, start, tmp_path, capsys, in_this_process):
    words = [*arguments_of(ears, start), "--choose-on", str(ears / "eval.csv"), "--masks", str(masked_ears)]
    assert study.main([str(tmp_path / "out"), *words, "--rows", "baseline,ear-only,step0"]) == 0, (
        capsys.readouterr().err
    )
    result = json.loads((tmp_path / "out" / "baseline-0" / "result.json").read_text())
    alone = json.loads((tmp_path / "out" / "ear-only-0" / "result.json").read_text())["lists"]["choose"]
    for way in tables.TREATMENTS:  # the check and the baseline's own score are the same measurement
        assert result["lists"]["choose"][tables.EAR_ONLY + way] == alone[way]
    assert list(result["masks"]) == ["8+16", "8", "16"]
    windows = np.load(tmp_path / "out" / "baseline-0" / tables.MASK_WINDOWS)  # noqa: TID251  (not a manifest)
    assert windows["iou"].mean() == pytest.approx(result["masks"]["8+16"]["mean"])
    chosen = mask_probe.split(masked_ears, 0, choose=True)[1]
    assert windows["photos"].tolist() == list(chosen.paths)  # choosing does not use the test photos
    text = capsys.readouterr().out
    assert "mask IoU, %" in text and "| ear only |" in text and "all but the ear is painted over" in text


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


def has(module, name: str) -> bool:
    """Whether `from module import name` works."""
    inside = hasattr(module, "__path__") and importlib.util.find_spec(f"{module.__name__}.{name}") is not None
    return inside or hasattr(module, name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_what_an_example_imports_of_the_package_is_there(path):
    """Also of examples that need packages which are not installed here, such as lightly."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ear_teacher_cli":
            module = importlib.import_module(node.module)
            missing = [each.name for each in node.names if not has(module, each.name)]
            assert missing == [], f"{path}: {node.module} has no {missing}"


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


def test_painting_the_ear_or_its_surroundings_leaves_the_other():
    preprocessing = preprocessing_of("convnext_atto", 64, 0.1, True)
    crop, fill, red = Image.new("RGB", (64, 64), (255, 0, 0)), preprocessing.fill, (255, 0, 0)

    def painted(what, box):
        return crops.paint(crop, what, (100, 100), box, preprocessing)

    assert painted(crops.EAR, None).getpixel((32, 32)) == painted(crops.SURROUNDINGS, None).getpixel((2, 2)) == fill
    assert painted(crops.EAR, None).getpixel((2, 2)) == painted(crops.SURROUNDINGS, None).getpixel((32, 32)) == red
    # without a box a margin of 6 % of the width at each side is not the ear
    assert (
        painted(crops.SURROUNDINGS, None).getpixel((1, 32))
        == fill
        != painted(crops.SURROUNDINGS, None).getpixel((6, 32))
    )
    ear, rest = (np.asarray(painted(what, (20, 20, 60, 80))) == fill for what in (crops.EAR, crops.SURROUNDINGS))
    assert (ear.all(-1) ^ rest.all(-1)).all()  # with a box they are complements
    assert crop.getcolors() == [(64 * 64, red)]


def test_masks_are_those_of_the_drawn_photos(masked_ears, tmp_path, capsys):
    from drawn_masks import main

    (tmp_path / "ears.jsonl").write_text((masked_ears.parent / "ears.jsonl").read_text())
    assert main([str(tmp_path), "--seed", "2"]) == 1
    assert "drawn with another --seed" in capsys.readouterr().err
    line = json.loads((masked_ears.parent / "ears.jsonl").read_text().splitlines()[0])
    with Image.open(masked_ears.parent / mask_probe.mask_path(line["image_path"])) as mask:
        assert mask.mode == "1" and mask.size == image_size(masked_ears.parent / line["image_path"])
        assert np.abs(np.subtract(mask.getbbox(), line["bbox"])).max() < 8


def test_masks_are_found_beside_the_images():
    assert mask_probe.mask_path("images/p000/01.jpg") == "masks/p000/01.png"
    assert mask_probe.mask_path("/photos/images/a.b.jpeg") == "/photos/masks/a.b.png"
    assert mask_probe.mask_path("a.jpg") == "masks/a.png"


def test_windows_for_choosing_are_not_those_of_the_test(masked_ears):
    train, test = mask_probe.split(masked_ears, 0, choose=False)
    less, chosen = mask_probe.split(masked_ears, 0, choose=True)
    assert set(less.paths) | set(chosen.paths) == set(train.paths) and not set(chosen.paths) & set(test.paths)
    assert not set(train.identities) & set(test.identities) and not set(less.identities) & set(chosen.identities)
    assert test.paths == mask_probe.split(masked_ears, 0, choose=False)[1].paths


def test_near_duplicates_of_a_photo_stay_with_it(masked_ears, tmp_path):
    shutil.copytree(masked_ears.parent / "images", tmp_path / "images")
    lines = [line.rsplit(",", 1)[0] for line in masked_ears.read_text().splitlines()]  # without identities
    copies = []
    for line in lines[1:]:
        path, box = line.split(",", 1)
        copy = path.replace(".jpg", "-again.jpg")
        with Image.open(tmp_path / path) as image:
            image.save(tmp_path / copy, quality=60)
        copies.append(f"{copy},{box}")
    (tmp_path / "boxes.csv").write_text("\n".join([*lines, *copies]) + "\n")
    for part in mask_probe.split(tmp_path / "boxes.csv", 0, choose=False):
        photos = [path.replace("-again", "") for path in part.paths]
        assert all(photos.count(photo) == 2 for photo in photos)


def test_a_window_beyond_the_border_has_the_mean_colour_and_no_ear(tmp_path):
    for folder, mode, colour in (("images", "RGB", "white"), ("masks", "1", 1)):
        (tmp_path / folder).mkdir()
        Image.new(mode, (40, 30), colour).save(tmp_path / folder / "a.png")
    (tmp_path / "boxes.csv").write_text("image_path,x1,y1,x2,y2\nimages/a.png,10,5,30,25\n")
    windows = mask_probe.cut_windows(read_manifest(tmp_path / "boxes.csv"), (1, 2, 3))
    white = windows.pixels[0] == 255
    assert (white.all(0) == windows.masks[0]).all() and windows.masks.sum() == 40 * 30
    assert windows.masks[0, 81:111, 76:116].all()  # 96 - 15 and 96 - 20: the box's centre is that of the window
    assert windows.pixels[0, :, 0, 0].tolist() == [1, 2, 3]
    Image.new("1", (41, 30), 1).save(tmp_path / "masks" / "a.png")
    with pytest.raises(ManifestError, match="masks/a.png: is 41 x 30, and its photo is 40 x 30"):
        mask_probe.cut_windows(read_manifest(tmp_path / "boxes.csv"), (1, 2, 3))


def test_the_fit_finds_what_separates_and_the_score_is_the_iou():
    grid, side = mask_probe.GRID, mask_probe.SIDE
    masks = torch.zeros(2, side, side, dtype=torch.bool)
    masks[:, :, side // 2 :] = True
    target = torch.nn.functional.avg_pool2d(masks.float().unsqueeze(1), mask_probe.GRID_STRIDE).flatten()
    cells = torch.stack([2 * target - 1, torch.randn(len(target), generator=torch.Generator().manual_seed(0))], 1)
    weight, bias = mask_probe.fit(cells, target)
    assert weight[0] > 20 * weight[1].abs()
    found = mask_probe.score(cells @ weight + bias, masks)
    assert found.mean > 0.99 and found.pooled > 0.99 and found.predicted.shape == masks.shape
    half = masks.clone()
    half[0] = True
    found = mask_probe.score(cells @ weight + bias, half)
    assert found.iou == pytest.approx([0.5, 1], abs=0.01) and found.pooled == pytest.approx(2 / 3, abs=0.01)
    assert torch.tensor([grid, grid]).prod() * 2 == len(target)


@pytest.mark.slow
def test_the_mask_probe_says_the_iou_of_each_stride(masked_ears, start, tmp_path, capsys):
    words = [str(start), str(masked_ears), "--backbone", "convnext_atto", "--draw", str(tmp_path / "masks.png")]
    printed = []
    for _ in range(2):
        assert mask_probe.main(words) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "strides 8+16: mean IoU " in printed[0] and "strides 8   : mean IoU " in printed[0]
    assert image_size(tmp_path / "masks.png")[0] == 2 * (2 * mask_probe.SIDE + 4)


def test_differences_of_masks_are_paired_by_photo():
    def run(iou):
        return {"mask_windows": {"iou": np.array(iou), "photos": np.array(["a", "a", "b"])}}

    baseline = [run([0.2, 0.3, 0.9])]
    assert tables.mask_difference([run([0.3, 0.4, 1.0])], baseline) == "+10.0 [+10.0, +10.0]"
    seeds = [run([0.2, 0.3, 0.9]), run([0.2, 0.3, 1.0])]
    assert tables.mask_difference(seeds, baseline) == "+1.7 [+0.0, +5.0]"  # only photo b differs
    other = [{"mask_windows": {"iou": np.array([0.1]), "photos": np.array(["a"])}}]
    assert tables.mask_difference(other, baseline) == tables.mask_difference([{}], baseline) == "–"


def test_other_metrics_have_the_columns_that_were_measured():
    rows = {"baseline": recipes.ROWS["baseline"], "kmeans": recipes.ROWS["kmeans"]}
    results = {"baseline": [{"nme": 0.02}], "kmeans": [{"nme": 0.018, "psnr": 14.0}, {"nme": 0.019, "psnr": 15.0}]}
    results["kmeans"][0]["psnr_references"] = {"val/psnr_mean_image": 13.84, "val/psnr_pca64": 23.3}
    text = tables.metrics_table(results, rows)
    assert "|  | landmark NME, % | NME relative to baseline | PSNR, dB |" in text
    assert "| k-means classes | 1.85 ± 0.07 | -7.5 % | 14.5 ± 0.7 |" in text
    assert "- PSNR: the mean training image gives 13.8 dB; PCA with 64 components gives 23.3 dB." in text


def test_ear_only_is_a_table_of_its_own():
    ways = [prefix + way for prefix in ("", tables.EAR_ONLY) for way in tables.TREATMENTS]

    def run(value):
        metrics = {way: {"rank1": value + way.startswith(tables.EAR_ONLY) / 10, "eer": 0.2} for way in ways}
        draws = {f"{way}_{metric}": np.full(3, metrics[way][metric]) for way in ways for metric in tables.METRICS}
        about = {"pictures": 4, "people": 2, "ears": 2, "chance": 0.3}
        return {"lists": {"x": metrics | about}, "draws": {"x": {"rows": np.arange(4), **draws}}}

    results = {"baseline": [run(0.5)], "kmeans": [run(0.6)]}
    text = tables.metrics_table(results, {name: recipes.ROWS[name] for name in results})
    table = text[text.index("| ear only |") :]
    assert "| Pretrained baseline | 60.0 / 60.0 | 20.0 / 20.0 | – | – |" in table
    assert "| k-means classes | 70.0 / 70.0 | 20.0 / 20.0 | +10.0 [+10.0, +10.0] / +10.0 [+10.0, +10.0] |" in table


def test_rows_spell_their_options_out():
    from ear_teacher_cli.config import TrainConfig, preset

    names = {spec.name for spec in fields(TrainConfig)}
    for row in recipes.ROWS.values():
        assert set(row.options) - {"preset"} <= names
        TrainConfig(**{key: value for key, value in row.options.items() if key != "preset"})
    v010 = TrainConfig(**recipes.ROWS["v010"].options)
    assert (v010.freeze_stride, v010.baseline_weight, v010.learning_rate, v010.layer_decay) == (8, 0.5, 3e-4, 1.0)
    assert (v010.contrastive_weight, v010.temperature, v010.metric_weight, v010.reconstruction_weight) == (
        1,
        0.2,
        0.5,
        1,
    )
    assert (v010.scale, v010.margin, v010.pseudo_classes, v010.views, v010.augmentation) == (
        30,
        0.2,
        "kmeans",
        2,
        "strong",
    )
    # what may change in the presets is given in every row that is not one of them
    decided = set(preset("recommended")) - {"max_epochs", "whiten", "monitor", "margin_preset", "pseudo_classes"}
    objective = {"contrastive_weight", "metric_weight"}
    assert decided <= set(recipes.ROWS["v010"].options) and decided - objective <= set(recipes.ROWS["simclr"].options)


def test_rivals_can_train_longer_than_our_rows(tmp_path):
    words = [str(tmp_path), "--train", "a.npy", "--val", "b.npy", "--eval", "x=c.csv", "--epochs", "3"]

    def epochs(name, *more):
        options = study.parse_options([*words, *more])
        return study.job_of(study.Study(options, {}), name, recipes.ROWS[name], 0)["options"]["max_epochs"]

    assert (epochs("simclr"), epochs("kmeans")) == (3, 3)
    assert (epochs("simclr", "--rival-epochs", "5"), epochs("kmeans", "--rival-epochs", "5")) == (5, 3)


def test_the_curve_has_a_point_for_each_row_with_a_decoder(tmp_path, capsys):
    import curve

    for name, psnr in (("baseline-0", None), ("kmeans-0", 14.0), ("kmeans-1", 15.0), ("masked-0", None)):
        values = {"lists": {"x": {"whitened": {"rank1": 0.5, "eer": 0.2}}}} | ({"psnr": psnr} if psnr else {})
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(values))
    assert {name: len(runs) for name, runs in curve.read_results(tmp_path, []).items()} == {"baseline": 1, "kmeans": 2}
    assert list(curve.read_results(tmp_path, ["kmeans", "masked"])) == ["kmeans", "masked"]
    assert curve.main([str(tmp_path), str(tmp_path / "curve.png"), "--rows", "kmeans,baseline"]) == 0
    assert image_size(tmp_path / "curve.png")[0] > 1000
    assert curve.main([str(tmp_path), str(tmp_path / "curve.png"), "--rows", "instance"]) == 2
    assert "--rows instance: has no result in" in capsys.readouterr().err

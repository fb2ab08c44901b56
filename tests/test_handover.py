"""Exports for training students: folders and ONNX that open without this package, and `verify` of all formats."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROUNDING, apart, small_config
from PIL import Image
from safetensors.torch import load_file, save_file

from ear_teacher_cli import load_backbone, load_crop, normalise
from ear_teacher_cli.command_config import ExportConfig
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.errors import WeightsError
from ear_teacher_cli.export import folder as folder_format
from ear_teacher_cli.export import onnx as onnx_format
from ear_teacher_cli.export.export import export_backbone
from ear_teacher_cli.export.onnx import OnnxModel
from ear_teacher_cli.model import golden
from ear_teacher_cli.model.checkpoint import read_checkpoint, read_safetensors
from ear_teacher_cli.model.export_format import about_of
from ear_teacher_cli.model.feature_maps import map_model, statistics
from ear_teacher_cli.run_folder import best_checkpoint
from ear_teacher_cli.training.run import train

NO_PACKAGE = "import sys; sys.modules['ear_teacher_cli'] = None\n"


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.slow
def test_timm_alone_opens_the_folder_both_ways(exports, whitened, images, tmp_path):
    backbone, _ = load_backbone(whitened)
    maps, _ = load_backbone(whitened, features_only=True)
    with torch.inference_mode():
        save_file(
            {"images": images, "embedding": backbone(images)} | name_maps(maps(images)), tmp_path / "e.safetensors"
        )
    code = f"""{NO_PACKAGE}
import timm, torch
from safetensors.torch import load_file, save_file
expected = load_file({str(tmp_path / "e.safetensors")!r})
with torch.inference_mode():
    whole = timm.create_model("local-dir:teacher", pretrained=True).eval()
    found = {{"embedding": whole(expected["images"])}}
    maps = timm.create_model("local-dir:teacher", pretrained=True, features_only=True).eval()
    assert maps.feature_info.reduction() == [4, 8, 16, 32]
    found |= {{f"map{{place}}": stage.contiguous() for place, stage in enumerate(maps(expected["images"]))}}
    single = timm.create_model("test_convnext", num_classes=0, checkpoint_path="teacher.safetensors").eval()
    found["single"] = single(expected["images"])
save_file(found, {str(tmp_path / "f.safetensors")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=exports)
    assert done.returncode == 0, done.stderr
    found, expected = load_file(tmp_path / "f.safetensors"), load_file(tmp_path / "e.safetensors")
    expected["single"] = expected["embedding"]
    assert found.keys() == expected.keys() - {"images"} and len(found) == 6
    for name, value in found.items():
        assert apart(value, expected[name]) < ROUNDING, name  # timm computes in another layout


# In a ConvNeXt that was trained for a few epochs the layer scale (1e-6) hides errors within a block from every output.
# These changes are outside of the blocks; the fingerprint finds those within (test_other_values_that_fit_fail_verify).
def swap_input_channels(backbone):
    backbone.stem[0].weight.data = backbone.stem[0].weight.data.flip(1)


def change_one_weight_by_a_thousandth(backbone):
    backbone.head.norm.weight.data[0] *= 1.001


def exchange_two_channels(backbone):
    weight = backbone.stages[1].downsample[1].weight.data
    weight[[0, 1]] = weight[[1, 0]]


def forget_a_bias(backbone):
    backbone.head.norm.bias.data.zero_()


def round_to_bfloat16(backbone):
    backbone.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize(
    "spoil",
    [swap_input_channels, change_one_weight_by_a_thousandth, exchange_two_channels, forget_a_bias, round_to_bfloat16],
)
def test_the_tolerance_of_the_tests_is_too_small_for_a_wrong_tensor(exports, images, spoil):
    backbone, _ = load_backbone(exports / "teacher.safetensors")
    with torch.inference_mode():
        expected = backbone(images.to(memory_format=torch.channels_last))
        assert apart(backbone(images), expected) < ROUNDING
        spoil(backbone)
        assert apart(backbone(images), expected) > 3 * ROUNDING


def name_maps(stages) -> dict[str, torch.Tensor]:
    return {f"map{place}": stage.contiguous() for place, stage in enumerate(stages)}


@pytest.mark.parametrize("name", ["teacher", "teacher.safetensors", "checkpoint"])
def test_load_backbone_gives_the_same_from_everything(exports, whitened, images, name):
    path = best_checkpoint(whitened) if name == "checkpoint" else exports / name
    (own, preprocessing), (other, same) = load_backbone(whitened), load_backbone(path)
    assert preprocessing == same and not other.training
    maps, other_maps = (load_backbone(p, features_only=True)[0] for p in (whitened, path))
    with torch.inference_mode():
        assert torch.equal(own(images), other(images))
        assert all(torch.equal(a, b) for a, b in zip(maps(images), other_maps(images), strict=True))


def test_load_backbone_and_its_crops_are_what_embed_writes(exports, ears, tmp_path, earteach):
    arguments = ["--weights", exports / "teacher", "--no-normalize"]
    assert earteach("embed", ears / "eval.csv", tmp_path / "x.npy", *arguments).code == 0
    backbone, preprocessing = load_backbone(exports / "teacher")
    manifest = read_manifest(ears / "eval.csv")
    crop = torch.from_numpy(load_crop(manifest.file(4), manifest.boxes[4], preprocessing))
    with torch.inference_mode():
        row = backbone(normalise(crop[None], preprocessing))[0].numpy()
    assert np.abs(row - np.load(tmp_path / "x.npy")[4]).max() < 1e-5  # noqa: TID251  (what our users will call)


def test_onnx_alone_gives_embedding_and_maps_for_any_batch(exports, whitened):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    backbone, preprocessing = load_backbone(whitened)
    maps, _ = load_backbone(whitened, features_only=True)
    batch = normalise(torch.from_numpy(pixels), preprocessing)
    with torch.inference_mode():
        expected = {"pixels": torch.from_numpy(pixels), "embedding": backbone(batch)} | name_maps(maps(batch))
    save_file(expected, exports / "expected.safetensors")
    code = f"""{NO_PACKAGE}
import numpy as np, onnxruntime
from safetensors.numpy import load_file
expected = load_file("expected.safetensors")
model = onnxruntime.InferenceSession("teacher.onnx", providers=["CPUExecutionProvider"])
assert [o.name for o in model.get_outputs()] == ["embedding", "map_4", "map_8", "map_16", "map_32"]
for count in (1, 2, 5):
    found = model.run(None, {{"pixels": expected["pixels"][:count]}})
    for name, value in zip(["embedding", "map0", "map1", "map2", "map3"], found, strict=True):
        wanted = expected[name][:count]
        assert value.shape == wanted.shape and np.abs(value - wanted).max() < 1e-4, (count, name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=exports)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["teacher.safetensors", "teacher.onnx"])
def test_a_damaged_or_missing_whitening_is_a_line_of_verify(exports, tmp_path, earteach, form):
    for name in (form, "teacher.whitening.safetensors"):
        shutil.copy(exports / name, tmp_path)
    whitening = tmp_path / "teacher.whitening.safetensors"
    data = bytearray(whitening.read_bytes())
    data[len(data) // 2] ^= 1
    whitening.write_bytes(data)
    result = earteach("verify", tmp_path / form)
    wrong = [line for line in result.out.decode().splitlines() if line.startswith("WRONG")]
    assert result.code == 1 and len(wrong) == 1 and "is damaged, or of another export" in wrong[0], result
    whitening.unlink()
    result = earteach("verify", tmp_path / form)
    assert result.code == 1 and "is not beside it" in result.out.decode() and b"ok     golden batch" in result.out


@pytest.mark.slow
def test_all_forms_have_one_fingerprint_and_pass_verify(exports, whitened, earteach):
    prints = set()
    for name, count in (("teacher.safetensors", 5), ("teacher.onnx", 5), ("teacher", 10)):
        result = earteach("verify", exports / name)
        lines = result.out.decode().splitlines()
        assert result.code == 0 and len(lines) == count and all(line.startswith("ok ") for line in lines), result
        path = exports / name / "model.safetensors" if name == "teacher" else exports / name
        header = OnnxModel(path).header if name.endswith("onnx") else read_safetensors(path)[1]
        prints.add(header["fingerprint"])
    assert len(prints) == 1
    for name in ("teacher.onnx", "teacher"):
        for other in (exports / "teacher.safetensors", whitened, exports / "teacher.onnx"):
            result = earteach("verify", exports / name, "--against", other)
            assert result.code == 0 and b"computed here by both" in result.out, result


def test_the_golden_batch_is_recomputed(exports):
    tensors, header = read_safetensors(exports / "teacher.safetensors")
    about = about_of(header, "x")
    assert about.golden.pixels.shape == (4, 3, 64, 64) and len(np.unique(about.golden.pixels)) > 100
    spread = np.abs(about.golden.embeddings[:, None] - about.golden.embeddings).max(-1)
    assert spread[np.triu_indices(4, 1)].min() > 0.01  # each image has an embedding of its own
    backbone, preprocessing = load_backbone(exports / "teacher.safetensors")
    with torch.inference_mode():
        found = backbone(normalise(torch.from_numpy(about.golden.pixels), preprocessing)).numpy()
    assert 0 < about.golden.difference(found) < 1e-5  # float32 against float64
    assert about.golden.difference(found + 1e-3) > golden.TOLERANCE
    assert about.golden.difference(found[:2]) == float("inf")


def changed(exports, tmp_path, change):
    """Write a copy of teacher.safetensors with changed tensors or header."""
    tensors, header = read_safetensors(exports / "teacher.safetensors")
    change(tensors, header)
    path = tmp_path / "teacher.safetensors"
    save_file(tensors, path, metadata=header)
    shutil.copy(exports / "teacher.whitening.safetensors", tmp_path)
    return path


def rename_a_key(tensors, header):
    tensors["stages.0.blocks.0.norm.wait"] = tensors.pop("stages.0.blocks.0.norm.weight")


def drop_a_key(tensors, header):
    del tensors["stages.0.blocks.0.norm.weight"]


def name_another_architecture(tensors, header):
    header["architecture"] = "resnet18"


def break_the_golden_batch(tensors, header):
    header["golden"] = header["golden"][:500]


def remove_the_size(tensors, header):
    del header["image_size"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (rename_a_key, "norm.wait"),
        (drop_a_key, "1 missing"),
        (name_another_architecture, "fit resnet18"),
        (break_the_golden_batch, "golden batch is damaged"),
        (remove_the_size, "header is incomplete"),
    ],
)
def test_weights_and_headers_that_do_not_fit_are_refused(exports, tmp_path, earteach, change, word):
    path = changed(exports, tmp_path, change)
    for arguments in (["verify", path], ["embed", exports, tmp_path / "x.npy", "--weights", path]):
        result = earteach(*arguments)
        assert result.code == 1 and (word in result.err or arguments[0] == "embed"), result


def nudge_a_weight(tensors, header):
    tensors["stages.3.blocks.0.mlp.fc2.bias"] = tensors["stages.3.blocks.0.mlp.fc2.bias"] + 1.0


def write_another_mean(tensors, header):
    header["mean"] = "[0.4, 0.5, 0.5]"


@pytest.mark.parametrize("change", [nudge_a_weight, write_another_mean])
def test_other_values_that_fit_fail_verify(exports, tmp_path, earteach, change):
    result = earteach("verify", changed(exports, tmp_path, change))
    wrong = [line.split()[1] for line in result.out.decode().splitlines() if line.startswith("WRONG")]
    assert result.code == 1 and wrong == ["file", "fingerprint", "golden"], result


@pytest.mark.parametrize("name", ["features.json", "preprocess.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("content", ["{}", "no json", "[1]", '{"maps": [{}], "pictures": 1e999}'])
def test_a_folder_with_a_broken_file_is_refused(exports, tmp_path, earteach, name, content):
    folder = shutil.copytree(exports / "teacher", tmp_path / "teacher")
    (folder / name).write_text(content)
    assert earteach("verify", folder).code == 1


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("preprocess.json", lambda c: c.update(bbox_buffer=0.2)),
        ("preprocess.json", lambda c: c.update(embedding_dim=7)),
        ("config.json", lambda c: c["pretrained_cfg"].update(mean=[0.9, 0.5, 0.5])),
        ("config.json", lambda c: c["pretrained_cfg"].update(crop_pct=0.5)),
        ("config.json", lambda c: c["pretrained_cfg"].update(url="https://example.org")),
        ("config.json", lambda c: c.update(model_args={"depths": [1000000, 1, 1, 1]})),  # would take forever to build
        ("features.json", lambda c: c["maps"][0]["variance"].__setitem__(0, 1e6)),
        ("features.json", lambda c: c["maps"][0].update(channels=9999)),
        ("features.json", lambda c: c.update(pictures=-3)),
    ],
)
def test_a_changed_file_beside_the_weights_fails_verify(exports, tmp_path, earteach, name, change):
    folder = shutil.copytree(exports / "teacher", tmp_path / "teacher")
    edit(folder / name, change)
    result = earteach("verify", folder)
    wrong = [line.split()[1] for line in result.out.decode().splitlines() if line.startswith("WRONG")]
    assert result.code == 1 and wrong == [name], result


def test_verify_of_something_else_is_an_error(exports, whitened, tmp_path, earteach):
    missing = shutil.copytree(exports / "teacher", tmp_path / "teacher")
    (missing / "README.md").unlink()
    checkpoint = best_checkpoint(whitened)
    for path, code, word in (
        (exports, 1, "not an export"),
        (exports / "teacher.whitening.safetensors", 1, "not written by"),
        (missing, 1, "README.md"),
        (checkpoint, 2, "not an export by its name"),
    ):
        result = earteach("verify", path)
        assert result.code == code and word in result.err, result


HOSTILE = {
    "image_size": ["1e999", "0", "-64", "100000", "[64]"],
    "mean": ["[0.5, 0.5]", "[]", "[1e999, 0, 0]", "null"],
    "std": ["[0, 0.5, 0.5]", "0.5"],
    "bbox_buffer": ["NaN", "-1", "1e999"],
    "pad": ['"false"', "1"],
    "interpolation": ["foo", ""],
    "embedding_dim": ["-1", "65", "x"],
    "golden": ['{"pictures": 1e999}', '{"pictures": 100000000, "pixels": "", "embeddings": ""}', "[]", "[" * 5000],
    "architecture": ["no_such_model", "hf-hub:timm/resnet18", "../../x"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in HOSTILE.items() for value in values])
def test_hostile_headers_are_refused_in_one_line(exports, tmp_path, earteach, name, value):
    path = changed(exports, tmp_path, lambda tensors, header: header.update({name: value}))
    result = earteach("verify", path)
    assert result.code == 1 and "teacher.safetensors" in result.err and result.err.count("\n") == 1, result


@pytest.mark.parametrize(
    "tensors",
    [
        {"mean": torch.zeros(64)},
        {"mean": torch.zeros(()), "matrix": torch.zeros(())},
        {"mean": torch.zeros(3), "matrix": torch.zeros(3, 4)},
        {"mean": torch.zeros(64), "matrix": torch.full((64, 64), float("nan"))},
    ],
)
def test_malformed_whitenings_are_refused(exports, tmp_path, earteach, tensors):
    from ear_teacher_cli.model.weights import sha256_of

    whitening = tmp_path / "teacher.whitening.safetensors"
    save_file(tensors, tmp_path / "w.safetensors")
    path = changed(
        exports, tmp_path, lambda _, header: header.update(whitening_sha256=sha256_of(tmp_path / "w.safetensors"))
    )
    shutil.move(tmp_path / "w.safetensors", whitening)
    result = earteach("verify", path)
    assert result.code == 1 and "whitening" in result.err + result.out.decode(), result


def test_another_teacher_is_recognised_by_its_fingerprint(exports, run, tmp_path, earteach):
    result = earteach("verify", exports / "teacher.onnx", "--against", run)
    assert result.code == 1 and b"another teacher" in result.out and "teacher.onnx: is in" in result.err


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes_in_every_form(exports, whitened, tmp_path):
    export_backbone(whitened, tmp_path / "teacher.onnx", config=ExportConfig(features=True))
    assert (tmp_path / "teacher.onnx").read_bytes() == (exports / "teacher.onnx").read_bytes()
    options = ExportConfig(consent="drawn, nobody", license="MIT | of us")
    export_backbone(whitened, tmp_path / "teacher", config=options)
    for path in (exports / "teacher").iterdir():
        assert path.read_bytes() == (tmp_path / "teacher" / path.name).read_bytes(), path.name
    assert (exports / "teacher" / "model.safetensors").read_bytes() == (exports / "teacher.safetensors").read_bytes()


def test_no_export_names_a_folder_of_this_machine(exports, whitened, ears):
    for path in exports.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (whitened, ears, exports, sys.prefix):
                assert str(place).encode() not in content, path


def test_the_statistics_are_those_of_the_validation_crops(exports, whitened, ears):
    result = json.loads((exports / "teacher" / "features.json").read_text())
    maps, preprocessing = load_backbone(whitened, features_only=True)
    manifest = read_manifest(ears / "val_teacher.npy")
    crops = [load_crop(manifest.file(i), manifest.boxes[i], preprocessing) for i in range(len(manifest))]
    assert result["pictures"] == len(crops) == 8
    with torch.inference_mode():
        stages = maps(normalise(torch.from_numpy(np.stack(crops)), preprocessing))
    for stage, about, stride in zip(stages, result["maps"], (4, 8, 16, 32), strict=True):
        assert about["stride"] == stride and about["channels"] == stage.shape[1]
        assert np.allclose(about["mean"], stage.mean((0, 2, 3)), atol=1e-4)
        assert np.allclose(about["variance"], stage.var((0, 2, 3), unbiased=False), rtol=1e-3, atol=1e-6)


def test_statistics_do_not_depend_on_the_batches(images):
    backbone = torch.nn.Sequential()
    backbone.feature_info = type("Info", (), {"module_name": lambda s: ["a"], "reduction": lambda s: [1]})()
    backbone.forward = lambda x: [x]
    whole, parts = (statistics(backbone, images.split(size))[0] for size in (3, 1))
    assert whole == parts
    assert np.allclose(whole.variance, images.var((0, 2, 3), unbiased=False), rtol=1e-4)


def test_the_card_holds_consent_licence_and_metrics(exports, whitened):
    card = (exports / "teacher" / "README.md").read_text()
    assert "drawn, nobody" in card and "MIT | of us" in card and "train_teacher.npy, 24 ears" in card
    assert "| backbone | test_convnext |" in card and "| ema-decay | 0.9 |" in card
    assert "val_teacher.npy" in card and "PSNR of the reconstruction, dB" in card


@pytest.mark.slow
def test_half_precision_is_another_teacher_and_reports_the_difference(whitened, ears, tmp_path, earteach, exports):
    result = earteach("export-backbone", whitened, tmp_path / "half.safetensors", "--half")
    assert result.code == 0 and "; float16 " in result.err and "the embeddings by" in result.err
    tensors = load_file(tmp_path / "half.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert earteach("verify", tmp_path / "half.safetensors").code == 0
    assert earteach("verify", tmp_path / "half.safetensors", "--against", whitened).code == 1
    for name in ("full", "half"):
        weights = whitened if name == "full" else tmp_path / "half.safetensors"
        assert (
            earteach("embed", ears / "eval.csv", tmp_path / f"{name}.npy", "--weights", weights, "--no-whiten").code
            == 0
        )
    full, half = (np.load(tmp_path / f"{name}.npy") for name in ("full", "half"))  # noqa: TID251  (what our users will call)
    assert 0 < np.abs(full - half).max() < 0.01
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (exports / "teacher.safetensors").stat().st_size
    assert earteach("export-backbone", whitened, tmp_path / "half.onnx", "--half").code == 2


def test_weights_beyond_float16_are_refused(whitened, tmp_path, monkeypatch):
    state = type(read_checkpoint(best_checkpoint(whitened))).backbone_state.fget

    def large(checkpoint):
        return {k: torch.full_like(v, 1e6) if k == "stem.0.bias" else v for k, v in state(checkpoint).items()}

    monkeypatch.setattr("ear_teacher_cli.model.checkpoint.Checkpoint.backbone_state", property(large))
    with pytest.raises(WeightsError, match=r"stem.0.bias holds values too large for float16"):
        export_backbone(whitened, tmp_path / "half.safetensors", config=ExportConfig(half=True))
    assert list(tmp_path.iterdir()) == []


def test_the_weights_that_the_optimiser_updates_can_be_exported(whitened, run, tmp_path, earteach):
    for name, flag in (("ema", "--ema"), ("learning", "--no-ema")):
        assert earteach("export-backbone", whitened, tmp_path / f"{name}.safetensors", flag).code == 0
    content = read_checkpoint(best_checkpoint(whitened)).content
    for name, part in (("ema", "state_dict"), ("learning", "learning_state")):
        tensors = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(tensors[k], content[part][f"model.backbone.{k}"]) for k in tensors)
    assert not (tmp_path / "learning.whitening.safetensors").exists()  # it was fitted to the others
    result = earteach("export-backbone", run, tmp_path / "x.safetensors", "--no-ema")
    assert result.code == 2 and "one set of weights" in result.err


def test_evaluate_does_not_mix_two_teachers_nor_raw_with_whitened(whitened, run, ears, tmp_path, earteach):
    for name, arguments in {"a": [whitened], "b": [run], "raw": [whitened, "--no-whiten"]}.items():
        assert earteach("embed", ears / "eval.csv", tmp_path / f"{name}.npy", "--weights", *arguments).code == 0
    marks = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b", "raw")}
    assert marks["a"]["fingerprint"] == marks["raw"]["fingerprint"] != marks["b"]["fingerprint"]
    assert (marks["a"]["whitened"], marks["raw"]["whitened"]) == (True, False)
    labels = ears / "eval.csv"
    for flag in ("--whiten", "--center"):
        result = earteach("evaluate", tmp_path / "a.npy", labels, flag, tmp_path / "b.npy")
        assert result.code == 1 and "other weights or preprocessing" in result.err, result
        result = earteach("evaluate", tmp_path / "a.npy", labels, flag, tmp_path / "raw.npy")
        assert result.code == 1 and "is raw" in result.err, result
        assert earteach("evaluate", tmp_path / "a.npy", labels, flag, tmp_path / "a.npy", "--bootstrap", 0).code == 0
    (tmp_path / "b.json").unlink()
    result = earteach("evaluate", tmp_path / "a.npy", labels, "--whiten", tmp_path / "b.npy", "--bootstrap", 0)
    assert "may come from different weights" in result.err
    result = earteach("evaluate", "--compare", tmp_path / "a.npy", tmp_path / "b.npy", labels, "--bootstrap", 0)
    assert result.code == 0, result  # comparing two teachers is allowed


@pytest.mark.slow
def test_only_an_exported_folder_is_overwritten_and_only_with_overwrite(exports, whitened, tmp_path, earteach):
    folder = shutil.copytree(exports / "teacher", tmp_path / "teacher")
    assert earteach("export-backbone", whitened, folder).code == 2
    (folder / "config.json").write_text("old")
    assert earteach("export-backbone", whitened, folder, "--overwrite").code == 0
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 0
    (folder / "mine.txt").write_text("mine")
    result = earteach("export-backbone", whitened, folder, "--overwrite")
    assert result.code == 2 and "mine.txt" in result.err and (folder / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    assert earteach("export-backbone", whitened, tmp_path / "file", "--overwrite").code == 2
    assert earteach("export-backbone", whitened, tmp_path / "x.pth").code == 2
    assert earteach("export-backbone", whitened, tmp_path / "nowhere" / "x").code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "teacher"]


@pytest.mark.slow
def test_a_failed_proof_leaves_no_folder_and_no_onnx(whitened, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "relative_difference", lambda a, b: 1.0)
    with pytest.raises(WeightsError, match="x.onnx: outputs in onnxruntime differ"):
        export_backbone(whitened, tmp_path / "x.onnx")
    opened = folder_format._open_local_dir

    def spoilt(folder):
        backbone, maps = opened(folder)
        forget_a_bias(backbone)
        return backbone, maps

    monkeypatch.setattr(folder_format, "_open_local_dir", spoilt)
    with pytest.raises(WeightsError, match="x: outputs of timm's model differ"):
        export_backbone(whitened, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_export_are_removed(whitened, tmp_path):
    left = tmp_path / ".teacher.abc_0123.part"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    export_backbone(whitened, tmp_path / "teacher")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_similar_names_of_others_are_not_removed(whitened, tmp_path):
    for name in (".teacher.holiday.part", ".teacher.abcdefgh.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_text("mine")
    (tmp_path / ".teacher.ijklmnop.part").write_text("mine")  # a file, not a folder
    export_backbone(whitened, tmp_path / "teacher")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("place", [0, 1])
def test_an_interrupted_rename_leaves_the_earlier_export(exports, whitened, tmp_path, monkeypatch, place):
    import os

    folder = shutil.copytree(exports / "teacher", tmp_path / "teacher")
    (folder / "README.md").write_text("the earlier one")
    rename, calls = os.rename, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == place + 1:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_backbone(whitened, folder, ExportConfig(overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    assert (folder / "README.md").read_text() == "the earlier one"


@pytest.mark.slow
def test_two_forms_of_one_teacher_share_a_whitening_and_others_do_not(exports, whitened, manifests, tmp_path, earteach):
    assert earteach("export-backbone", whitened, tmp_path / "x.safetensors").code == 0
    assert earteach("export-backbone", whitened, tmp_path / "x.onnx").code == 0
    other = train(
        small_config(manifests, output_dir=str(tmp_path), max_epochs=1, whiten=True), Console(quiet=True)
    ).experiment
    result = earteach("export-backbone", other, tmp_path / "x.onnx", "--overwrite")
    assert result.code == 2 and "belongs to x.safetensors" in result.err
    assert earteach("verify", tmp_path / "x.safetensors").code == 0
    (tmp_path / "x.onnx").unlink()
    assert earteach("export-backbone", other, tmp_path / "x.safetensors", "--overwrite").code == 0
    assert earteach("verify", tmp_path / "x.safetensors").code == 0
    assert earteach("export-backbone", whitened, tmp_path / "x.safetensors", "--overwrite", "--no-ema").code == 0
    assert not (tmp_path / "x.whitening.safetensors").exists()  # it belonged to the earlier export


@pytest.mark.slow
def test_nan_is_a_difference(whitened, tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxModel, "__call__", lambda self, pixels: [np.full((len(pixels), 64), np.nan, np.float32)])
    with pytest.raises(WeightsError, match="differ from torch's by inf"):
        export_backbone(whitened, tmp_path / "x.onnx")
    assert golden.relative_difference(np.zeros(2), np.zeros(3)) == float("inf")


def test_the_card_gives_no_metrics_of_other_weights(whitened, tmp_path):
    export_backbone(whitened, tmp_path / "x", config=ExportConfig(ema=False, half=True))
    card = (tmp_path / "x" / "README.md").read_text()
    assert "Not measured for these weights" in card and "float16" in card and "neither averaged nor moved back" in card


@pytest.mark.slow
def test_a_damaged_metrics_file_only_leaves_out_the_metrics(whitened, tmp_path):
    copy = shutil.copytree(whitened, tmp_path / "run")
    for content in (b"\xff\xfe", b"epoch,val/psnr\n2,abc\n1,abc\n"):
        (copy / "metrics.csv").write_bytes(content)
        export_backbone(copy, tmp_path / "x", ExportConfig(overwrite=True))
        assert "not known" in (tmp_path / "x" / "README.md").read_text().lower()


def test_without_readable_images_there_is_no_folder(whitened, tmp_path, earteach):
    (tmp_path / "bad.jpg").write_text("no image")
    (tmp_path / "bad.csv").write_text("image_path\nbad.jpg\n")
    result = earteach("export-backbone", whitened, tmp_path / "x", "--val-metadata", tmp_path / "bad.csv")
    assert result.code == 1 and "not one image could be read" in result.err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments", [["--consent", "yes"], ["--license", "MIT"], ["--val-metadata", "x"], ["--features"]]
)
def test_options_of_another_format_are_refused(whitened, tmp_path, earteach, arguments):
    result = earteach("export-backbone", whitened, tmp_path / "x.safetensors", *arguments)
    assert result.code == 2 and arguments[0] in result.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [".", "", "..", "/"])
def test_a_folder_needs_a_name_of_its_own(whitened, tmp_path, monkeypatch, earteach, out):
    monkeypatch.chdir(tmp_path)
    assert earteach("export-backbone", whitened.resolve(), out, "--overwrite").code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_missing_validation_list_is_asked_for(whitened, ears, tmp_path, monkeypatch, earteach):
    checkpoint = read_checkpoint(best_checkpoint(whitened)).content
    checkpoint["hyper_parameters"]["val_metadata"] = "gone.npy"
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    result = earteach("export-backbone", tmp_path / "moved.ckpt", tmp_path / "teacher")
    assert result.code == 1 and "gone.npy" in result.err and "--val-metadata" in result.err
    arguments = ["--val-metadata", ears / "eval.csv"]
    assert earteach("export-backbone", tmp_path / "moved.ckpt", tmp_path / "teacher", *arguments).code == 0
    assert "metrics.csv was not beside" in (tmp_path / "teacher" / "README.md").read_text()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_onnx_one_line_names_what_to_install(exports, whitened, tmp_path, monkeypatch, earteach, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = earteach("export-backbone", whitened, tmp_path / "x.onnx")
    assert result.code == 1 and f"{package} is not installed" in result.err and "[onnx]" in result.err
    assert list(tmp_path.iterdir()) == []
    if package == "onnxruntime":
        assert earteach("verify", exports / "teacher.onnx").code == 1
    assert earteach("verify", exports / "teacher.safetensors").code == 0


def test_embed_names_what_an_onnx_file_is_for_and_verify_damage(exports, ears, tmp_path, earteach):
    result = earteach("embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", exports / "teacher.onnx")
    assert result.code == 2 and "onnxruntime" in result.err
    for content in (b"", b"no model", (exports / "teacher.onnx").read_bytes()[:5000]):
        (tmp_path / "x.onnx").write_bytes(content)
        result = earteach("verify", tmp_path / "x.onnx")
        assert result.code == 1 and "x.onnx" in result.err, result


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto"])
def test_maps_of_other_models_equal_timms(name):
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0).eval()
    maps = map_model(backbone, name, 64)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        stages = maps(images)
        _, expected = backbone.forward_intermediates(images)
    assert all(torch.equal(a, b) for a, b in zip(stages, expected, strict=True))
    assert len(stages) == len(maps.feature_info.reduction())


@pytest.mark.slow
def test_the_examples_of_the_page_work_as_written(exports, ears, tmp_path, earteach):
    manifest = read_manifest(ears / "eval.csv")
    with Image.open(manifest.file(0)) as photo:
        photo.save(tmp_path / "photo.jpg")
        photo.crop((40, 30, 180, 260)).save(tmp_path / "crop.jpg")
    shutil.copytree(exports / "teacher", tmp_path / "x")
    for suffix in (".safetensors", ".whitening.safetensors"):
        shutil.copy(exports / f"teacher{suffix}", tmp_path / f"x{suffix}")
    text = (Path(__file__).parent.parent / "examples" / "docs" / "formats.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text[text.index("With this package, the rows that") :], re.DOTALL)[:3]
    assert ["load_embedder" in blocks[0], "timm.create_model" in blocks[1], "load_backbone" in blocks[2]] == [True] * 3
    (box,) = set(re.findall(r"\((\d+, \d+, \d+, \d+)\)", "".join(blocks)))
    line = "image_path,x1,y1,x2,y2\nphoto.jpg," + box.replace(" ", "") + "\n"
    (tmp_path / "list.csv").write_text(line)
    for name, source, flags in (
        ("whitened", "list.csv", []),
        ("unit", "list.csv", ["--no-whiten"]),
        ("raw", "list.csv", ["--no-normalize"]),
        ("crop", "crop.jpg", []),
    ):
        arguments = ["embed", tmp_path / source, tmp_path / f"{name}.npy", "--weights", tmp_path / "x", *flags]
        assert earteach(*arguments).code == 0
    close = "import numpy\ndef same(a, name): return abs(a - numpy.load(name + '.npy')).max() < 1e-5\n"
    checks = (
        "assert same(rows, 'whitened') and same(raw, 'unit')",
        "assert (rows * numpy.load('crop.npy')).sum() > 0.98",  # timm resizes with another filter
        "assert same(embedding.numpy(), 'raw')",
    )
    for head, block, check in zip(("", NO_PACKAGE, ""), blocks, checks, strict=True):
        code = head + close + block.replace("convnext_tiny", "test_convnext") + check
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

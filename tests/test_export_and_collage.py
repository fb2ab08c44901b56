"""Exports in a file: what timm reads without this package, the table of formats, and collages."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROUNDING, apart
from PIL import Image
from safetensors import safe_open

from ear_teacher_cli import run_folder
from ear_teacher_cli.data.preprocessing import normalise
from ear_teacher_cli.errors import WeightsError
from ear_teacher_cli.export import FORMATS
from ear_teacher_cli.export import safetensors as safetensors_format
from ear_teacher_cli.export.checks import Check, check_fingerprint, check_golden, check_whitening
from ear_teacher_cli.export.export import export_backbone
from ear_teacher_cli.export.format import Format, Opened, Written
from ear_teacher_cli.export.verify import verify
from ear_teacher_cli.model.export_format import about_of
from ear_teacher_cli.model.teacher import build_backbone
from ear_teacher_cli.model.weights import fingerprint, sha256_of


@pytest.mark.slow
def test_export_opens_in_timm_without_this_package(run, tmp_path, earteach):
    result = earteach("export-backbone", run / "checkpoints" / "last.ckpt", tmp_path / "e.safetensors")
    assert result.code == 0 and "largest difference 0" in result.err
    from ear_teacher_cli.embedding.embedder import load_embedder

    batch = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    teacher = load_embedder(str(run / "checkpoints" / "last.ckpt"))
    with torch.inference_mode():
        torch.save(teacher.backbone(batch), tmp_path / "expected.pt")
    torch.save(batch, tmp_path / "batch.pt")
    code = f"""
import sys; sys.modules["ear_teacher_cli"] = None
import timm, torch
model = timm.create_model("test_convnext", num_classes=0, checkpoint_path={str(tmp_path / "e.safetensors")!r}).eval()
with torch.inference_mode():
    torch.save(model(torch.load({str(tmp_path / "batch.pt")!r})), {str(tmp_path / "found.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = (torch.load(tmp_path / name, weights_only=True) for name in ("found.pt", "expected.pt"))  # noqa: TID251  (the test's own)
    assert apart(found, expected) < ROUNDING  # timm computes in another layout, which rounds otherwise


def test_the_header_holds_all_that_inference_needs(run, tmp_path, earteach):
    earteach("export-backbone", run, tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", "pt") as file:
        header, names = file.metadata(), list(file.keys())
    assert header["architecture"] == "test_convnext" and header["embedding_dim"] == "64"
    assert json.loads(header["mean"]) == json.loads(header["std"]) == [0.5, 0.5, 0.5]
    assert (header["image_size"], header["bbox_buffer"], header["pad"], header["interpolation"]) == (
        "64",
        "0.1",
        "true",
        "bicubic",
    )
    assert header["source_sha256"] == sha256_of(run_folder.best_checkpoint(run))
    assert len(names) == 99 and "head.norm.weight" in names and not any("head.fc" in name for name in names)


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(run, tmp_path, earteach):
    for name in ("a", "b"):
        earteach("export-backbone", run, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_failed_proof_leaves_no_file(run, tmp_path, monkeypatch):
    def spoil(state, path, metadata):
        from safetensors.torch import save_file

        save_file({**state, "stem.0.bias": state["stem.0.bias"] + 1}, path, metadata=metadata)

    monkeypatch.setattr(safetensors_format, "write_safetensors", spoil)
    with pytest.raises(WeightsError, match="differ"):
        export_backbone(run, tmp_path / "e.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out, code", [("e.pth", 2), ("nowhere/e.safetensors", 1)])
def test_outputs_of_unknown_formats_are_refused(run, tmp_path, earteach, out, code):
    assert earteach("export-backbone", run, tmp_path / out).code == code


def write_npz(path, job) -> Written:
    with path.open("wb") as file:
        np.savez(file, header=json.dumps(job.header), **{name: tensor.numpy() for name, tensor in job.state.items()})
    return Written(job.about.golden.difference(open_npz(path).run(job.about.golden.pixels)), "read back", [])


def open_npz(path) -> Opened:
    with np.load(path) as file:  # noqa: TID251  (the test's own file)
        about = about_of(json.loads(str(file["header"])), path.name)
        state = {name: torch.from_numpy(file[name]) for name in file.files if name != "header"}
    backbone = build_backbone(about.architecture, about.preprocessing.image_size).eval()
    backbone.load_state_dict(state)

    def run(pixels):
        with torch.inference_mode():
            return backbone(normalise(torch.from_numpy(pixels), about.preprocessing)).numpy()

    return Opened(about, fingerprint(about.architecture, state, about.preprocessing), run)


def verify_npz(path) -> tuple[list[Check], Opened]:
    opened = open_npz(path)
    checks = [
        check_fingerprint(opened.about.fingerprint, opened.fingerprint),
        check_golden(opened.about, opened.run),
        *check_whitening(path, opened.about),
    ]
    return checks, opened


@pytest.mark.slow
def test_a_format_is_a_module_and_a_line_in_the_table(whitened, run, tmp_path, monkeypatch, earteach):
    refused = earteach("export-backbone", whitened, tmp_path / "teacher.npz")
    assert refused.code == 2 and "name a .safetensors (weights under timm's names), a .onnx" in refused.err
    monkeypatch.setitem(FORMATS, ".npz", Format("NumPy arrays", write_npz, verify_npz, open_npz))
    done = earteach("export-backbone", whitened, tmp_path / "teacher.npz")
    assert done.code == 0 and "read back, largest difference" in done.err and "teacher.whitening" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher.npz", "teacher.whitening.safetensors"]
    done = earteach("verify", tmp_path / "teacher.npz", "--against", whitened)
    names = [line.split()[1] for line in done.out.decode().splitlines()]
    assert done.code == 0 and names == ["fingerprint", "golden", "whitening", "against"], done
    assert earteach("export-backbone", whitened, tmp_path / "teacher.safetensors").code == 0  # shares the whitening
    assert earteach("verify", tmp_path / "teacher.safetensors", "--against", tmp_path / "teacher.npz").code == 0
    other = earteach("verify", tmp_path / "teacher.npz", "--against", run)
    assert other.code == 1 and b"another teacher" in other.out
    refused = earteach("export-backbone", whitened, tmp_path / "x.npz", "--half")
    assert refused.code == 2 and "--half: is for a .safetensors or a folder, not for a .npz" in refused.err


def test_results_are_plain_json(run, tmp_path):
    made = export_backbone(run, tmp_path / "e.safetensors").as_dict()
    assert json.loads(json.dumps(made)) == made and made["kind"] == "safetensors" and made["difference"] == 0
    assert made["path"] == str(tmp_path / "e.safetensors") and made["whitening"] is made["rounding"] is None
    checks = [check.as_dict() for check in verify(str(tmp_path / "e.safetensors"))]
    assert json.loads(json.dumps(checks)) == checks
    assert [check["what"] for check in checks] == ["weights", "file", "fingerprint", "golden batch"]
    assert all(check["passed"] is True and check["found"] for check in checks)


def test_a_checkpoint_of_something_else_is_refused(tmp_path, earteach):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.ckpt")
    result = earteach("export-backbone", tmp_path / "x.ckpt", tmp_path / "e.safetensors")
    assert result.code == 1 and "not a checkpoint of earteach" in result.err


def test_an_existing_export_is_not_overwritten(run, tmp_path, earteach):
    (tmp_path / "e.safetensors").write_text("mine")
    assert earteach("export-backbone", run, tmp_path / "e.safetensors").code == 2
    assert (tmp_path / "e.safetensors").read_text() == "mine"


def test_collage_of_the_runs_own_validation_images(run, tmp_path, earteach):
    result = earteach("collage", run, "-o", tmp_path / "c.png", "--num-samples", 5)
    assert result.code == 0 and "5 images of" in result.err and "mean PSNR" in result.err
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 5 * 96 and image.height > 2 * 96
    assert earteach("collage", run, "-o", tmp_path / "c.png").code == 2


def test_collage_is_seeded_and_takes_other_images(run, ears, tmp_path, earteach):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ["--metadata", ears / "train_teacher.npy", "--num-samples", 6, "--seed", seed]
        assert earteach("collage", run, "-o", tmp_path / f"{name}.png", *arguments).code == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b and a != c
    assert earteach("collage", run, "-o", tmp_path / "f.png", "--metadata", ears / "images").code == 0


def test_collage_is_what_training_drew(run, tmp_path, earteach):
    """The last checkpoint gives the collage of the last epoch: same sample, same reconstruction."""
    earteach("collage", run / "checkpoints" / "last.ckpt", "-o", tmp_path / "c.png", "--num-samples", 4)
    with (
        Image.open(tmp_path / "c.png") as mine,
        Image.open(run / "version_0/reconstruction_collages/epoch_0006.png") as theirs,
    ):
        assert mine.size == theirs.size
        area = (0, 40, mine.width, mine.height)  # below the title
        assert mine.crop(area).tobytes() == theirs.crop(area).tobytes()


def test_collage_names_missing_metadata(run, tmp_path, monkeypatch, earteach):
    moved = shutil.copytree(run, tmp_path / "moved")
    result = earteach("collage", moved, "-o", tmp_path / "c.png", "--metadata", tmp_path / "gone.npy")
    assert result.code == 1 and "gone.npy" in result.err

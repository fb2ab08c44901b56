"""Files that version 0.1.0 wrote keep opening: checkpoint, run, exports, embeddings, configuration, manifests.

files_of_0_1_0/README.md says what they are and how they were made. The tests use the command line and the public Python API
only, so that modules can move.
"""

import csv
import json
import lzma
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import apart

from ear_teacher_cli import EarTeacherLightningModule, load_backbone, load_crop, load_embedder, normalise

WRITTEN = Path(__file__).parent / "files_of_0_1_0"
CHECKPOINT = "run/checkpoints/last.ckpt"
WEIGHTS = ["run", CHECKPOINT, "teacher.safetensors", "teacher"]
# Options that have another name since: what 0.1.0 wrote, and the name now.
RENAMED = {"head_rate": "head_lr_mult", "keep_start": "baseline_weight"}
# The largest relative difference allowed. On the machine that wrote the files, rows and metrics are equal to the bit; with
# other vector instructions (SSE4.1 instead of AVX-512) and two threads, rows differ by 2e-6 and metrics by 5e-4.
CLOSE, CLOSE_METRICS = 1e-4, 5e-3


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "files"
    shutil.copytree(WRITTEN, folder)
    for packed in folder.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return folder


@pytest.fixture
def files(unpacked, monkeypatch) -> Path:
    """The working directory, with the files unpacked. Tests must not change them."""
    monkeypatch.chdir(unpacked)
    return unpacked


@pytest.fixture
def stopped(unpacked, tmp_path, monkeypatch) -> Path:
    """The working directory, with a copy of the run and what it needs."""
    for name in ("run", "ears"):
        shutil.copytree(unpacked / name, tmp_path / name)
    shutil.copy(unpacked / "start.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_npy(path: Path) -> np.ndarray:
    return np.load(path)  # noqa: TID251  (what users call)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def listed_ears(files: Path) -> tuple[list[Path], list[tuple[float, ...]]]:
    """Paths and boxes of eval.csv."""
    rows = read_table(files / "ears" / "eval.csv")
    return [files / "ears" / row["image_path"] for row in rows], [
        tuple(float(row[name]) for name in ("x1", "y1", "x2", "y2")) for row in rows
    ]


def option(config: dict, name: str):
    """The value of an option by its name in 0.1.0."""
    return config[name if name in config else RENAMED[name]]


def assert_close(row: dict[str, str], expected: dict[str, str]) -> None:
    """The metrics of an epoch have those of `expected`, within CLOSE_METRICS; some are empty."""
    found = {name: float(row[name] or "nan") for name in expected}
    wanted = {name: float(value or "nan") for name, value in expected.items()}
    assert found == pytest.approx(wanted, rel=CLOSE_METRICS, nan_ok=True)


# The checkpoint and the exports


@pytest.mark.parametrize("weights", WEIGHTS)
def test_embed_writes_the_rows_that_0_1_0_wrote(weights, files, tmp_path, earteach):
    said = earteach("embed", "ears/eval.csv", tmp_path / "new.npy", "--weights", weights, "--num-workers", 0)
    assert said.code == 0, said.err
    assert apart(read_npy(tmp_path / "new.npy"), read_npy(files / "embeddings.npy")) < CLOSE
    old, new = read_table(files / "embeddings.csv"), read_table(tmp_path / "new.csv")
    assert [{name: row[name] for name in old[0]} for row in new] == old
    old, new = read_json(files / "embeddings.json"), read_json(tmp_path / "new.json")
    assert old.keys() <= new.keys()
    same = ("rows", "dim", "normalized", "whitened", "fingerprint", "architecture", "preprocessing")
    assert {name: new[name] for name in same} == {name: old[name] for name in same}


def test_embed_reads_a_manifest_of_the_original_package(files, tmp_path, earteach):
    # 8 boxes are too few to infer the order of their numbers; version 0.1.0 read one order only
    words = ["--weights", "teacher.safetensors", "--box-format", "xyxy", "--num-workers", 0]
    said = earteach("embed", "ears/val_teacher.npy", tmp_path / "new.npy", *words)
    assert said.code == 0, said.err
    assert apart(read_npy(tmp_path / "new.npy"), read_npy(files / "embeddings.npy")) < CLOSE


@pytest.mark.parametrize("weights", WEIGHTS)
def test_load_embedder_gives_the_rows_that_0_1_0_wrote(weights, files):
    embedder = load_embedder(weights)
    assert embedder.fingerprint == read_json(files / "embeddings.json")["fingerprint"]
    assert apart(embedder.embed(*listed_ears(files)), read_npy(files / "embeddings.npy")) < CLOSE


@pytest.mark.parametrize("weights", WEIGHTS)
def test_load_backbone_gives_the_raw_rows_that_0_1_0_wrote(weights, files):
    backbone, preprocessing = load_backbone(weights)
    crops = [load_crop(path, box, preprocessing) for path, box in zip(*listed_ears(files), strict=True)]
    with torch.inference_mode():
        found = backbone(normalise(torch.from_numpy(np.stack(crops)), preprocessing))
    assert apart(found, read_npy(files / "raw.npz")["embeddings"]) < CLOSE


def test_the_module_opens_the_checkpoint(files):
    backbone, _ = load_backbone(CHECKPOINT)
    found = EarTeacherLightningModule.load_from_checkpoint(CHECKPOINT).state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(found[f"model.backbone.{name}"], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("export", ["teacher.safetensors", "teacher", "teacher.onnx"])
def test_verify_checks_an_export_by_what_0_1_0_wrote_into_it(export, files, earteach):
    if export.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    said = earteach("verify", export, "--against", CHECKPOINT)
    found = said.out.decode()
    assert said.code == 0 and "WRONG" not in found, found + said.err
    assert all(what in found for what in ("golden batch", "whitening", "against last.ckpt"))
    assert "digest" in found  # there is none: that the bytes were not checked is stated


@pytest.mark.slow
def test_export_backbone_exports_the_same_teacher_again(files, tmp_path, earteach):
    assert earteach("export-backbone", CHECKPOINT, tmp_path / "new.safetensors").code == 0
    said = earteach("verify", tmp_path / "new.safetensors", "--against", "teacher.safetensors")
    assert said.code == 0 and b"against teacher.safetensors" in said.out, said.out.decode() + said.err


# The run


@pytest.mark.slow
def test_resume_takes_the_epoch_that_is_left_with_the_metrics_of_0_1_0(stopped, unpacked, earteach):
    said = earteach("resume", "run")
    assert said.code == 0, said.err
    found, expected = read_table(Path("run/metrics.csv")), read_table(unpacked / "metrics_of_3_epochs.csv")
    assert [(row["epoch"], row["step"]) for row in found] == [("0", "0"), ("1", "2"), ("2", "4"), ("3", "6")]
    for row, other in zip(found, expected, strict=True):
        assert_close(row, other)
    assert earteach("embed", "ears/eval.csv", "new.npy", "--weights", CHECKPOINT).code == 0


@pytest.mark.slow
def test_resume_adds_epochs_to_those_planned(stopped, earteach):
    best = [stopped / f"run/checkpoints/best-epoch_000{epoch}-val_retrieval_12.5000.ckpt" for epoch in (1, 2)]
    for path in best:  # not kept in the repository, but the last checkpoint names them
        shutil.copy(CHECKPOINT, path)
    (stopped / "start.safetensors").unlink()  # the checkpoint has all that resuming needs
    said = earteach("resume", CHECKPOINT, "--max-epochs", 4)
    assert said.code == 0, said.err
    assert len(list(best[0].parent.glob("best-*.ckpt"))) == 3  # of four: those of 0.1.0 count
    assert [row["epoch"] for row in read_table(Path("run/metrics.csv"))] == ["0", "1", "2", "3", "4"]


@pytest.mark.slow
def test_resume_starts_a_run_anew_that_left_its_configuration_alone(stopped, unpacked, earteach):
    shutil.rmtree("run/checkpoints")
    Path("run/metrics.csv").unlink()
    said = earteach("resume", "run")
    assert said.code == 0, said.err
    found, expected = read_table(Path("run/metrics.csv")), read_table(unpacked / "metrics_of_3_epochs.csv")
    assert [row["epoch"] for row in found] == ["0", "1", "2", "3"]
    assert_close(found[0], expected[0])  # before training; the decoder, which make.py pruned, is another


@pytest.mark.slow
def test_report_and_collage_are_made_of_the_run(files, tmp_path, earteach):
    for words in (["report", "run", "-o", tmp_path / "new.html"], ["collage", "run", "-o", tmp_path / "new.png"]):
        said = earteach(*words)
        assert said.code == 0 and words[-1].stat().st_size > 1000, said.err


# Configuration and options


def dry_run(earteach, *words) -> dict:
    """The options with which a dry run with the configuration of 0.1.0 is made."""
    options = ["--box-format", "xyxy", "--experiment-name", "other", "--dry-run", "--quiet"]
    said = earteach("train", "--config", "run/config.toml", *options, *words)
    assert said.code == 0, said.err
    return tomllib.loads(said.out.decode())


@pytest.mark.slow
def test_train_reads_the_configuration_that_0_1_0_wrote(files, earteach):
    found = dry_run(earteach)
    written = tomllib.loads((files / "run" / "config.toml").read_text(encoding="utf-8"))
    assert written["head_rate"] == 3 and written["keep_start"] == 0.25  # neither is a default
    for name, value in (written | {"experiment_name": "other"}).items():
        assert option(found, name) == value, name


@pytest.mark.slow
def test_train_reads_the_spelling_that_options_had_in_0_1_0(files, earteach):
    found = dry_run(earteach, "--keep-start", 0.5, "--head_rate", 2)
    assert option(found, "keep_start") == 0.5 and option(found, "head_rate") == 2


@pytest.mark.slow
def test_the_preset_of_the_original_package_has_its_name_of_0_1_0(files, tmp_path, earteach):
    written = (files / "run" / "config.toml").read_text(encoding="utf-8")
    (tmp_path / "preset.toml").write_text(f'preset = "seed"\n{written}'.replace("views = 2\n", ""), encoding="utf-8")
    words = ["--contrastive-weight", 0]  # compares two views, and the preset has one
    assert dry_run(earteach, "--config", tmp_path / "preset.toml", *words)["views"] == 1
    assert dry_run(earteach, "--preset", "seed")["views"] == 2  # a configuration wins over it


# Embeddings and manifests


@pytest.mark.parametrize("embeddings", ["embeddings.npy", "table.csv"])
def test_evaluate_scores_embeddings_as_0_1_0_did(embeddings, files, tmp_path, earteach):
    said = earteach("evaluate", embeddings, "--bootstrap", 0, "--json", tmp_path / "new.json")
    assert said.code == 0, said.err
    old, new = read_json(files / "evaluation.json"), read_json(tmp_path / "new.json")
    assert old.keys() <= new.keys() and new["counts"].items() >= old["counts"].items()
    (old,), (new,) = old["systems"], new["systems"]
    assert old.keys() <= new.keys() and (new["weights"], new["dim"]) == (old["weights"], old["dim"])
    expected = {figure["name"]: figure["value"] for figure in old["figures"]}
    found = {figure["name"]: figure["value"] for figure in new["figures"]}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_evaluate_compares_embeddings_of_two_formats(files, tmp_path, earteach):
    words = ["--compare", "raw.npz", "embeddings.npy", "ears/eval.csv", "--bootstrap", 0]
    said = earteach("evaluate", *words, "--json", tmp_path / "new.json")
    assert said.code == 0, said.err
    systems = read_json(tmp_path / "new.json")["systems"]
    assert [system["file"] for system in systems] == ["raw.npz", "embeddings.npy"]


@pytest.mark.slow
def test_validate_data_reads_manifests_of_the_original_package(files, tmp_path, earteach):
    manifests = ["ears/train_teacher.npy", "ears/val_teacher.npy"]
    said = earteach("validate-data", *manifests, "--box-format", "xyxy", "--json", tmp_path / "new.json")
    assert said.code == 0, said.err

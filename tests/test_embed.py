"""embed: rows and names side by side, from anything, to anything."""

import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from ear_teacher_cli import run_folder
from ear_teacher_cli.console import Console
from ear_teacher_cli.data.crop import load_crop
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.embedding.embedder import load_embedder
from ear_teacher_cli.embedding.files import read_embeddings
from ear_teacher_cli.model.checkpoint import read_checkpoint


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def embedded(run, ears, tmp_path, earteach):
    said = earteach("embed", ears / "eval.csv", tmp_path / "out.npy", "--weights", run)
    assert said.code == 0, said.err
    return tmp_path / "out.npy"


def load(path_or_bytes) -> np.ndarray:
    return np.load(path_or_bytes, allow_pickle=False)  # noqa: TID251  (what our users will call)


def test_rows_names_and_provenance(embedded, run, ears):
    rows, names, about = (
        load(embedded),
        rows_of(embedded.with_suffix(".csv")),
        json.loads(embedded.with_suffix(".json").read_text()),
    )
    assert rows.shape == (12, 64) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert [entry["row"] for entry in names] == [str(i) for i in range(12)]
    assert [entry["path"] for entry in names] == list(read_manifest(ears / "eval.csv").paths)
    assert {entry["status"] for entry in names} == {"ok"}
    assert about["rows"] == 12 and about["normalized"] is True and about["preprocessing"]["image_size"] == 64
    best = run_folder.best_checkpoint(run)
    import hashlib

    assert about["weights_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert about["weights"] == best.name and str(run.parent) not in json.dumps(about)


def test_a_row_is_the_backbone_on_the_crop(embedded, run, ears):
    manifest = read_manifest(ears / "eval.csv")
    embedder = load_embedder(str(run))
    crop = load_crop(manifest.file(5), manifest.boxes[5], embedder.preprocessing)
    alone = embedder(torch.from_numpy(crop)[None])[0].numpy()
    assert np.allclose(load(embedded)[5], alone / np.linalg.norm(alone), atol=1e-5)


def test_no_normalize_keeps_the_lengths(run, ears, tmp_path, earteach, embedded):
    earteach("embed", ears / "eval.csv", tmp_path / "raw.npy", "--weights", run, "--no-normalize")
    raw = load(tmp_path / "raw.npy")
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=0.01)
    assert np.allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), load(embedded), atol=1e-5)
    assert json.loads((tmp_path / "raw.json").read_text())["normalized"] is False


def test_batches_and_workers_do_not_matter(run, ears, tmp_path, earteach, embedded):
    earteach("embed", ears / "eval.csv", tmp_path / "b.npy", "--weights", run, "--batch-size", 5, "--num-workers", 2)
    assert np.allclose(load(tmp_path / "b.npy"), load(embedded), atol=1e-6)


def test_formats_agree(run, ears, tmp_path, earteach, embedded):
    for kind in ("npz", "csv"):
        assert earteach("embed", ears / "eval.csv", tmp_path / f"{kind}.{kind}", "--weights", run).code == 0
    archive = load(tmp_path / "npz.npz")
    assert np.array_equal(archive["embeddings"], load(embedded)) and archive["boxes"].shape == (12, 4)
    table = rows_of(tmp_path / "csv.csv")
    numbers = np.array([[float(row[f"e{i}"]) for i in range(64)] for row in table], dtype=np.float32)
    assert np.array_equal(numbers, load(embedded))
    assert [row["path"] for row in table] == archive["paths"].tolist()


def test_folder_image_and_stdin(run, ears, tmp_path, earteach, monkeypatch):
    image = str(ears / "images" / "p008" / "00.jpg")
    assert earteach("embed", ears / "images" / "p008", tmp_path / "f.npy", "--weights", run).code == 0
    assert earteach("embed", image, tmp_path / "p.npy", "--weights", run).code == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{image}\n\n{image}\n".encode()), encoding="utf-8"))
    said = earteach("embed", "-", "-", "--weights", run)
    assert said.code == 0, said.err
    rows = load(io.BytesIO(said.out))
    assert load(tmp_path / "f.npy").shape == (4, 64)
    assert np.allclose(rows[0], load(tmp_path / "p.npy")[0], atol=1e-6) and np.array_equal(rows[0], rows[1])


def damaged(ears: Path, into: Path) -> Path:
    copy = shutil.copytree(ears, into / "ears")
    manifest = read_manifest(copy / "eval.csv")
    Path(manifest.file(3)).write_bytes(b"\xff\xd8 no more")
    Path(manifest.file(7)).unlink()
    return copy


def test_unreadable_images_are_skipped_listed_and_rows_stay_aligned(run, ears, tmp_path, earteach, embedded):
    copy = damaged(ears, tmp_path)
    said = earteach("embed", copy / "eval.csv", tmp_path / "d.npy", "--weights", run, "--batch-size", 4)
    assert said.code == 0 and said.err.count("skipped") == 3 and "10 rows of 64, 2 skipped" in said.err
    names, rows = rows_of(tmp_path / "d.csv"), load(tmp_path / "d.npy")
    assert len(names) == 12 and rows.shape == (10, 64)
    assert [i for i, entry in enumerate(names) if entry["row"] == ""] == [3, 7]
    assert names[7]["status"].startswith("missing")
    for position, entry in enumerate(names):
        if entry["row"]:
            assert np.allclose(rows[int(entry["row"])], load(embedded)[position], atol=1e-6)


def test_zero_images_is_an_error_and_leaves_nothing(run, tmp_path, earteach, monkeypatch):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no image")
    said = earteach("embed", folder, tmp_path / "x.npy", "--weights", run)
    assert said.code == 1 and "not one of 1 images" in said.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    assert earteach("embed", "-", tmp_path / "x.npy", "--weights", run).code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_nothing_is_overwritten_unasked(run, ears, embedded, earteach):
    before = embedded.read_bytes()
    said = earteach("embed", ears / "images" / "p008", embedded, "--weights", run)
    assert said.code == 2 and embedded.read_bytes() == before
    embedded.unlink()
    said = earteach("embed", ears / "images" / "p008", embedded, "--weights", run)
    assert said.code == 2 and "out.json: exists already" in said.err and not embedded.exists()
    assert earteach("embed", ears / "images" / "p008", embedded, "--weights", run, "--overwrite").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["x.parquet"],
        ["x"],
        ["x.npy", "--format", "csv"],
        ["-", "--format", "parquet"],
        ["nowhere/x.npy"],
    ],
)
def test_impossible_outputs_are_known_at_once(words, run, ears, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    said = earteach("embed", ears / "eval.csv", *words, "--weights", run)
    assert said.code in (1, 2) and list(tmp_path.iterdir()) == []


def test_every_kind_of_weights_gives_the_same_rows(run, ears, tmp_path, earteach, embedded, monkeypatch):
    best = run_folder.best_checkpoint(run)
    assert earteach("export-backbone", run, tmp_path / "e.safetensors").code == 0
    plain = read_checkpoint(best).backbone_state
    save_file(plain, tmp_path / "plain.safetensors")
    torch.save(plain, tmp_path / "plain.pth")
    bare = ["--backbone", "test_convnext", "--image-size", "64"]
    cases = [
        [best],
        [tmp_path / "e.safetensors"],
        [tmp_path / "plain.safetensors", *bare],
        [tmp_path / "plain.pth", *bare],
        [best, *bare],
    ]
    for number, words in enumerate(cases):
        said = earteach("embed", ears / "eval.csv", tmp_path / f"{number}.npy", "--weights", *words)
        assert said.code == 0, said.err
        assert "backbone 99/99 tensors" in said.err
        assert np.array_equal(load(tmp_path / f"{number}.npy"), load(embedded)), words
    monkeypatch.setenv("EARTEACH_WEIGHTS", str(tmp_path / "e.safetensors"))
    assert "e.safetensors" in earteach("embed", ears / "eval.csv", tmp_path / "env.npy").err


def test_without_weights_the_newest_run_is_taken_and_named(run, ears, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    said = earteach("embed", ears / "eval.csv", "x.npy")
    assert said.code == 1 and "EARTEACH_WEIGHTS" in said.err and "--weights" in said.err
    shutil.copytree(run, tmp_path / "ear_teacher" / "outputs" / "mine")
    said = earteach("embed", ears / "eval.csv", "x.npy")
    assert said.code == 0 and "ear_teacher/outputs/mine/checkpoints/best-" in said.err


@pytest.mark.parametrize(
    "name, words",
    [
        ("plain.safetensors", "--backbone"),
        ("plain.pth", "--backbone"),
        ("garbage.ckpt", "damaged"),
        ("timm:nope", "timm has no model"),
        ("timm:convnext_tiny.fb_in22k", "no network"),
    ],
)
def test_weights_that_cannot_be_used_say_what_to_do(name, words, ears, tmp_path, earteach):
    state = timm.create_model("test_convnext", num_classes=0).state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    (tmp_path / "garbage.ckpt").write_bytes(os.urandom(3000))
    said = earteach(
        "embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", name if ":" in name else tmp_path / name
    )
    assert said.code in (1, 2) and words in said.err and not (tmp_path / "x.npy").exists()


@pytest.mark.slow
def test_a_pipe_of_paths_and_a_closed_pipe(run, ears, tmp_path):
    command = (
        f"{shlex.quote(sys.executable)} -m ear_teacher_cli embed - - --format csv --weights {shlex.quote(str(run))} -q"
    )
    find = f"find {shlex.quote(str(ears / 'images'))} -name '*.jpg' | sort"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {find} | {command} | wc -l"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "45" and done.stderr == ""
    # far more output than a pipe holds, and a reader that leaves after a line
    many = f"for i in $(seq 12); do {find}; done"
    script = f"({many}) | {command} | head -1; echo ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("row,path") and done.stdout.endswith("\n0\n") and done.stderr == ""


def test_an_input_is_never_replaced_not_even_with_overwrite(run, ears, tmp_path, earteach):
    copy = shutil.copytree(ears, tmp_path / "ears")
    before = (copy / "eval.csv").read_bytes()
    said = earteach("embed", copy / "eval.csv", copy / "eval.npy", "--weights", run, "--overwrite")
    assert said.code == 2 and "is an input" in said.err
    assert (copy / "eval.csv").read_bytes() == before


def test_odd_names_come_back_as_they_are(run, ears, tmp_path, earteach, monkeypatch):
    source = ears / "images" / "p008" / "00.jpg"
    odd = [tmp_path / "a\u202fb.jpg", tmp_path / "two\nlines.jpg", tmp_path / "back\\slash, comma.jpg"]
    raw = os.fsencode(tmp_path) + b"/latin\xe9.jpg"
    for path in [*odd, raw]:
        shutil.copy(source, path)
    listing = b"\n".join([*(os.fsencode(p) for p in odd if "\n" not in p.name), raw])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listing), encoding="utf-8"))
    assert earteach("embed", "-", tmp_path / "x.npy", "--weights", run).code == 0
    paths = [row["path"] for row in rows_of(tmp_path / "x.csv")]
    assert paths == [str(odd[0]), str(odd[2]), str(tmp_path / "latin\\udce9.jpg")]
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(source, folder / "two\nlines.jpg")
    assert earteach("embed", folder, tmp_path / "y.npy", "--weights", run).code == 0
    assert [row["path"] for row in rows_of(tmp_path / "y.csv")] == ["two\\nlines.jpg"]


def killed_after(batches: int, words: list, folder: Path, number: int = signal.SIGKILL) -> None:
    """Run `earteach` in a process of its own, killed when it has written so many batches of rows."""
    script = (
        "import os, signal, sys; from ear_teacher_cli.embedding.shards import Shards; from ear_teacher_cli.cli.app import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a script's background has it ignored
        "write, calls = Shards.write, []\n"
        "def counted(self, *arguments):\n"
        "    calls.append(write(self, *arguments))\n"
        f"    if len(calls) == {batches}: os.kill(os.getpid(), {int(number)})\n"
        "Shards.write = counted\n"
        "main()"
    )
    done = forked.run([sys.executable, "-c", script, *words], cwd=folder)
    assert done.returncode in (-number, 128 + number) and "Traceback" not in done.stderr, done.stderr
    if number != signal.SIGKILL:
        assert "--resume continues" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("npy", signal.SIGKILL),
        ("npy", signal.SIGTERM),
        ("npy", signal.SIGINT),
        ("npz", signal.SIGKILL),
        ("csv", signal.SIGKILL),
    ],
)
def test_a_killed_embed_goes_on_to_the_same_bytes(kind, number, run, ears, tmp_path, earteach):
    copy = damaged(ears, tmp_path)
    words = ["embed", copy / "eval.csv", f"x.{kind}", "--weights", run, "--batch-size", 2, "--num-workers", 0]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert earteach(*words[:2], whole / f"x.{kind}", *words[3:]).code == 0
    killed_after(4, words, killed, number)
    assert [p.name for p in killed.iterdir()] == [f".x.{kind}.unfinished"]
    words[2] = killed / f"x.{kind}"
    said = earteach(*words, "--resume")
    assert said.code == 0 and "resuming: 8 of 12 images are done" in said.err, said.err
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    said = earteach(*words, "--resume")
    assert said.code == 2 and "nothing unfinished" in said.err


BY_TWOS = ["--batch-size", 2, "--num-workers", 0]


@pytest.fixture(scope="module")
def killed(run, ears, tmp_path_factory) -> Path:
    """What an embed of eval.csv into x.npy leaves that was killed after three batches of two."""
    folder = tmp_path_factory.mktemp("killed")
    killed_after(3, ["embed", ears / "eval.csv", folder / "x.npy", "--weights", run, *BY_TWOS], folder)
    return folder / ".x.npy.unfinished"


@pytest.mark.parametrize("lost", [1, 300, 10**6, None])
def test_a_damaged_or_missing_shard_is_made_again(lost, killed, run, ears, tmp_path, earteach):
    words = ["embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", run, *BY_TWOS]
    shutil.copytree(killed, tmp_path / killed.name)
    shard = sorted((tmp_path / killed.name).glob("*.shard"))[1]
    data = shard.read_bytes()
    shard.unlink()
    if lost is not None:
        shard.write_bytes(data[:-lost])
    said = earteach(*words, "--resume")
    assert said.code == 0 and "resuming: 4 of 12 images are done" in said.err, said.err
    assert earteach(*words[:2], tmp_path / "y.npy", *words[3:]).code == 0
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "y.csv").read_bytes()
    assert not list(tmp_path.glob(".x*"))


def test_killed_between_the_outputs_and_the_end_the_same_is_written_again(run, ears, tmp_path, earteach, monkeypatch):
    """The outputs have their names, and the shards are still there."""
    words = ["embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", run, *BY_TWOS]
    monkeypatch.setattr("shutil.rmtree", lambda *_: None)
    assert earteach(*words).code == 0
    monkeypatch.undo()
    before = (tmp_path / "x.npy").read_bytes()
    with open(tmp_path / "x.npy", "rb") as held:  # as a reader has it open
        said = earteach(*words, "--resume")
        assert said.code == 0 and "resuming: 12 of 12 images are done" in said.err, said.err
        assert held.read() == before == (tmp_path / "x.npy").read_bytes()
    assert not list(tmp_path.glob(".x*"))


def test_resume_refuses_other_weights_images_and_batches(killed, run, ears, tmp_path, earteach):
    copy = shutil.copytree(ears, tmp_path / "ears")
    words = ["embed", copy / "eval.csv", tmp_path / "x.npy", "--weights", run, *BY_TWOS]
    shutil.copytree(killed, tmp_path / killed.name)
    other = run / "checkpoints" / "epoch_0005.ckpt"
    assert "other weights" in earteach(*words[:4], other, *words[5:], "--resume").err
    assert "other batch size (2, now 4)" in earteach(*words[:6], 4, "--resume").err
    assert "other normalized" in earteach(*words, "--resume", "--no-normalize").err
    os.utime(read_manifest(copy / "eval.csv").file(9), (1, 1))
    said = earteach(*words, "--resume")
    assert said.code == 1 and "other images or labels" in said.err and not (tmp_path / "x.npy").exists()
    assert "start again with --overwrite instead of --resume" in said.err


def test_what_a_killed_embed_has_done_is_removed_only_with_overwrite(killed, run, ears, tmp_path, earteach):
    words = ["embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", run, *BY_TWOS]
    left = shutil.copytree(killed, tmp_path / killed.name)
    before = {path.name: path.read_bytes() for path in left.iterdir()}
    (tmp_path / "x.npy").write_bytes(b"an earlier one")  # the line about it would lead to --overwrite alone
    said = earteach(*words)
    assert said.code == 2 and len(said.err.splitlines()) == 1 and "6 finished rows" in said.err
    assert "continue with --resume, or start again with --overwrite" in said.err
    assert {path.name: path.read_bytes() for path in left.iterdir()} == before
    missing = earteach(*words[:4], tmp_path / "nobody.safetensors", *words[5:], "--overwrite")
    assert missing.code == 1 and {path.name: path.read_bytes() for path in left.iterdir()} == before
    said = earteach(*words, "--overwrite")
    assert said.code == 0 and not list(tmp_path.glob(".x*")), said.err
    assert "the unfinished rows are removed (--overwrite)" in said.err
    assert earteach(*words[:2], "-", *words[3:]).code == 0  # nothing of it is kept


def test_what_cannot_be_resumed_is_not_in_the_way(killed, run, ears, tmp_path, earteach):
    words = ["embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", run, *BY_TWOS]
    left = shutil.copytree(killed, tmp_path / killed.name)
    (left / "state.json").unlink()
    assert earteach(*words).code == 0
    shutil.copytree(killed, left)
    (left / "state.json").write_text("{")
    assert "start again with --overwrite instead of --resume" in earteach(*words, "--resume").err
    said = earteach(*words)
    assert said.code == 2 and "left 6 finished rows" in said.err and "--overwrite" in said.err
    assert earteach(*words, "--overwrite").code == 0 and not list(tmp_path.glob(".x*"))


def test_two_embeds_at_once_into_one_file_are_refused(run, ears, tmp_path, earteach):
    (tmp_path / ".x.npy.unfinished").mkdir()
    script = (
        "import sys; from pathlib import Path; from ear_teacher_cli.files import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", script, tmp_path / ".x.npy.unfinished"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        said = earteach("embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", run)
        other.kill()
    assert said.code == 1 and f"process {other.pid} on " in said.err and "is writing there" in said.err
    assert earteach("embed", ears / "eval.csv", tmp_path / "x.npy", "--weights", run).code == 0  # its lock died with it


def test_formulas_and_control_characters_in_csv(run, ears, tmp_path, earteach):
    source = ears / "images" / "p008" / "00.jpg"
    names = ["=cmd.jpg", "+1.jpg", "'=x.jpg", "@a.jpg", "plain.jpg"]
    for name in names:
        shutil.copy(source, tmp_path / name)
    with open(tmp_path / "list.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image_path", "identity"], *([name, "=1+1"] for name in names)])
    assert earteach("embed", tmp_path / "list.csv", tmp_path / "x.npy", "--weights", run).code == 0
    table = rows_of(tmp_path / "x.csv")
    assert [row["path"] for row in table] == ["'=cmd.jpg", "'+1.jpg", "''=x.jpg", "'@a.jpg", "plain.jpg"]
    assert {row["identity"] for row in table} == {"'=1+1"}
    found = read_embeddings(tmp_path / "x.npy")
    assert found.paths == names and set(found.identities) == {"=1+1"}


def test_weights_that_carry_their_preprocessing_keep_it(run, ears, tmp_path, earteach):
    assert earteach("export-backbone", run, tmp_path / "e.safetensors").code == 0
    for weights in (run, tmp_path / "e.safetensors"):
        words = ["embed", ears / "eval.csv", tmp_path / "x.npy", "--overwrite", "--weights", weights]
        said = earteach(*words, "--backbone", "convnext_atto")
        assert said.code == 2 and "test_convnext at 64 px" in said.err
        assert earteach(*words, "--image-size", 96).code == 2
        assert earteach(*words, "--backbone", "test_convnext").code == 0
        assert json.loads((tmp_path / "x.json").read_text())["preprocessing"]["image_size"] == 64


def test_a_name_too_long_is_one_line(run, tmp_path, earteach):
    said = earteach("embed", "x" * 5000, tmp_path / "x.npy", "--weights", run)
    assert said.code == 1 and len(said.err.splitlines()) == 1


@pytest.mark.slow
def test_precision_is_kept_with_the_embeddings(run, ears, tmp_path, earteach):
    """Rows in bfloat16 are close to the others, and are not taken for them."""
    words = ["embed", ears / "eval.csv", "--weights", run, "--num-workers", 0]
    for name, precision in (("full", "32-true"), ("half", "bf16-mixed"), ("none", "16-mixed")):
        said = earteach(*words[:2], tmp_path / f"{name}.npy", *words[2:], "--precision", precision)
        assert said.code == 0, said.err
        assert ("16-mixed needs a GPU" in said.err) == (name == "none")
    full, half, none = (load(tmp_path / f"{name}.npy") for name in ("full", "half", "none"))
    assert half.dtype == np.float32 and np.array_equal(full, none)
    assert 0 < np.abs(full - half).max() < 0.1 and (full * half).sum(1).min() > 0.99
    about = [json.loads((tmp_path / f"{name}.json").read_text())["precision"] for name in ("full", "half", "none")]
    assert about == ["32-true", "bf16-mixed", "32-true"]
    said = earteach("evaluate", tmp_path / "full.npy", ears / "eval.csv", "--whiten", tmp_path / "half.npy")
    assert said.code != 0 and "bf16-mixed" in said.err


def test_on_a_gpu_several_batches_are_under_way(run, ears, monkeypatch):
    """In order, and all of them: pretended here, as a CPU has nothing to wait for."""
    from ear_teacher_cli.data.manifest import read_input
    from ear_teacher_cli.embedding import embedder as module

    loaded = module.load_embedder(run)
    manifest = read_input(str(ears / "eval.csv"), str(ears))
    launch, running, most = loaded.launch, [], []

    def launched(pixels):
        wait = launch(pixels)
        running.append(wait)
        most.append(len(running))

        def waited():
            running.remove(wait)
            return wait()

        return waited

    options = (manifest, 4, 0, 60, Console(quiet=True))
    expected = [(good, vectors.tolist()) for good, vectors, _ in module.embed_images(loaded, *options)]
    monkeypatch.setattr(loaded, "launch", launched, raising=False)
    monkeypatch.setitem(module.AHEAD, "cpu", 2)
    found = [(good, vectors.tolist()) for good, vectors, _ in module.embed_images(loaded, *options)]
    assert found == expected and len(found) == 3 and max(most) == 3 and not running

"""Properties, searched by hypothesis: crop arithmetic, manifests there and back, any words to the command line; and short
runs of the fuzzer and of the soak (`make fuzz`, `make soak` are the long ones)."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
from conftest import BACKBONE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ear_teacher_cli.data.crop import buffered_box, check_box, check_box_inside, cut, points_in_crop
from ear_teacher_cli.data.manifest import read_manifest, write_manifest
from ear_teacher_cli.data.preprocessing import Preprocessing
from ear_teacher_cli.errors import EarTeachError, ImageError
from ear_teacher_cli.files import escape_csv, printable, unescape_csv

SHARED = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZE = st.tuples(st.integers(1, 300), st.integers(1, 300))
NUMBER = st.floats(-50, 400) | st.sampled_from([float("nan"), float("inf"), -0.0, 1e300, 1e-300])
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@SHARED
@given(size=SIZE, box=st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), buffer=st.floats(0, 2), pad=st.booleans())
def test_a_crop_is_the_box_with_its_buffer_or_an_image_error(size, box, buffer, pad):
    preprocessing = Preprocessing(32, buffer, pad, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = Image.new("RGB", size, (200, 10, 10))
    try:
        crop = cut(image, box, preprocessing)
    except ImageError:
        x1, y1, x2, y2 = box
        inside = x1 >= 0 and y1 >= 0 and x2 <= size[0] and y2 <= size[1] and min(x2 - x1, y2 - y1) >= 2
        assert not inside
        return
    check_box(box)
    check_box_inside(box, size)
    x1, y1, x2, y2 = buffered_box(box, size, buffer)
    assert 0 <= x1 <= x2 <= size[0] and 0 <= y1 <= y2 <= size[1]
    assert x1 <= max(0, box[0]) and x2 >= min(size[0], box[2])
    assert crop.size == (32, 32) and np.asarray(crop)[15, 15].tolist() == [200, 10, 10]
    corners = points_in_crop([(x1, y1), (x2, y2)], size, box, preprocessing)
    assert (corners >= -1e-6).all() and (corners <= 32 + 1e-6).all()
    assert np.isclose((corners[1] - corners[0]).max(), 32)


@pytest.mark.slow
@SHARED
@given(
    rows=st.lists(
        st.tuples(NAME, st.none() | st.tuples(*[st.floats(2, 1e6) | st.floats(-1e6, -2)] * 4), NAME),
        min_size=1,
        max_size=6,
    ),
    data=st.data(),
)
def test_a_manifest_written_is_the_manifest_read(tmp_path, rows, data):
    lines = [{"image_path": path, "bbox": box, "box_format": "xyxy", "identity": name} for path, box, name in rows]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    manifest = read_manifest(tmp_path / "x.jsonl", tmp_path)
    assert [path.replace("\\", "/") for path, _, _ in rows] == list(manifest.paths)
    suffix = data.draw(st.sampled_from([".npy", ".jsonl", ".csv"]))
    plain = all(printable(text) == text for path, _, name in rows for text in (path, name))
    if suffix == ".csv" and not plain:
        with pytest.raises(EarTeachError, match="control characters"):
            write_manifest(manifest, tmp_path / "y.csv")
        return
    write_manifest(manifest, tmp_path / f"y{suffix}")
    back = read_manifest(tmp_path / f"y{suffix}", tmp_path)
    assert [path.removeprefix("./") for path in back.paths] == [path.removeprefix("./") for path in manifest.paths]
    assert list(back.boxes) == list(manifest.boxes)
    assert [name.strip() for name in back.identities] == [name.strip() for name in manifest.identities]


@pytest.mark.slow
@SHARED
@given(text=st.text())
def test_a_cell_is_printable_no_formula_and_comes_back(text):
    made = escape_csv(text)
    assert made[:1] not in ("=", "+", "-", "@", "\t", "\r") and printable(made) == made
    assert unescape_csv(made) == printable(text)
    assert next(csv.reader([made])) == [made] if not set(made) & set('",') and made else True


WORD = st.sampled_from(
    ["train", "resume", "embed", "evaluate", "collage", "export-backbone", "validate-data", "-", "--", "--weights", "--json",
     "--out", "-o", "--config", "--preset", "original", "--batch-size", "0", "-1", "1e9", "nan", "x.npy", "x.csv", "/dev/null", ".",
     "--quiet", "--dry-run", "--image-size", "--backbone", BACKBONE, "timm:", "--compare", "--root-dir", "--seed", "--overwrite",
     "--resume", "--help", "--margin-preset", "--far", "0.5", "--devices", "999", "--accelerator", "tpu", "--bootstrap"]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)  # fmt: skip


@pytest.mark.slow
@settings(SHARED, max_examples=120)
@given(words=st.lists(WORD, min_size=1, max_size=7))
def test_any_words_are_understood_or_refused(tmp_path, monkeypatch, earteach, words):
    """The fixture fails on a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    said = earteach(*words)
    assert said.code in (0, 1, 2), (words, said)
    if said.code:
        assert said.err.strip() or said.out.strip(), words


def alone(script: str, *words) -> str:
    """In a process of its own: the fuzzer limits its memory, the soak forks."""
    command = [sys.executable, Path(__file__).parent / script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_short_run_of_the_fuzzer_finds_nothing():
    said = alone("fuzz.py", "--manifests", 1500, "--images", 600, "--weights", 40, "--embeddings", 600, "--seed", 1)
    assert said.count(", 0 FAULT") == 4


def test_the_fuzzer_does_find_what_is_there(capfd, monkeypatch):
    monkeypatch.setitem(fuzz.KINDS, "images", (fuzz.image_corpus, fuzz.changed, lambda path: 1 / 0))
    assert fuzz.main(["--images", "2"]) == 1
    assert capfd.readouterr().out.count("ZeroDivisionError: ") == 2


@pytest.mark.slow
def test_a_short_soak_loses_nothing():
    assert ", 0 lost" in alone("soak.py", "--kills", 5, "--seed", 1)

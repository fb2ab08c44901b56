"""validate-data finds each kind of fault, names its row, and touches nothing."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from conftest import read_table
from PIL import Image
from test_crop import bad_images

from ear_teacher_cli.data.image_checks import NEAR_BITS, near_pairs, perceptual_hash
from ear_teacher_cli.data.manifest import read_manifest


def scene(seed: int, size=(160, 200)) -> Image.Image:
    """A smooth random image: no two seeds alike, and alike to itself after a light change."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def faults(tmp_path):
    """A folder with one row for each fault; {row: reason}."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows, expected = [], {}

    def add(path, box, reason=None):
        if reason:
            expected[len(rows)] = reason
        rows.append((path, box))

    for i in range(4):
        scene(i).save(folder / f"good{i}.png")
        add(f"good{i}.png", (40, 50, 110, 150))
    for name, (path, reason) in bad_images(folder).items():
        add(path.name, (1, 1, 50, 50), reason)
        assert name
    whole = (40, 50, 110, 150)
    add("good0.png", (110, 50, 40, 150), "box-empty")
    add("good0.png", (float("nan"), 50, 40, 150), "box-not-finite")
    add("good0.png", (100, 100, 400, 180), "box-outside")
    add("../data/../../x.png", whole, "outside-root")
    add("good1.png", (10, 10, 30, 60), "box-small")
    add("good1.png", (2, 2, 100, 150), "box-clamped")
    add("good2.png", whole, "duplicate-row")
    for mode, reason in (("L", "mode-grey"), ("RGBA", "mode-alpha"), ("CMYK", "mode-cmyk"), ("P", "mode-palette")):
        scene(10 + len(rows)).convert(mode).save(folder / f"{mode}.tif")
        add(f"{mode}.tif", whole, reason)
    Image.fromarray(np.random.default_rng(5).integers(0, 65535, (200, 160), dtype=np.uint16)).save(folder / "deep.png")
    add("deep.png", whole, "mode-16-bit")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(30, (200, 160)).save(folder / "turned.jpg", exif=exif)
    add("turned.jpg", (10, 10, 195, 155), "exif-rotated")
    shutil.copy(folder / "good3.png", folder / "copy.png")
    add("copy.png", whole, "duplicate-image")
    scene(1).save(folder / "similar.jpg", quality=80)
    add("similar.jpg", whole, "near-duplicate")
    manifest = folder / "m.npy"
    content = {
        "image_paths": [path for path, _ in rows],
        "bboxes": np.array([box for _, box in rows], dtype=np.float64),
        "box_format": "xyxy",  # hardly two boxes differ: nothing to judge by
    }
    np.save(manifest, np.array(content, dtype=object))
    return manifest, expected


def test_every_fault_is_found_with_its_row(faults, tmp_path, earteach):
    manifest, expected = faults
    said = earteach("validate-data", manifest, "--json", tmp_path / "report.json")
    assert said.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    found = {(f["row"], f["reason"]) for f in report["findings"]}
    assert set(expected.items()) <= found
    assert {row for row, _ in found} == set(expected)  # the good rows are not accused
    by_row = {f["row"]: f for f in report["findings"]}
    turned = next(row for row, reason in expected.items() if reason == "exif-rotated")
    assert any("drawn on the unturned image" in f["detail"] for f in report["findings"] if f["row"] == turned)
    assert by_row[max(expected)]["other"].startswith("m.npy row 1")
    text = said.out.decode()
    for reason in expected.values():
        assert f" {reason}: " in text
    assert report["errors"] == sum(f["severity"] == "error" for f in report["findings"])


@pytest.mark.slow
def test_several_workers_find_the_same(faults, tmp_path, earteach):
    manifest, _ = faults
    source = read_manifest(manifest)
    many = {
        "image_paths": list(source.paths) + [f"good{i % 4}.png" for i in range(200)],
        "bboxes": list(source.boxes) + [(40, 50, 110 - i / 10, 150) for i in range(200)],
        "box_format": "xyxy",
    }
    np.save(manifest, np.array(many, dtype=object))
    for i in range(150):  # enough photos for two processes
        scene(100 + i, (64, 64)).save(manifest.parent / f"more{i}.png")
    reports = []
    crops = shutil.copytree(manifest.parent, tmp_path / "crops", ignore=shutil.ignore_patterns("*.npy", "fifo*"))
    for workers, source in ((1, manifest), (2, manifest), (1, crops), (2, crops)):
        earteach("validate-data", source, "--json", tmp_path / f"{len(reports)}.json", "--num-workers", workers)
        reports.append(json.loads((tmp_path / f"{len(reports)}.json").read_text()))
    assert reports[0] == reports[1] and reports[2] == reports[3] and reports[3]["pictures"] > 150


def test_write_clean_keeps_the_good_rows_and_the_input(faults, tmp_path, earteach):
    manifest, expected = faults
    before = hashlib.sha256(manifest.read_bytes()).hexdigest()
    clean = manifest.parent / "clean.npy"
    assert earteach("validate-data", manifest, "--write-clean", clean).code == 1
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == before
    said = earteach("validate-data", clean, "--json", tmp_path / "again.json")
    report = json.loads((tmp_path / "again.json").read_text())
    assert said.code == 0 and report["errors"] == 0
    source, kept = read_manifest(manifest), read_manifest(clean)
    assert len(kept) < len(source) and set(kept.paths) < set(source.paths)


def test_clean_data_gives_exit_code_0(ears, earteach):
    said = earteach("validate-data", ears / "train_teacher.npy", ears / "val_teacher.npy")
    assert said.code == 0 and b"32 rows, 32 images: 0 errors" in said.out


def test_leaks_between_train_and_val(tmp_path, earteach):
    for i in range(3):
        scene(i).save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "same.png")
    scene(1).save(tmp_path / "similar.jpg", quality=80)
    (tmp_path / "train.csv").write_text("image_path\n0.png\n1.png\n2.png\n")
    (tmp_path / "val.csv").write_text("image_path\nsame.png\nsimilar.jpg\n2.png\n")
    said = earteach("validate-data", tmp_path / "train.csv", tmp_path / "val.csv", "--json", "-")
    findings = {(f["path"], f["reason"]) for f in json.loads(said.out)["findings"]}
    assert findings == {("same.png", "leak-photo"), ("similar.jpg", "leak-near-duplicate"), ("2.png", "leak-photo")}
    assert said.code == 0  # warnings only


def test_contact_sheet_shows_the_smallest_first(faults, tmp_path, earteach):
    manifest, _ = faults
    earteach("validate-data", manifest, "--contact-sheet", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500 and sheet.height > 150
    again = earteach("validate-data", manifest, "--contact-sheet", tmp_path / "sheet.png")
    assert again.code == 2 and "--overwrite" in again.err


def test_an_unreadable_manifest_is_reported_beside_the_others(ears, tmp_path, earteach):
    (tmp_path / "broken.npy").write_bytes(b"nonsense")
    said = earteach("validate-data", ears / "val_teacher.npy", tmp_path / "broken.npy")
    assert said.code == 1 and b"broken.npy: damaged" in said.out and b"8 rows" in said.out


def test_near_pairs_are_all_pairs_within_the_bound():
    draw = np.random.default_rng(0)
    hashes = [int.from_bytes(draw.bytes(16), "big") for _ in range(60)]
    hashes += [
        h ^ (1 << int(b)) ^ (1 << int(c))
        for h, b, c in zip(hashes, draw.integers(0, 128, 60), draw.integers(0, 128, 60), strict=True)
    ]
    brute = {(i, j) for i in range(120) for j in range(i + 1, 120) if (hashes[i] ^ hashes[j]).bit_count() <= NEAR_BITS}
    assert set(near_pairs(hashes)) == brute and len(brute) >= 60


def test_the_hash_survives_jpeg_and_scaling_but_not_another_ear(ears):
    manifest = read_manifest(ears / "train_teacher.npy")
    crops = [Image.open(manifest.file(i)).crop(tuple(map(int, manifest.boxes[i]))) for i in (0, 1, 8)]
    first, sibling, other = map(perceptual_hash, crops)
    assert (first ^ perceptual_hash(crops[0].resize((90, 110)))).bit_count() <= 3
    assert (first ^ sibling).bit_count() > 10 and (first ^ other).bit_count() > 10


def test_the_input_is_never_an_output(ears, tmp_path, earteach):
    copy = tmp_path / "m.csv"
    shutil.copy(ears / "eval.csv", copy)
    for option in ("--write-clean", "--json", "--contact-sheet"):
        said = earteach("validate-data", copy, option, copy, "--overwrite", "--root-dir", ears)
        assert said.code == 2 and "is an input" in said.err
    said = earteach(
        "validate-data", copy, "--root-dir", ears, "--json", tmp_path / "x", "--contact-sheet", tmp_path / "x"
    )
    assert said.code == 2 and copy.read_bytes() == (ears / "eval.csv").read_bytes()


def test_how_to_read_a_clean_manifest_in_another_folder_is_printed(ears, tmp_path, earteach):
    said = earteach("validate-data", ears / "val_teacher.npy", "--write-clean", tmp_path / "clean.npy")
    assert f"--root-dir {ears}" in said.err
    assert earteach("validate-data", tmp_path / "clean.npy", "--root-dir", ears).code == 0


def test_the_data_card_has_counts_and_no_names_of_people(ears, tmp_path, monkeypatch, earteach):
    lists = [ears / "eval.csv", ears / "train_teacher.npy"]
    words = ["validate-data", *lists, "--card", tmp_path / "card.md"]
    assert earteach(*words, "--consent", "drawn | nobody").code == 0
    text = (tmp_path / "card.md").read_text()
    rows = read_table(ears / "eval.csv")
    people, sides = {row["identity"] for row in rows}, [row["side"] for row in rows]
    assert f"| ears | {len(rows)} | 24 |" in text and f"| people | {len(people)} | not named |" in text
    assert f"| {sides.count('left')}, {sides.count('right')}, 0 |" in text and "It is unknown whether" in text
    assert "| consent of the people photographed | drawn \\| nobody |" in text and "| licence | not stated |" in text
    assert not any(person in text for person in people) and str(tmp_path) not in text and str(ears) not in text
    monkeypatch.setenv("EARTEACH_LICENSE", "ours")
    assert earteach("validate-data", ears / "eval.csv", ears / "eval.csv", "--card", tmp_path / "b.md").code in (0, 1)
    text = (tmp_path / "b.md").read_text()
    assert f"{len(people)} people are in more than one of the lists" in text and "| licence | ours |" in text
    said = earteach("validate-data", ears / "eval.csv", "--card", tmp_path / "card.txt")
    assert said.code == 2 and "name a .md file" in said.err

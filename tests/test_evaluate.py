"""evaluate: files in, a table, JSON and images out; what it leaves out and what it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ear_teacher_cli.embedding.files import read_embeddings


def write(folder: Path, name: str = "x", people: int = 24, photos: int = 4, noise: float = 0.6, seed: int = 0) -> Path:
    """`x.npy`, `x.csv` and `x.json` as embed writes them, of images p00/0.jpg ..., and `labels.csv` with sides."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(people, 2, 12))  # the same people whatever the seed
    owner, photo = np.repeat(np.arange(people), photos), np.tile(np.arange(photos), people)
    rows = centres[owner, photo % 2] + noise * random.normal(size=(len(owner), 12))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    paths = [f"p{p:02}/{i}.jpg" for p, i in zip(owner, photo, strict=True)]
    save(folder / f"{name}.npy", rows, paths)
    with open(folder / "labels.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "identity", "side"])
        writer.writerows([path, path[:3], "lr"[int(path[4]) % 2]] for path in paths)
    return folder / f"{name}.npy"


def save(path: Path, rows: np.ndarray, paths: list[str], boxes: list | None = None) -> None:
    np.save(path, rows)
    with open(path.with_suffix(".csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "path", "x1", "y1", "x2", "y2", "status"])
        writer.writerow(["", "p00/bad.jpg", "", "", "", "", "missing: no such file"])
        writer.writerows([i, p, *(boxes[i] if boxes else [""] * 4), "ok"] for i, p in enumerate(paths))
    about = {"rows": len(rows), "weights": f"{path.stem}.safetensors"}
    path.with_suffix(".json").write_text(json.dumps(about))


def rows_of(path: Path) -> tuple[np.ndarray, list[str]]:
    found = read_embeddings(path)
    return np.array(found.rows), list(found.paths)


@pytest.fixture
def scored(earteach):
    """`scored(words...)` -> the report as plain values."""

    def score(*words):
        said = earteach("evaluate", *words, "--json", "-")
        assert said.code == 0, said.err
        found = json.loads(said.out)
        found["values"] = {figure["name"]: figure["value"] for figure in found["systems"][0]["figures"]}
        return found, said.err

    return score


def test_the_table_has_every_figure_with_its_interval(tmp_path, earteach):
    said = earteach("evaluate", write(tmp_path), tmp_path / "labels.csv", "--bootstrap", 100)
    lines = said.out.decode().splitlines()
    assert said.code == 0 and "weights x.safetensors" in lines[0] and "48 ears of 24 people" in lines[1]
    names = [line.split("  ")[0] for line in lines[3:]]
    main = ["rank-1", "rank-5", "mAP@R", "AUC", "EER", "TAR@FAR=0.01"]
    assert names[:6] == main
    assert set(names[6:]) == {
        f"{side} side {name}" for side in ("same", "cross") for name in ("rank-1", "mAP@R", "AUC", "EER")
    }
    assert all("[" in line and line.endswith("]") for line in lines[3:])
    bare = earteach("evaluate", tmp_path / "x.npy", tmp_path / "labels.csv", "--bootstrap", 0).out.decode()
    assert "[" not in bare and bare.splitlines()[3].split() == lines[3].split()[:2]


def test_json_is_whole_and_holds_no_nan(tmp_path, scored, earteach):
    x = write(tmp_path)
    found, _ = scored(x, tmp_path / "labels.csv", "--bootstrap", 50)
    assert {"systems", "difference", "counts", "left_out", "bootstrap", "look_alikes", "rank-1 by chance"} <= set(found)
    assert found["identity"] == "person and side" and len(found["systems"][0]["cmc"]) == 50
    assert found["counts"] == {
        "pictures": 96, "identities": 48, "people": 24, "singletons": 0, "queries": 96, "genuine_pairs": 48,
        "impostor_pairs": 96 * 95 // 2 - 48,
    }  # fmt: skip
    for figure in found["systems"][0]["figures"]:
        assert figure["low"] <= figure["value"] + 0.01 and figure["value"] <= figure["high"] + 0.01
    assert found["systems"][0]["cmc"][0][0] == found["values"]["rank-1"]
    words = ("evaluate", x, tmp_path / "labels.csv", "--bootstrap", 0, "--json", tmp_path / "r.json")
    assert earteach(*words).code == 0 and "NaN" not in (tmp_path / "r.json").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["systems"][0]["figures"][0]["low"] is None
    assert earteach(*words).code == 2


def test_folders_name_the_people_where_nothing_else_does(tmp_path, scored):
    found, said = scored(write(tmp_path), "--bootstrap", 0)
    assert "p00/0.jpg: p00" in said and found["counts"]["people"] == 24 and found["identity"] == "person"
    assert not any("side" in name for name in found["values"])
    with_labels, _ = scored(tmp_path / "x.npy", tmp_path / "labels.csv", "--no-sides", "--bootstrap", 0)
    assert with_labels["values"] == found["values"]


def test_every_format_and_kind_of_label_scores_alike(tmp_path, scored):
    write(tmp_path)
    rows, paths = rows_of(tmp_path / "x.npy")
    boxes = np.full((len(rows), 4), np.nan, np.float32)
    np.savez(tmp_path / "z.npz", embeddings=rows, paths=np.array(paths), boxes=boxes)
    with open(tmp_path / "c.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "path", "x1", "y1", "x2", "y2", *(f"e{i}" for i in range(12))])
        writer.writerows(
            [i, p, "", "", "", "", *r.astype(str)] for i, (p, r) in enumerate(zip(paths, rows, strict=True))
        )
    entries = [{"image_path": p, "identity": p[:3], "side": "left" if int(p[4]) % 2 == 0 else "Right"} for p in paths]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, entries)))
    expected, _ = scored(tmp_path / "x.npy", tmp_path / "labels.csv", "--bootstrap", 0)
    for name in ("z.npz", "c.csv", "x.npy"):
        assert scored(tmp_path / name, tmp_path / "l.jsonl", "--bootstrap", 0)[0]["values"] == expected["values"], name


def test_rows_are_matched_to_labels_by_path_and_box(tmp_path, scored):
    write(tmp_path)
    rows, _ = rows_of(tmp_path / "x.npy")
    # all ears on one photograph, told apart by their boxes only; given in reverse, one missing
    boxes = [[i + 0.1, 1, i + 5.3, 9] for i in range(96)]
    save(tmp_path / "b.npy", rows, ["group.jpg"] * 96, boxes)
    with open(tmp_path / "b_labels.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "x1", "y1", "x2", "y2", "identity"])
        writer.writerows([".//group.jpg", *boxes[i], f"p{i // 4:02}"] for i in reversed(range(1, 96)))
    found, said = scored(tmp_path / "b.npy", tmp_path / "b_labels.csv", "--bootstrap", 0)
    assert "1 images have no identity; left out" in said and found["left_out"]["no identity"] == 1
    assert found["counts"]["pictures"] == 95 and found["values"]["AUC"] > 0.6


def test_duplicates_are_left_out_and_strangers_with_the_same_numbers_are_not(tmp_path, scored):
    write(tmp_path)
    rows, paths = rows_of(tmp_path / "x.npy")
    expected, _ = scored(tmp_path / "x.npy", "--bootstrap", 0)
    # the same image again, under its own and under another name
    save(tmp_path / "d.npy", rows[[*range(96), 0, 1]], [*paths, paths[0], "p00/copy.jpg"])
    found, said = scored(tmp_path / "d.npy", "--bootstrap", 0)
    assert found["values"] == expected["values"]
    assert found["left_out"]["same numbers"] == 1 and found["left_out"]["same path and box"] == 1
    # one image with two labels
    save(tmp_path / "w.npy", rows[[*range(96), 0]], [*paths, "p23/wrong.jpg"])
    found, said = scored(tmp_path / "w.npy", "--bootstrap", 0)
    assert found["counts"]["pictures"] == 97 and "one image with two labels" in said
    worst = found["look_alikes"]["impostor"][0]
    assert worst["similarity"] == pytest.approx(1, abs=1e-6)
    assert {image["path"] for image in worst["pictures"]} == {"p00/0.jpg", "p23/wrong.jpg"}
    worst = found["look_alikes"]["genuine"]
    assert any("p23/wrong.jpg" in [image["path"] for image in pair["pictures"]] for pair in worst)


def test_a_person_with_one_image_is_an_impostor_only(tmp_path, scored):
    write(tmp_path)
    rows, paths = rows_of(tmp_path / "x.npy")
    save(tmp_path / "s.npy", rows[:93], paths[:93])
    found, said = scored(tmp_path / "s.npy", "--bootstrap", 0)
    assert found["counts"]["singletons"] == 1 and found["counts"]["queries"] == 92 and "used as impostors" in said


def test_images_without_a_side_are_left_out_where_sides_are_known(tmp_path, scored):
    x = write(tmp_path)
    text = (tmp_path / "labels.csv").read_text().replace("p00/0.jpg,p00,l", "p00/0.jpg,p00,front")
    (tmp_path / "labels.csv").write_text(text)
    found, said = scored(x, tmp_path / "labels.csv", "--bootstrap", 0)
    assert found["counts"]["pictures"] == 95 and found["left_out"]["no side"] == 1 and "--no-sides" in said
    (tmp_path / "odd.csv").write_text(text.replace(",l\n", ",up\n").replace(",r\n", ",down\n"))
    found, said = scored(x, tmp_path / "odd.csv", "--bootstrap", 0)
    assert found["identity"] == "person" and "no value is left or right" in said


def test_comparing_a_file_with_itself_is_exactly_0(tmp_path, scored):
    x = write(tmp_path)
    found, _ = scored("--compare", x, x, tmp_path / "labels.csv", "--bootstrap", 50)
    assert found["difference"] and {
        (f["value"], f["low"], f["high"], f["excludes_0"]) for f in found["difference"]
    } == {(0.0, 0.0, 0.0, False)}


def test_a_comparison_is_paired_and_on_what_both_have(tmp_path, scored, earteach):
    a = write(tmp_path, "a", noise=1.5)
    b = write(tmp_path, "b", noise=0.3, seed=1)
    rows, paths = rows_of(b)
    order = np.random.default_rng(0).permutation(96)[:90]  # another order, and fewer
    save(b, rows[order], [paths[i] for i in order])
    found, said = scored("--compare", a, b, tmp_path / "labels.csv", "--bootstrap", 200)
    assert "6 images are in one of the files only; left out" in said and found["counts"]["pictures"] == 90
    change = {f["name"]: f for f in found["difference"]}
    values = [{f["name"]: f for f in system["figures"]} for system in found["systems"]]
    assert change["AUC"]["value"] == values[1]["AUC"]["value"] - values[0]["AUC"]["value"] > 0
    assert change["AUC"]["excludes_0"] and change["EER"]["value"] < 0
    turned = {
        f["name"]: f for f in scored("--compare", b, a, tmp_path / "labels.csv", "--bootstrap", 200)[0]["difference"]
    }
    assert turned["AUC"]["value"] == pytest.approx(-change["AUC"]["value"])
    table = earteach("evaluate", "--compare", a, b, tmp_path / "labels.csv", "--bootstrap", 200).out.decode()
    assert "A: a.npy" in table and "B: b.npy" in table and "B - A" in table and "*" in table


def test_centring_and_whitening_are_fitted_on_another_file(tmp_path, scored):
    x = write(tmp_path)
    rows, paths = rows_of(x)
    shifted = rows * [8, *[1] * 11] + 3  # an offset and a loud direction hide the people
    save(tmp_path / "s.npy", shifted.astype(np.float32), paths)
    np.save(tmp_path / "train.npy", shifted[::2].astype(np.float32))
    plain = scored(tmp_path / "s.npy", "--bootstrap", 0)[0]["values"]["AUC"]
    centred, _ = scored(tmp_path / "s.npy", "--center", tmp_path / "train.npy", "--bootstrap", 0)
    whitened, _ = scored(tmp_path / "s.npy", "--whiten", tmp_path / "train.npy", "--whiten-dim", 12, "--bootstrap", 0)
    assert centred["systems"][0]["transform"] == "centred on train.npy"
    assert whitened["values"]["AUC"] > max(plain, centred["values"]["AUC"]) and centred["values"]["AUC"] != plain
    both, _ = scored(
        "--compare", tmp_path / "s.npy", tmp_path / "s.npy", "--whiten", "none", "--whiten", tmp_path / "train.npy",
        "--bootstrap", 0,
    )  # fmt: skip
    assert [system["transform"] for system in both["systems"]] == ["", "whitened on train.npy"]
    assert both["values"]["AUC"] == plain


@pytest.mark.parametrize(
    "words, code, named",
    [
        ([], 2, "EMBEDDINGS"),
        (["x.npy", "labels.csv", "--far", "0.001"], 2, "--far 0.001: too small for 4512 impostor pairs"),
        (["x.npy", "labels.csv", "--far", "0.001"], 2, "(30 false accepts) is 0.0067"),
        (["x.npy", "--far", "2"], 2, "between 0 and 1"),
        (["nope.npy"], 1, "nope.npy: cannot be read"),
        (["x.npy", "nope.csv"], 1, "nope.csv: no such file"),
        (["x.csv"], 1, "no columns e0, e1"),
        (["labels.csv"], 1, "images need --weights"),
        (["x.json"], 1, "not the name of embeddings"),
        (["one.npy"], 1, "all images are of one identity"),
        (["flat.npy"], 1, "give LABELS"),
        (["nan.npy"], 1, "nan.npy row 7 (p01/3.jpg): holds NaN or infinity"),
        (["zero.npy"], 1, "zero.npy row 7 (p01/3.jpg): holds zeros only"),
        (["cube.npy"], 1, "not rows of numbers"),
        (["dict.npy"], 1, "dict.npy"),
        (["bare.npy"], 1, "bare.csv: no such file"),
        (["short.npy"], 1, "short.csv lists 96"),
        (["lying.npy"], 1, "lying.json says 7"),
        (["x.npy", "others.csv"], 1, "has none of the 96 images"),
        (["x.npy", "people.csv"], 1, "has no identities"),
        (["--compare", "x.npy", "other.npy"], 1, "no image in common"),
        (["--compare", "x.npy", "x.npy", "labels.csv", "more.csv"], 2, "one file too many"),
        (["--compare", "x.npy", "x.npy", "--sheet", "s.png"], 2, "leave --compare out"),
        (["--compare", "x.npy", "x.npy", "--center", "x.npy"], 2, "given 1 times for 2 files"),
        (["x.npy", "--center", "x.npy", "--whiten", "x.npy"], 2, "one of the two"),
        (["x.npy", "--whiten-dim", "3"], 2, "there is no whitening"),
        (["x.npy", "--whiten", "x.npy", "--whiten-dim", "13"], 1, "13 needed"),
        (["x.npy", "--whiten", "wide.npy"], 1, "embed both with the same weights"),
        (["x.npy", "--json", "labels.csv", "--overwrite"], 0, ""),
        (["x.npy", "--json", "x.json", "--overwrite"], 2, "x.json: is an input"),
        (["x.npy", "--sheet", "s.jpg"], 2, "name a .png"),
        (["x.npy", "--sheet", "s.png"], 1, "give --root-dir"),
        (["x.npy", "--plots", "nowhere/plots"], 1, "no such folder"),
    ],
)
def test_words_and_files_that_cannot_be_used_say_what_to_do(words, code, named, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    rows, paths = rows_of(tmp_path / "x.npy")
    save(tmp_path / "one.npy", rows[:4], paths[:4])
    save(tmp_path / "flat.npy", rows, [path.replace("/", "_") for path in paths])
    save(tmp_path / "other.npy", rows, [f"q{path}" for path in paths])
    for name, value in (("nan", np.nan), ("zero", 0)):
        broken = rows.copy()
        broken[7] = value
        save(tmp_path / f"{name}.npy", broken, paths)
    save(tmp_path / "cube.npy", rows[None], paths[:1])
    np.save(tmp_path / "dict.npy", np.array({"image_paths": paths}, dtype=object))
    np.save(tmp_path / "bare.npy", rows)
    np.save(tmp_path / "wide.npy", np.eye(20))
    for name, entry in (("short", rows[:9]), ("lying", rows)):
        save(tmp_path / f"{name}.npy", rows, paths)
        np.save(tmp_path / f"{name}.npy", entry)
    (tmp_path / "lying.json").write_text('{"rows": 7}')
    (tmp_path / "others.csv").write_text("image_path,identity\nq/0.jpg,q\n")
    (tmp_path / "people.csv").write_text("image_path\np00/0.jpg\n")
    said = earteach("evaluate", *words, "--bootstrap", 0, "-q")
    assert said.code == code and named in said.err, said.err
    assert not code or (said.out == b"" and said.err.splitlines()[-1].startswith("earteach: "))


@pytest.mark.slow
def test_plots_are_images_and_are_not_replaced_unasked(tmp_path, earteach):
    a, b = write(tmp_path, "a"), write(tmp_path, "b", seed=1)
    words = ("evaluate", "--compare", a, b, "--bootstrap", 20, "--plots", tmp_path / "plots")
    said = earteach(*words)
    assert said.code == 0, said.err
    for name in ("roc.png", "cmc.png", "scores.png"):
        with Image.open(tmp_path / "plots" / name) as image:
            assert min(image.size) > 500 and len(image.convert("RGB").getcolors(2**20)) > 50
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["cmc.png", "roc.png", "scores.png"]
    said = earteach(*words)
    assert said.code == 2 and "roc.png: exists already" in said.err
    assert earteach(*words, "--overwrite").code == 0


def test_the_sheet_shows_the_hardest_pairs_and_says_what_it_cannot_read(ears, tmp_path, earteach):
    with open(ears / "eval.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = np.random.default_rng(0).normal(size=(len(lines), 8)).astype(np.float32)
    boxes = [[line[name] for name in ("x1", "y1", "x2", "y2")] for line in lines]
    save(tmp_path / "x.npy", rows, [line["image_path"] for line in lines], boxes)
    words = ("evaluate", tmp_path / "x.npy", ears / "eval.csv", "--bootstrap", 0, "--overwrite")
    said = earteach(*words, "--sheet", tmp_path / "s.png")
    assert said.code == 0 and "left out" not in said.err
    with Image.open(tmp_path / "s.png") as sheet:
        colours = len(sheet.convert("RGB").getcolors(2**24))
        assert sheet.width > 800 and sheet.height > 600 and colours > 5000  # ears, not only words
    boxes[0] = [0, 0, 9000, 9000]
    save(tmp_path / "x.npy", rows, [line["image_path"] for line in lines], boxes)
    said = earteach(*words[:2], "--bootstrap", 0, "--sheet", tmp_path / "t.png", "--root-dir", ears)
    assert said.code == 0 and "pairs left out" in said.err and (tmp_path / "t.png").exists()


def test_images_with_weights_score_as_their_embeddings_do(run, ears, tmp_path, scored, earteach):
    words = ("--weights", run, "--num-workers", 0)
    direct, said = scored(ears / "eval.csv", *words, "--bootstrap", 20)
    assert earteach("embed", ears / "eval.csv", tmp_path / "x.npy", *words).code == 0
    # embed keeps the manifest's identities and sides
    by_file, _ = scored(tmp_path / "x.npy", "--bootstrap", 20)
    assert by_file["identity"] == direct["identity"] == "person and side"
    assert by_file["values"] == pytest.approx(direct["values"], abs=1e-3)


@pytest.mark.slow
def test_embeddings_are_scored_without_torch(tmp_path):
    x = write(tmp_path)
    code = (
        f"import sys; sys.argv = ['earteach', 'evaluate', {str(x)!r}, '--plots', {str(tmp_path / 'p')!r}]\n"
        "from ear_teacher_cli.cli.app import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr

"""prepare makes two lists of a tree of mixed sources, and nothing that belongs together is in both."""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image

from ear_teacher_cli.data import prepare as verb
from ear_teacher_cli.data.image_checks import NEAR_BITS, perceptual_hash
from ear_teacher_cli.data.manifest import Manifest, read_manifest
from ear_teacher_cli.data.split import Group, Links, choose_validation

BOX = (20, 15, 80, 105)  # x1, y1, x2, y2, in every image of `draw`


def draw(path: Path, seed: int, **options) -> Path:
    """A smooth random image of 100 x 120: no two seeds are alike, and each is like itself written anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (11, 10, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((100, 120), Image.Resampling.BICUBIC).save(path, **options)
    return path


def write_coco(folder: Path, marks: list[tuple[str, tuple]], name: str = "_annotations.coco.json") -> None:
    names = list(dict.fromkeys(name for name, _ in marks))
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "categories": [{"id": 0, "name": "ear"}],
        "annotations": [
            {"image_id": names.index(name), "category_id": 0, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for name, (x1, y1, x2, y2) in marks
        ],
    }
    (folder / name).write_text(json.dumps(content))


def write_table(folder: Path, rows: list[tuple], name: str = "_annotations.csv") -> None:
    head = "filename,xmin,ymin,xmax,ymax,identity,side\n"
    (folder / name).write_text(head + "".join(",".join(map(str, row)) + "\n" for row in rows))


def fill(raw: Path) -> Path:
    """Crops of people, COCO, CSV, .pts and YOLO; six photos each."""
    for person in range(6):
        for side in ("left", "right"):
            draw(raw / f"crops/p{person}/{side}.png", 100 + 2 * person + (side == "left"))
    for number in range(6):
        for place, folder in enumerate(("roboflow/train", "tables", "landmarks", "yolo/images")):
            draw(raw / folder / f"{number}.png", 200 + 10 * place + number)
        x1, y1, x2, y2 = 30, 25, 70, 95  # box_around adds 10 % on each side
        points = "".join(f"{x} {y}\n" for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2)))
        (raw / f"landmarks/{number}.pts").write_text(f"version: 1\nn_points: 4\n{{\n{points}}}\n")
        (raw / "yolo/labels").mkdir(exist_ok=True)
        (raw / f"yolo/labels/{number}.txt").write_text("0 0.5 0.5 0.6 0.75\n")
    marks = [(f"{number}.png", BOX) for number in range(6)]
    write_coco(raw / "roboflow/train", [*marks, ("0.png", (2, 2, 60, 60))])
    write_table(raw / "tables", [(f"{n}.png", *BOX, f"t{n // 2}", "left") for n in range(6)], "ears_annotations.csv")
    return raw


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """`fill` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return fill(Path("raw"))


@pytest.fixture
def tangled(raw) -> Path:
    """The same with copies, near duplicates, damage, and lists that are not read."""
    (raw / "more").mkdir()
    shutil.copy(raw / "roboflow/train/1.png", raw / "more/copy.png")
    shutil.copy(raw / "crops/p1/left.png", raw / "more/again.png")
    draw(raw / "more/near.jpg", 211, quality=85)  # tables/1.png, written anew and without its box
    draw(raw / "crops/p2/near.jpg", 106, quality=85)  # crops/p3/right.png
    for number in range(6):
        draw(raw / f"more/{number}.png", 300 + number)
    whole = (raw / "crops/p0/left.png").read_bytes()
    (raw / "crops/p0/half.png").write_bytes(whole[: len(whole) // 2])
    table = raw / "tables/ears_annotations.csv"
    table.write_text(
        table.read_text() + "2.png,50,50,400,90,t1,right\n0.png,20,15,80,105,t0,left\ngone.png,1,1,9,9,t2,\n"
    )
    draw(raw / "landmarks/unmarked.png", 400)
    draw(raw.absolute().parent / "outside.png", 401)
    (raw / "more/link.png").symlink_to(raw.absolute().parent / "outside.png")
    (raw / "labels.csv").write_text("filename\n")
    np.save(raw / "crops/old.npy", np.zeros(2))
    return raw


def both(out: Path, kind: str = "npy") -> list[Manifest]:
    return [read_manifest(out / f"{side}_teacher.{kind}") for side in ("train", "val")]


def report(out: Path) -> dict:
    return json.loads((out / "prepare.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_every_source_goes_into_lists_that_other_commands_read(raw, earteach):
    said = earteach("prepare", raw, "data", "--folder-identities")
    assert said.code == 0, said.err
    train, val = both(Path("data"))
    paths = [*train.paths, *val.paths]
    assert len(paths) == 37 and len(set(paths)) == 36  # roboflow's 0.png has two ears
    assert train.box_format == val.box_format == "xyxy" and "box_format" in train.how
    assert earteach("validate-data", "data/train_teacher.npy", "data/val_teacher.npy").code == 0
    boxes = dict(zip(paths, [*train.boxes, *val.boxes], strict=True))
    for path in ("raw/tables/3.png", "raw/landmarks/3.png", "raw/roboflow/train/3.png", "raw/yolo/images/3.png"):
        assert boxes[path] == pytest.approx(BOX, abs=6.5), path
    assert boxes["raw/crops/p3/left.png"] == (0, 0, 100, 120)
    whose = dict(zip(paths, [*train.identities, *val.identities], strict=True))
    assert whose["raw/crops/p3/left.png"] == "p3" and whose["raw/tables/3.png"] == "t1"
    assert whose["raw/yolo/images/3.png"] == whose["raw/roboflow/train/3.png"] == whose["raw/landmarks/3.png"] == ""
    sides = dict(zip(paths, [*(train.sides or [""] * len(train)), *(val.sides or [""] * len(val))], strict=True))
    assert sides["raw/tables/3.png"] == "left"
    found = report(Path("data"))
    assert {name: one["formats"] for name, one in found["sources"].items()} == {
        "crops": {"images": 12},
        "landmarks": {"pts": 6},
        "roboflow": {"coco": 7},
        "tables": {"csv": 6},
        "yolo": {"yolo": 6},
    }
    assert found["read"]["YOLO"]["boxes"].endswith("as shares of the image")
    assert "COCO" in said.err and "columns xmin, ymin, xmax, ymax" in said.err


@pytest.mark.slow
def test_the_lists_train(raw, earteach):
    assert earteach("prepare", raw, "data", "--folder-identities").code == 0
    lists = ["--train-metadata", "data/train_teacher.npy", "--val-metadata", "data/val_teacher.npy"]
    said = earteach("train", *lists, *SMALL, "--max-epochs", 1, "--output-dir", "outputs")
    assert said.code == 0, said.err


def test_the_original_packages_trainer_reads_them(raw, earteach):
    assert earteach("prepare", raw, "data").code == 0
    for side in ("train", "val"):
        content = np.load(f"data/{side}_teacher.npy", allow_pickle=True).item()  # noqa: TID251  (what users of the original package call)
        assert len(content["image_paths"]) == len(content["bboxes"])
        for path, (x1, y1, x2, y2) in zip(content["image_paths"], content["bboxes"], strict=True):
            with Image.open(path) as image:
                assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height


def test_nothing_that_belongs_together_is_on_both_sides(tangled, earteach):
    for seed in range(8):
        said = earteach("prepare", tangled, "data", "--folder-identities", "--seed", seed, "--overwrite")
        assert said.code == 0, said.err
        sides = both(Path("data"))
        for of in (_paths, _contents, _identities):
            train, val = map(of, sides)
            assert train and val and not train & val, of
        train, val = map(_hashes, sides)
        assert min((a ^ b).bit_count() for a in train for b in val) > NEAR_BITS
        where = {path: side for side, manifest in enumerate(sides) for path in manifest.paths}
        assert where["raw/more/near.jpg"] == where["raw/tables/1.png"]  # the whole image and a box on it
        assert where["raw/crops/p2/left.png"] == where["raw/crops/p3/left.png"]  # through near.jpg
    lists = ["data/train_teacher.npy", "data/val_teacher.npy"]
    said = earteach("validate-data", *lists, "--json", "-")
    assert said.code == 0 and not [f for f in json.loads(said.out)["findings"] if f["reason"].startswith("leak")]


def _paths(manifest: Manifest) -> set:
    return set(manifest.paths)


def _contents(manifest: Manifest) -> set:
    return {hashlib.sha256(Path(path).read_bytes()).digest() for path in manifest.paths}


def _identities(manifest: Manifest) -> set:
    return set(manifest.identities) - {""}


def _hashes(manifest: Manifest) -> list[int]:
    return [perceptual_hash(Image.open(path)) for path in manifest.paths]


def test_the_report_says_what_was_dropped_merged_and_not_read(tangled, earteach):
    said = earteach("prepare", tangled, "data")
    assert said.code == 0, said.err
    found = report(Path("data"))
    dropped = {(one["path"], one["reason"]) for one in found["dropped"]}
    assert dropped == {
        ("crops/p0/half.png", "truncated"),
        ("tables/2.png", "box-outside"),
        ("tables/0.png", "duplicate-row"),
        ("tables/gone.png", "missing"),
        ("more/link.png", "outside-root"),
        ("landmarks/unmarked.png", "no-annotation"),
        ("more/copy.png", "duplicate-image"),
        ("more/again.png", "duplicate-image"),
    }
    outside = next(one for one in found["dropped"] if one["reason"] == "box-outside")
    assert (outside["part"], outside["row"]) == ("tables/ears_annotations.csv", 6) and "leaves" in outside["detail"]
    merged = {one["kept"]: one for one in found["merged"]}
    assert merged["roboflow/train/1.png"]["copies"] == ["more/copy.png"]
    assert merged["roboflow/train/1.png"]["boxes_differ"] and not merged["crops/p1/left.png"]["boxes_differ"]
    assert sorted(map(sorted, found["near_duplicates"])) == [
        ["crops/p2/near.jpg", "crops/p3/right.png"],
        ["more/near.jpg", "tables/1.png"],
    ]
    assert found["not_read"] == ["labels.csv"]  # an array of numbers, as embed writes it, is no list
    assert "1 file that may be a list of ears was not read (labels.csv)" in said.err
    for words in (
        "1 truncated (the image is cut short or damaged): crops/p0/half.png",
        "2 images with copies; 1 with",
    ):
        assert words in said.err
    paths = {path for manifest in both(Path("data")) for path in manifest.paths}
    assert "raw/roboflow/train/1.png" in paths and "raw/more/copy.png" not in paths
    assert found["written"]["train"] + found["written"]["val"] == found["found"]["ears"] - 7


def test_a_second_run_writes_the_same_bytes_also_inside_raw(tangled, earteach):
    words = ["prepare", tangled, tangled / "lists", "--seed", 3, "--folder-identities"]
    assert earteach(*words).code == 0
    first = contents(tangled / "lists")
    assert set(first) == {"train_teacher.npy", "val_teacher.npy", "prepare.json"}
    again = earteach(*words)
    assert again.code == 2 and "--overwrite" in again.err
    assert earteach(*words, "--overwrite", "--num-workers", 0).code == 0
    assert contents(tangled / "lists") == first
    assert earteach(*words, "--overwrite", "--seed", 4).code == 0
    assert contents(tangled / "lists") != first


def test_the_order_in_which_files_are_found_does_not_matter(tangled, earteach, monkeypatch):
    assert earteach("prepare", tangled, "a").code == 0
    real = os.scandir

    class Backwards:
        def __init__(self, *words):
            self.entries = reversed(list(real(*words)))

        def __enter__(self):
            return self.entries

        def __exit__(self, *_):
            pass

        def close(self):
            pass

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Backwards)
        assert earteach("prepare", tangled, "b").code == 0
    assert contents(Path("a")) == contents(Path("b"))


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    for number in range(140):  # enough images for two processes
        draw(tmp_path / f"raw/s{number % 2}/{number}.png", number)
    for workers in (1, 2):
        assert earteach("prepare", "raw", f"w{workers}", "--num-workers", workers).code == 0
    assert contents(tmp_path / "w1") == contents(tmp_path / "w2")


def test_each_source_is_split_by_the_share(tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    for source, count in (("a", 60), ("b", 20), ("c", 10)):
        for number in range(count):
            draw(tmp_path / f"raw/{source}/{number}.png", 1000 * ord(source) + number)
    for share in (0.2, 0.3):
        assert earteach("prepare", "raw", f"out{share}", "--val-share", share).code == 0
        sources = report(tmp_path / f"out{share}")["sources"]
        assert {name: one["written"]["val_share"] for name, one in sources.items()} == dict.fromkeys("abc", share)
        val = read_manifest(f"out{share}/val_teacher.npy")
        assert Counter(path.split("/")[1] for path in val.paths) == {"a": 60 * share, "b": 20 * share, "c": 10 * share}


def test_a_folder_of_people_is_split_between_people(tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        draw(tmp_path / f"raw/p{number // 4:03d}/{number % 4}.png", number)
    said = earteach("prepare", "raw", "data", "--folder-identities")
    assert said.code == 0 and "warning" not in said.err
    train, val = both(Path("data"))
    assert len(val) == 8 and not set(train.identities) & set(val.identities)
    said = earteach("prepare", "raw", "other")
    assert said.code == 0 and "40 of 40 ears have no identity" in said.err


def test_a_raw_elsewhere_needs_root_dir_and_says_so(raw, tmp_path_factory, monkeypatch, earteach):
    source = raw.absolute()
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))
    said = earteach("prepare", source, "data")
    assert said.code == 0 and f"--root-dir {source}" in said.err
    assert report(Path("data"))["paths_start_from"] == "--root-dir"
    manifest = read_manifest("data/train_teacher.npy", source)
    assert all(Path(manifest.file(i)).is_file() for i in range(len(manifest)))
    assert earteach("validate-data", "data/train_teacher.npy", "--root-dir", source).code == 0


def test_a_list_of_images_elsewhere_names_its_root(raw, tmp_path_factory, monkeypatch, earteach):
    rows = "".join(f"{n}.png,{','.join(map(str, BOX))}\n" for n in range(6))
    (raw / "tables/mine.csv").write_text(f"path,x1,y1,x2,y2\n{rows}")
    folder = (raw / "tables").absolute()
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))
    said = earteach("prepare", folder / "mine.csv", "data")
    assert said.code == 0 and f"--root-dir {folder}" in said.err
    assert earteach("validate-data", "data/val_teacher.npy", "--root-dir", folder).code == 0


def test_folders_that_cannot_be_read_are_warned_of(raw, earteach, monkeypatch):
    def refusing(real, refused):
        def call(path="."):
            if os.fspath(path) == refused:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing(os.scandir, os.path.join("raw", "crops", "p1")))
        said = earteach("prepare", raw, "data")
    assert said.code == 0 and "p1: cannot be read (Permission denied), and is left out" in said.err
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refusing(os.listdir, "raw"))
        said = earteach("prepare", raw, "other")
    assert said.code == 1 and said.err == "earteach: raw: Permission denied; check the path\n"


def test_a_linked_raw_is_named_where_it_really_is(raw, earteach):
    Path("link").symlink_to("raw")
    assert earteach("prepare", "link", "data").code == 0
    assert {path.split("/")[0] for path in both(Path("data"))[0].paths} == {"raw"}
    assert earteach("validate-data", "data/train_teacher.npy").code == 0


def test_a_list_is_a_raw_too_and_csv_a_format(raw, earteach):
    rows = "".join(f"raw/tables/{n}.png,{','.join(map(str, BOX))},t{n}\n" for n in range(6))
    (raw / "mine.csv").write_text(f"path,x1,y1,x2,y2,identity\n{rows}{raw.absolute()}/yolo/images/0.png,,,,,y\n")
    said = earteach("prepare", raw / "mine.csv", raw, "--format", "csv")
    assert said.code == 0, said.err
    train, val = both(raw, "csv")
    assert sorted([*train.paths, *val.paths])[::6] == ["raw/tables/0.png", "raw/yolo/images/0.png"]
    assert earteach("validate-data", raw / "train_teacher.csv", raw / "val_teacher.csv").code == 0
    again = earteach("prepare", raw / "train_teacher.csv", raw, "--format", "csv", "--overwrite")
    assert again.code == 2 and "is an input" in again.err
    refused = earteach("prepare", raw, raw, "--overwrite")
    assert refused.code == 1 and "mine.csv: is a list with boxes of images that are here" in refused.err
    (raw / "mine.csv").unlink()
    assert "train_teacher.csv, val_teacher.csv were there before" in earteach(
        "prepare", raw, raw, "--overwrite"
    ).err.replace("\n", " ")


def test_a_dry_run_writes_nothing(tangled, earteach):
    before = sorted(Path().rglob("*"))
    said = earteach("prepare", tangled, "data", "--dry-run")
    assert said.code == 0 and "dry run: nothing was written" in said.err and " to validate (" in said.err
    assert sorted(Path().rglob("*")) == before
    assert earteach("prepare", tangled, "data", "--dry-run", "--quiet").err.count("\n") == said.err.count("warning: ")


def test_what_cannot_be_split_says_why(raw, tmp_path, earteach):
    def line(*words, code=1):
        said = earteach("prepare", *words, "--quiet")
        lines = [line for line in said.err.splitlines() if line.startswith("earteach: ")]
        assert said.code == code and len(lines) == 1, said.err
        return lines[0]

    assert "no such file or folder" in line("nowhere", "data")
    Path("empty").mkdir()
    assert "holds no images" in line("empty", "data")
    draw(Path("one/p1/a.png"), 1), draw(Path("one/p1/b.png"), 2)
    assert "all 2 ears that can be used belong to one group" in line("one", "data", "--folder-identities")
    Path("bad").mkdir()
    Path("bad/a.png").write_bytes(b"nothing")
    assert "no ear can be used (1 not-an-image)" in line("bad", "data")
    assert "--val-share: 1 is not a share" in line(raw, "data", "--val-share", 1, code=2)
    assert "--format: 'xml' is not known" in line(raw, "data", "--format", "xml", code=2)
    Path("file").touch()
    assert "is a file" in line(raw, "file", code=2)
    assert "no such folder" in line(raw, "deep/er/data")
    (raw / "tables/_annotations.csv").write_text("image,x1\n0.png,4\n")
    assert "tables/_annotations.csv" in line(raw, "data")
    assert not Path("data").exists()


def test_ctrl_c_leaves_nothing(raw, earteach, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_list_rows", stop)
    said = earteach("prepare", raw, "data")
    assert said.code == 130 and not list(Path("data").glob("*"))


def test_two_people_in_one_group_are_named(raw, earteach):
    draw(raw / "tables/6.png", 500), draw(raw / "tables/7.png", 501)
    table = raw / "tables/ears_annotations.csv"
    more = "6.png,20,15,80,105,ann,left\n6.png,2,2,50,60,ben,left\n7.png,20,15,80,105,ben,left\n"
    table.write_text(table.read_text() + more)
    draw(raw / "crops/ann/a.png", 502)
    said = earteach("prepare", raw, "data", "--folder-identities")
    assert "stay on one side (ann = ben)" in said.err and "the same identity in several sources (ann)" in said.err
    train, val = both(Path("data"))
    for manifest in (train, val):
        people = set(manifest.identities) & {"ann", "ben"}
        assert len(people) in (0, 2)


def test_folders_of_exports_are_not_people(tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(("a/p1/images/1.png", "a/p2/1.png", "b/1.png", "c/export/1.png", "c/export/q/1.png")):
        draw(tmp_path / "raw" / path, number)
    write_coco(tmp_path / "raw/c/export", [("1.png", BOX), ("q/1.png", BOX)])
    assert earteach("prepare", "raw", "data", "--folder-identities").code == 0
    whose = {p: i for m in both(Path("data")) for p, i in zip(m.paths, m.identities or [""] * len(m), strict=True)}
    assert {path.removeprefix("raw/"): identity for path, identity in whose.items()} == {
        "a/p1/images/1.png": "p1",
        "a/p2/1.png": "p2",
        "b/1.png": "",
        "c/export/1.png": "",
        "c/export/q/1.png": "q",
    }


def test_links_join_through_others():
    links = Links()
    for pair in (("a", "b"), ("c", "d"), ("e", "f"), ("d", "a")):
        links.link(pair)
    links.link(["g"])
    assert links.groups("abcdefg") == [list("abcd"), list("ef"), ["g"]] and links.find("x") == "x"


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
def test_shares_are_as_near_as_groups_allow(share):
    sizes = np.random.default_rng(0)
    for seed in range(20):
        groups = [Group(f"{source}{i}", {source: int(sizes.integers(1, 5))}) for source in "ab" for i in range(40)] + [
            Group(f"both{i}", {"a": 1, "b": 2}) for i in range(3)
        ]
        chosen = choose_validation(groups, share, seed)
        for source in "ab":
            total = sum(group.ears.get(source, 0) for group in groups)
            taken = sum(groups[place].ears.get(source, 0) for place in chosen)
            assert abs(taken - share * total) <= 3, (seed, source)
        assert chosen == choose_validation(groups[:], share, seed)


def test_neither_side_is_empty():
    for share in (0.01, 0.99):
        for sizes in ([1, 1], [50, 1], [1, 1, 1]):
            groups = [Group(str(i), {f"s{i}": size}) for i, size in enumerate(sizes)]
            assert 0 < len(choose_validation(groups, share, 0)) < len(groups)

"""Folders as tools export them: every annotation in them is read, or refused or warned of by name."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_prepare import BOX, both, draw, report, write_coco, write_table

from ear_teacher_cli.config import Reading
from ear_teacher_cli.console import SilentConsole
from ear_teacher_cli.data import image_checks
from ear_teacher_cli.data.duplicates import examine, merge_copies
from ear_teacher_cli.data.folder_ears import joined
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.data.mixed_sources import Mixed, read_mixed
from ear_teacher_cli.errors import ManifestError

LABEL = "0 0.5 0.5 0.6 0.75\n"  # BOX, in images of 100 x 120
NAMES = [f"{number}.png" for number in range(4)]


def photos(folder: Path, names=NAMES) -> Path:
    for number, name in enumerate(names):
        draw(folder / name, 700 + number)
    return folder


def mixed(raw: Path, **reading) -> Mixed:
    return read_mixed(str(raw), None, Reading(**reading))


def all_have_the_box(raw: Path, count: int = len(NAMES)) -> Mixed:
    """Every image has BOX, for `prepare` and for the other commands."""
    found = mixed(raw)
    for ears in (found.ears, read_manifest(raw)):
        assert len(ears) == count and all(box == pytest.approx(BOX, abs=0.6) for box in ears.boxes), found.warnings
        assert all(Path(ears.file(index)).is_file() for index in range(count))
    return found


@pytest.mark.parametrize(
    "images, listing, name",
    [
        ("images/default", "annotations/instances_default.json", "{}"),  # CVAT
        ("images", "result.json", "images/{}"),  # Label Studio
        ("images", "ears.coco.json", "{}"),
        ("images", "annotations/ears.coco.json", "images/{}"),
        ("images", "annotations/ears.coco.json", "../images/{}"),
        ("train2017", "annotations/instances_train2017.json", "{}"),
        ("images", "ears.json", "C:\\data\\images\\{}"),
        ("images", "ears.json", "/home/other/images/{}"),
        ("images", "ears.json", "IMAGES/{}"),
    ],
)
def test_coco_is_found_by_its_content_and_its_images_by_their_paths(tmp_path, images, listing, name):
    """Two exports of the same names, side by side: each list means the images beside it."""
    for export in ("a", "b"):
        photos(tmp_path / export / images)
        (tmp_path / export / listing).parent.mkdir(exist_ok=True)
        marks = [(name.format(one), BOX) for one in NAMES]
        write_coco((tmp_path / export / listing).parent, marks, Path(listing).name)
    found = all_have_the_box(tmp_path, 8)
    assert not found.warnings and set(map(found.kind, range(8))) == {"coco"}
    assert [part[0] for part in found.parts] == [path[0] for path in found.ears.paths]


def test_paths_from_the_working_directory_and_absolute_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(Path("raw/images"))
    for start in ("raw/images", tmp_path / "raw/images"):
        write_coco(Path("raw"), [(f"{start}/{name}", BOX) for name in NAMES], "list.json")
        all_have_the_box(Path("raw"))


def test_a_table_above_its_images_is_read(tmp_path):
    photos(tmp_path / "train")
    write_table(tmp_path, [(name, *BOX, "", "") for name in NAMES], "train_annotations.csv")
    all_have_the_box(tmp_path)


def test_a_name_of_several_images_is_refused(tmp_path):
    photos(tmp_path / "a"), photos(tmp_path / "b")
    write_coco(tmp_path, [(name, BOX) for name in NAMES], "list.json")
    with pytest.raises(ManifestError, match=r"list.json: 0.png can be a/0.png or b/0.png"):
        read_manifest(tmp_path)
    (tmp_path / "list.json").unlink()
    write_coco(tmp_path, [(f"/x/{folder}/{name}", BOX) for folder in "cd" for name in NAMES], "a/list.json")
    with pytest.raises(ManifestError, match="both lead to a/0.png"):
        read_manifest(tmp_path)


def test_coco_whose_paths_lead_nowhere(tmp_path):
    photos(tmp_path / "images")
    write_coco(tmp_path, [(f"upload/7/{name}", BOX) for name in NAMES], "list.json")
    with pytest.raises(ManifestError, match=r"list.json: none of its paths leads to an image \(upload/7/0.png"):
        read_manifest(tmp_path)
    write_coco(tmp_path, [("other.png", BOX)], "list.json")
    found = mixed(tmp_path)
    assert len(found.ears) == 4 and "images that are not below" in found.warnings[0]


@pytest.mark.parametrize("name", ["labels.csv", "list.npy", "list.jsonl", "list.json"])
def test_a_list_with_boxes_that_is_not_read_is_refused(tmp_path, name, earteach):
    photos(tmp_path / "images")
    rows = [{"image": f"images/{one}", "bbox": list(BOX), "box_format": "xyxy"} for one in NAMES]
    if name == "labels.csv":
        write_table(tmp_path, [(one, *BOX, "", "") for one in NAMES], name)
    elif name == "list.npy":
        content = {"image_paths": [row["image"] for row in rows], "bboxes": np.array([BOX] * 4)}
        np.save(tmp_path / name, np.array(content, dtype=object))
    else:
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(rows))
    for read in (read_manifest, mixed):
        with pytest.raises(
            ManifestError, match=f"{name}: is a list with boxes of images that are here, and is not read"
        ):
            read(tmp_path)
    said = earteach("validate-data", tmp_path)
    assert said.code == 1 and b"name the list itself" in said.out
    assert len(read_manifest(tmp_path / "images")) == 4  # the list is not below it


def test_other_files_do_not_stop_a_folder_of_crops(tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    photos(Path("raw"), [f"{number}.png" for number in range(8)])
    Path("raw/readings.csv").write_text("time,value\n1,2\n", encoding="utf-8")
    Path("raw/ages.csv").write_text("filename,age\n0.png,20\n", encoding="utf-8")
    write_table(Path("raw"), [(f"elsewhere{number}.png", *BOX, "", "") for number in range(4)], "boxes.csv")
    Path("raw/config.json").write_text('{"images": 3}', encoding="utf-8")
    Path("raw/half.json").write_text('{"images": [', encoding="utf-8")
    Path("raw/0.txt").write_text("a left ear, 20 years\n", encoding="utf-8")
    np.save("raw/vectors.npy", np.zeros((8, 4)))
    Path("raw/vectors.csv").write_text("row,path,x1,y1,x2,y2,status\n0,0.png,1,2,3,4,\n", encoding="utf-8")
    for _ in range(2):  # prepare's own lists are there the second time
        said = earteach("prepare", "raw", "raw", "--overwrite")
        assert said.code == 0, said.err
        assert report(Path("raw"))["not_read"] == ["ages.csv", "boxes.csv", "readings.csv"]
    assert sorted(read_manifest("raw").paths) == [f"{number}.png" for number in range(8)]


def test_a_list_of_names_is_refused_where_they_matter(tmp_path, earteach):
    photos(tmp_path)
    (tmp_path / "people.csv").write_text("filename,person\n" + "".join(f"{name},ann\n" for name in NAMES))
    assert "people.csv" in " ".join(read_manifest(tmp_path).warnings)
    assert len(mixed(tmp_path).ears) == 4
    with pytest.raises(ManifestError, match="people.csv: is a list that names people on images here"):
        mixed(tmp_path, identity_column="person")


def test_images_that_a_coco_file_leaves_unmarked_are_left_out(tmp_path):
    photos(tmp_path / "images"), draw(tmp_path / "crops/1.png", 800)
    write_coco(tmp_path, [(f"images/{name}", BOX) for name in NAMES[:2]])
    content = json.loads((tmp_path / "_annotations.coco.json").read_text())
    content["images"] += [{"id": number, "file_name": f"images/{NAMES[number]}"} for number in (2, 3)]
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(content))
    found = mixed(tmp_path)
    assert found.ears.paths == ["crops/1.png", "images/0.png", "images/1.png"]
    assert found.unmarked == ["images/2.png", "images/3.png"]
    assert any("1 images in folders without annotations (crops) are read whole" in text for text in found.warnings)


@pytest.mark.parametrize(
    "image, label",
    [
        ("{}.png", "{}.TXT"),
        ("Images/{}.png", "Labels/{}.txt"),
        ("images/train/{}.png", "labels/train/{}.txt"),
        ("photos/{}.png", "labels/{}.txt"),
        ("runs/predict/{}.png", "runs/predict/labels/{}.txt"),
        ("train/{}.png", "labels/train/{}.txt"),
    ],
)
@pytest.mark.parametrize(
    "text", [LABEL, "0,0.5,0.5,0.6,0.75\n", "left ear 0.5 0.5 0.6 0.75\n", "0.0 0.5 0.5 0.6 0.75 0.9"]
)
def test_yolo_labels_are_found_where_tools_put_them(tmp_path, image, label, text):
    for number in range(4):
        draw(tmp_path / image.format(number), 700 + number)
        path = tmp_path / label.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert not all_have_the_box(tmp_path).warnings


def test_a_folder_images_comes_first_and_open_labels_are_refused(tmp_path):
    photos(tmp_path / "images"), photos(tmp_path / "masks")
    (tmp_path / "labels").mkdir()
    for number in range(4):
        (tmp_path / f"labels/{number}.txt").write_text(LABEL)
    found = mixed(tmp_path)
    assert [box is None for box in found.ears.boxes] == [False] * 4 + [True] * 4
    (tmp_path / "images").rename(tmp_path / "photos")
    with pytest.raises(ManifestError, match="labels/0.txt: can belong to masks/0.png or photos/0.png"):
        mixed(tmp_path)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("0.5 0.5 0.6 0.75\n", "line 1: has 4 numbers"),
        (f"{LABEL}ear\n", "line 2: has 0 numbers after 'ear'"),
        ("ear 0.9 20 15 80 105\n", "line 1: has 5 numbers after 'ear'"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2\n", "line 1: has 7 numbers"),
        ("0 20 15 80 105\n", "line 1: is not from 0 to 1"),
        ("no ear here\n", "line 1: has 0 numbers after 'no ear here'"),
    ],
)
def test_labels_that_are_not_understood_name_line_and_reason(tmp_path, text, reason):
    for labels in ("images", "labels"):  # beside other labels, or in a folder of labels
        root = tmp_path / labels
        photos(root / "images")
        (root / labels).mkdir(exist_ok=True)
        for number in range(4):
            (root / labels / f"{number}.txt").write_text(LABEL if number and labels == "images" else text)
        with pytest.raises(ManifestError, match=f"{labels}/0.txt {reason}"):
            read_manifest(root)


def test_labels_without_an_image_are_counted(tmp_path):
    photos(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    for name in ("0", "gone", "lost", "classes"):
        (tmp_path / f"labels/{name}.txt").write_text(LABEL)
    assert any("2 labels match no image (labels/gone.txt)" in text for text in mixed(tmp_path).warnings)


@pytest.mark.parametrize(
    "name, text",
    [
        ("data.yaml", "nc: 2\nnames: ['left ear', \"face\"]\n"),
        ("data.yaml", "names:\n  0: left ear\n  1: face  # whole\nnc: 2\n"),
        ("data.yaml", "names:\n- left ear\n- face\ntrain: images\n"),
        ("data.yaml", "names: {0: left ear, 1: face}\n"),
        ("labels/classes.txt", "left ear\nface\n"),
        ("none", ""),
    ],
)
def test_several_yolo_classes_are_warned_of_by_name(tmp_path, name, text):
    photos(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    for number in range(4):
        (tmp_path / f"labels/{number}.txt").write_text(LABEL + (LABEL.replace("0 ", "1 ", 1) if number else ""))
    (tmp_path / name).write_text(text)
    said = "4 left ear, 3 face" if text else "4 0, 3 1"
    assert any(
        f"labels of 2 classes are all read as ears ({said})" in text for text in read_manifest(tmp_path).warnings
    )


def test_landmarks_of_several_ears_and_names_in_capitals(tmp_path):
    draw(tmp_path / "a.png", 1), draw(tmp_path / "b.png", 2)
    block = "n_points: 2\n{{\n{0} 20\n{1} 90\n}}\n"
    (tmp_path / "a.PTS").write_text("version: 1\n" + block.format(10, 40) + block.format(50, 90))
    (tmp_path / "b.png.pts").write_text("version: 1\n" + block.format(10, 40))
    (tmp_path / "c.pts").write_text("version: 1\n" + block.format(10, 40))
    found = mixed(tmp_path)
    assert found.ears.paths == ["a.png", "a.png", "b.png"] and found.unread == ["c.pts"]
    assert found.ears.boxes[1] == pytest.approx((46, 13, 94, 97))
    (tmp_path / "a.PTS").write_text("version: 1\n" + block.format(10, 40) + "{\n50 20\n90 90\n}\n")
    with pytest.raises(ManifestError, match=r"a.PTS: has 2 opening braces, but 1 blocks with n_points"):
        read_manifest(tmp_path)


def test_two_annotations_with_the_same_boxes_are_one_ear(tmp_path):
    photos(tmp_path)
    write_coco(tmp_path, [(name, BOX) for name in NAMES])
    write_table(tmp_path, [(name, *np.add(BOX, 1), f"p{name[0]}", "left") for name in NAMES], "_annotations.csv")
    found = all_have_the_box(tmp_path)
    assert found.ears.boxes[0] == BOX and list(found.ears.identities) == ["p0", "p1", "p2", "p3"]
    assert len(found.ears) == 4 and any("4 images have the same boxes in _annotations" in w for w in found.warnings)
    (tmp_path / "2.txt").write_text("0 0.5 0.5 0.3 0.75\n")
    with pytest.raises(ManifestError, match=r"2.png: has other boxes in _annotations.coco.json than in YOLO"):
        mixed(tmp_path)


def test_a_whole_image_says_nothing_of_boxes():
    from ear_teacher_cli.data.folder_ears import FolderEar

    boxed = FolderEar("a", BOX, "", "", "coco", 0)
    named = FolderEar("a", None, "ann", "left", "csv", 7)
    for pair in ((boxed, named), (named, boxed)):
        assert joined(*([ear] for ear in pair)) == [boxed._replace(identity="ann", side="left")]
    assert joined([boxed], [boxed, boxed]) is None


def test_a_copy_passes_its_identity_on(tmp_path):
    photos(tmp_path / "a"), photos(tmp_path / "b"), photos(tmp_path / "c")
    write_coco(tmp_path / "b", [(name, BOX) for name in NAMES])
    write_table(
        tmp_path / "c", [(name, *np.add(BOX, 1.5), f"p{name[0]}", "left") for name in NAMES], "_annotations.csv"
    )
    found = mixed(tmp_path)
    examined = examine(found, 0, SilentConsole())
    merged = merge_copies(found, examined)
    assert [found.ears.paths[index] for index in examined.kept] == [f"c/{name}" for name in NAMES]
    assert not any(
        one.boxes_differ and not one.copies == [f"a/{n}", f"b/{n}"] for one, n in zip(merged, NAMES, strict=True)
    )
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "a/names_annotations.csv").write_text("filename,identity\n" + "".join(f"{n},q{n[0]}\n" for n in NAMES))
    found = mixed(tmp_path)
    examined = examine(found, 0, SilentConsole())
    merge_copies(found, examined)
    kept = [(found.ears.paths[index], found.ears.identities[index]) for index in examined.kept]
    assert kept == [(f"b/{name}", f"q{name[0]}") for name in NAMES]


def test_versions_of_one_photo_are_on_one_side(tmp_path, monkeypatch, earteach):
    """As Roboflow exports them: plain, mirrored, turned. And a mirrored copy of another name."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        path = draw(tmp_path / f"raw/rf/train/{number}_jpg.rf.{number:032x}.png", number)
        image = Image.open(path)
        image.rotate(15).save(path.with_name(f"{number}_jpg.rf.{number + 99:032x}.png"))
        ImageOps.mirror(image).save(tmp_path / "raw/rf/train" / f"{number}_jpg.rf.{number + 200:032x}.png")
        path = draw(tmp_path / f"raw/crops/{number}.png", 100 + number)
        ImageOps.mirror(Image.open(path)).save(tmp_path / f"raw/crops/mirrored{number}.jpg")
    for seed in range(4):
        said = earteach("prepare", "raw", "data", "--seed", seed, "--overwrite")
        assert said.code == 0 and "12 photos in several versions (.rf.)" in said.err
        train, val = ({_photo(path) for path in manifest.paths} for manifest in both(Path("data")))
        assert train and val and not train & val and len(train | val) == 24
    assert len(report(Path("data"))["altered_copies"]) == 12


def _photo(path: str) -> str:
    return path.partition("_jpg.rf.")[0] if ".rf." in path else Path(path).stem.removeprefix("mirrored")


def test_root_dir_says_where_the_paths_of_a_list_start(tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    photos(Path("far/away"))
    rows = "".join(f"{name},{','.join(map(str, BOX))}\n" for name in NAMES)
    Path("list.csv").write_text(f"path,x1,y1,x2,y2\n{rows}", encoding="utf-8")
    assert earteach("prepare", "list.csv", "data").code == 1
    said = earteach("prepare", "list.csv", "data", "--root-dir", "far/away")
    assert said.code == 0, said.err
    assert sorted(path for manifest in both(Path("data")) for path in manifest.paths) == [
        f"far/away/{n}" for n in NAMES
    ]
    assert "--root-dir applies to lists" in earteach("prepare", "far", "other", "--root-dir", "far").err


def test_ctrl_c_is_ignored_by_processes_from_their_start(tmp_path, monkeypatch):
    """Else one that is still importing prints a traceback of its own."""
    handlers = []
    real = image_checks.ProcessPoolExecutor.map

    def started(*words, **options):
        results = real(*words, **options)  # starts the processes, which inherit that a signal is ignored
        handlers.append(signal.getsignal(signal.SIGINT))
        return results

    monkeypatch.setattr(image_checks, "usable_cores", lambda: 2)
    monkeypatch.setattr(image_checks.ProcessPoolExecutor, "map", started)
    path = draw(tmp_path / "a.png", 1)
    earlier = signal.getsignal(signal.SIGINT)
    results = list(image_checks.inspect_all([image_checks.Photo(0, str(path), [(0, None)])] * 128, 2))
    assert len(results) == 128 and all(crops for _, crops in results)
    assert handlers == [signal.SIG_IGN] and signal.getsignal(signal.SIGINT) is earlier is not signal.SIG_IGN


@pytest.mark.parametrize("threads, method", [(1, multiprocessing.get_context().get_start_method()), (2, "spawn")])
def test_processes_are_never_forked_beside_a_thread(tmp_path, monkeypatch, threads, method):
    """The thread may hold a lock, which nobody would release in the fork."""
    methods = []
    real = image_checks.ProcessPoolExecutor

    def started(workers, context, *words):
        methods.append(context.get_start_method())
        return real(workers, context, *words)

    photos = [image_checks.Photo(0, str(draw(tmp_path / "a.png", 1)), [(0, None)])] * 128
    monkeypatch.setattr(image_checks, "usable_cores", lambda: 2)
    monkeypatch.setattr(image_checks.threading, "active_count", lambda: threads)
    monkeypatch.setattr(image_checks, "ProcessPoolExecutor", started)
    assert list(image_checks.inspect_all(photos, 2)) == list(map(image_checks.inspect, photos))
    assert methods == [method]

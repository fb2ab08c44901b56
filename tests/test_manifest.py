"""One reader for every kind of list."""

import json

import numpy as np
import pytest
from PIL import Image

from ear_teacher_cli.data.manifest import read_manifest, write_manifest
from ear_teacher_cli.errors import ImageError, ManifestError


@pytest.fixture
def root(tmp_path):
    """A folder with s01/a.png, s01/b.png, s02/c.png."""
    for name in ("s01/a.png", "s01/b.png", "s02/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 60)).save(tmp_path / name)
    return tmp_path


def save(path, **content):
    """A list whose few boxes name their order: three boxes are too few to judge it."""
    np.save(path, np.array({"box_format": "xyxy", **content}, dtype=object))
    return path


PATHS = ["s01/a.png", "s01/b.png", "s02/c.png"]
BOXES = [(0.0, 0.0, 10.0, 20.0), (1.0, 2.0, 30.0, 40.0), (5.0, 5.0, 35.0, 55.0)]


@pytest.mark.parametrize("paths", [PATHS, np.array(PATHS), np.array(PATHS, dtype=object), [p.encode() for p in PATHS]])
@pytest.mark.parametrize(
    "boxes", [BOXES, np.array(BOXES), np.array(BOXES, dtype=np.float32), [np.array(b) for b in BOXES]]
)
def test_files_of_the_original_package_in_all_their_shapes(root, paths, boxes):
    manifest = read_manifest(save(root / "m.npy", image_paths=paths, bboxes=boxes))
    assert list(manifest.paths) == PATHS and list(manifest.boxes) == BOXES
    assert manifest.identities is None and manifest.sides is None


def test_several_boxes_per_image_are_several_ears(root):
    boxes = [[BOXES[0], BOXES[1]], [], [BOXES[2]]]
    manifest = read_manifest(save(root / "m.npy", image_paths=PATHS, bboxes=boxes, identities=["x", "y", "z"]))
    assert list(manifest.paths) == [PATHS[0], PATHS[0], PATHS[2]]
    assert list(manifest.boxes) == [BOXES[0], BOXES[1], BOXES[2]]
    assert list(manifest.rows) == [0, 0, 2] and list(manifest.identities) == ["x", "x", "z"]


def test_backslashes_of_windows_are_slashes(root):
    manifest = read_manifest(save(root / "m.npy", image_paths=["s01\\a.png"], bboxes=BOXES[:1]))
    assert manifest.paths[0] == "s01/a.png" and manifest.file(0) == str(root / "s01" / "a.png")


def test_csv_jsonl_coco_and_folder_agree(root):
    csv = "image_path,x1,y1,x2,y2,identity,side\n" + "".join(
        f"{p},{','.join(map(str, b))},{p[:3]},left\n" for p, b in zip(PATHS, BOXES, strict=True)
    )
    (root / "m.csv").write_text(csv)
    lines = [
        {"image_path": p, "bbox": b, "box_format": "xyxy", "identity": p[:3], "side": "left"}
        for p, b in zip(PATHS, BOXES, strict=True)
    ]
    (root / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    coco = {
        "images": [{"id": i, "file_name": p} for i, p in enumerate(PATHS)],
        "categories": [],
        "annotations": [{"image_id": i, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]} for i, b in enumerate(BOXES)],
    }
    (root / "m.json").write_text(json.dumps(coco))
    from_csv, from_jsonl, from_coco = (read_manifest(root / f"m.{kind}") for kind in ("csv", "jsonl", "json"))
    for manifest in (from_csv, from_jsonl, from_coco):
        assert list(manifest.paths) == PATHS and list(manifest.boxes) == BOXES
    assert list(from_csv.identities) == list(from_jsonl.identities) == ["s01", "s01", "s02"]
    assert list(from_csv.sides) == ["left"] * 3
    for kind in ("csv", "jsonl", "json"):
        (root / f"m.{kind}").unlink()
    folder = read_manifest(root)
    assert list(folder.paths) == PATHS and list(folder.boxes) == [None] * 3


def test_paths_start_from_the_working_directory_as_in_the_original_package(root, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "m.npy", image_paths=PATHS, bboxes=BOXES)
    monkeypatch.chdir(root)
    assert read_manifest(elsewhere / "m.npy").file(0) == str(root / PATHS[0])


def test_root_dir_wins(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "m.npy", image_paths=PATHS, bboxes=BOXES)
    assert read_manifest(elsewhere / "m.npy", root).file(0) == str(root / PATHS[0])


@pytest.mark.parametrize("path", ["../out.png", "/etc/passwd", "s01/../../out.png", "link.png", "a\0b.png"])
def test_paths_that_leave_the_root_are_refused(root, path):
    (root.parent / "out.png").write_bytes(b"x")
    (root / "link.png").symlink_to(root.parent / "out.png")
    manifest = read_manifest(save(root / "m.npy", image_paths=[PATHS[0], path], bboxes=BOXES[:2]), root)
    with pytest.raises(ImageError) as caught:
        manifest.file(1)
    assert caught.value.reason == "outside-root"


@pytest.mark.parametrize(
    "content, words",
    [
        (dict(image_paths=PATHS, bboxes=BOXES[:2]), "3 image_paths, 2 bboxes"),
        (dict(image_paths=PATHS, bboxes=BOXES, identities=["x"]), "1 identities"),
        (dict(bboxes=BOXES), "no column of image paths"),
        (dict(image_paths=PATHS, bboxes=[(1, 2, 3)] * 3), "row 0: box"),
        (dict(image_paths=PATHS, bboxes=["x"] * 3), "row 0: box"),
        (dict(image_paths=[1, 2, 3], bboxes=BOXES), "row 0: path"),
        (dict(image_paths=[], bboxes=[]), "no images"),
        (dict(image_paths=5, bboxes=BOXES), "'image_paths' is int"),
    ],
)
def test_unreadable_files_of_the_original_package_say_why(root, content, words):
    with pytest.raises(ManifestError, match=words):
        read_manifest(save(root / "m.npy", **content))


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("m.csv", "foo,bar\n1,2\n", "no column of image paths"),
        ("m.csv", "image_path,x1,y1\na.png,1,2\n", "x1, y1, named like part of a box"),
        ("m.csv", "image_path,x1,y1,x2,y2\na.png,1,2,3\n", "line 2"),
        ("m.csv", "image_path,x1,y1,x2,y2\na.png,1,2,3,four\n", "row 0: box"),
        ("m.jsonl", "{not json}\n", "JSON Lines"),
        ("m.jsonl", "[1]\n", "line 1"),
        ("m.jsonl", '{"bbox": [1, 2, 3, 4]}\n', "no column of image paths"),
        ("m.json", '{"a": 1}', "COCO"),
        ("m.json", '{"images": [], "annotations": [{"image_id": 7, "bbox": [1, 2, 3, 4]}]}', "image_id 7 is not"),
        ("m.txt", "x", "not a manifest"),
    ],
)
def test_unreadable_text_manifests_say_why(root, name, text, words):
    (root / name).write_text(text)
    with pytest.raises(ManifestError, match=words):
        read_manifest(root / name)


def test_missing_manifest_and_empty_folder(tmp_path):
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "nope.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="no images"):
        read_manifest(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["npy", "csv", "jsonl", "parquet"])
@pytest.mark.parametrize("boxes", [BOXES, [BOXES[0], None, BOXES[2]], [None] * 3])
def test_written_manifests_read_back(root, kind, boxes):
    lines = [
        {"image_path": p, "bbox": b, "box_format": "xyxy", "identity": "i", "side": "left"}
        for p, b in zip(PATHS, boxes, strict=True)
    ]
    (root / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = read_manifest(root / "in.jsonl")
    write_manifest(manifest, root / f"out.{kind}")
    back = read_manifest(root / f"out.{kind}")
    for column in ("paths", "boxes", "identities", "sides"):
        assert list(getattr(back, column)) == list(getattr(manifest, column))

"""Lists as users have them: every layout gives the same ears as their corners do, or is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import apart
from PIL import Image

from ear_teacher_cli.config import BOX_FORMATS, Reading
from ear_teacher_cli.data import boxes
from ear_teacher_cli.data.boxes import from_corners, to_corners
from ear_teacher_cli.data.crop import image_size
from ear_teacher_cli.data.formats import FORMATS, Format, csv_table
from ear_teacher_cli.data.formats.columns import find_columns
from ear_teacher_cli.data.formats.rows import Rows, four_numbers
from ear_teacher_cli.data.manifest import Manifest, keep_rows, read_manifest, write_manifest
from ear_teacher_cli.errors import ManifestError


@pytest.fixture(scope="session")
def truth(ears) -> Manifest:
    """24 ears in 24 photos, as corners with a name."""
    manifest = read_manifest(ears / "train_teacher.npy")
    assert len(manifest) == 24 and len(set(manifest.paths)) == 24
    return manifest


def xywh(manifest) -> np.ndarray:
    return np.array([from_corners(box, "xywh") for box in manifest.boxes])


def points(box, count=55) -> np.ndarray:
    """Landmarks [count, 3] whose bounding rectangle, 10 % larger on each side, is the box; the last one is hidden."""
    x1, y1, x2, y2 = box
    dx, dy = (x2 - x1) / 12, (y2 - y1) / 12
    shares = np.random.default_rng(0).random((count, 2))
    shares[:2] = (0, 0), (1, 1)
    found = np.array([x1 + dx, y1 + dy]) + shares * np.array([x2 - x1 - 2 * dx, y2 - y1 - 2 * dy])
    visible = np.ones((count, 1))
    found[-1], visible[-1] = (0, 0), 0
    return np.concatenate([found, visible], axis=1)


def save(folder: Path, **content) -> Path:
    np.save(folder / "list.npy", np.array(content, dtype=object))
    return folder / "list.npy"


def objects(rows) -> np.ndarray:
    """An object array with one entry per row, as numpy.array(..., dtype=object) of unequal rows makes it."""
    array = np.empty(len(rows), dtype=object)
    for place, row in enumerate(rows):
        array[place] = row
    return array


def table(folder: Path, header: str, rows, separator=",") -> Path:
    lines = [header, *(separator.join(map(str, row)) for row in rows)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "list.csv"


def lines(folder: Path, rows) -> Path:
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "list.jsonl"


def windows(manifest) -> list[str]:
    return [path.replace("/", "\\") for path in manifest.paths]


def sizes(manifest) -> np.ndarray:
    return np.array([image_size(manifest.file(i)) for i in range(len(manifest))], dtype=float)


def coco(manifest, names) -> dict:
    return {
        "images": [{"id": 7 + i, "file_name": name} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "ear"}],
        "annotations": [
            {"id": i, "image_id": 7 + i, "category_id": 1, "bbox": list(box)} for i, box in enumerate(xywh(manifest))
        ],
    }


def relative(manifest) -> np.ndarray:
    numbers = np.array([from_corners(box, "cxcywh") for box in manifest.boxes])
    return numbers / np.tile(sizes(manifest), 2)


def parquet(folder, m) -> Path:
    arrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = dict(zip(("x", "y", "w", "h"), xywh(m).T.tolist(), strict=True))
    written.write_table(arrow.table({"file_name": list(m.paths), **columns}), folder / "list.parquet")
    return folder / "list.parquet"


# name -> (folder, the true list) -> the list to read. The layouts of the original package's scripts come first.
LISTS = {
    "npy, object array of x,y,w,h": lambda f, m: save(
        f, image_paths=objects(windows(m)), bboxes=np.array(xywh(m), dtype=object)
    ),
    "npy, N x 1 x 4": lambda f, m: save(f, image_paths=windows(m), bboxes=xywh(m)[:, None]),
    "npy, lists of boxes": lambda f, m: save(f, image_paths=windows(m), bboxes=objects([[list(b)] for b in xywh(m)])),
    "npy, keypoints": lambda f, m: save(f, image_paths=windows(m), keypoints=np.array([points(b) for b in m.boxes])),
    "npy, boxes instead of bboxes": lambda f, m: save(f, image_paths=list(m.paths), boxes=xywh(m)),
    "npy, corners as its README says": lambda f, m: save(f, image_paths=list(m.paths), bboxes=np.array(m.boxes)),
    "npy, with its order": lambda f, m: save(f, image_paths=list(m.paths), bboxes=xywh(m), box_format="xywh"),
    "csv, filename and xmin": lambda f, m: table(
        f,
        "filename,width,height,class,xmin,ymin,xmax,ymax",
        [(p, 1, 1, "ear", *b) for p, b in zip(m.paths, m.boxes, strict=True)],
    ),
    "csv, image_path and x,y,w,h": lambda f, m: table(
        f, "image_path,x,y,w,h", [(p, *b) for p, b in zip(m.paths, xywh(m), strict=True)]
    ),
    "csv, capitals": lambda f, m: table(
        f, "Image Path,X1,Y1,X2,Y2", [(p, *b) for p, b in zip(m.paths, m.boxes, strict=True)]
    ),
    "csv, spaces after commas": lambda f, m: table(
        f, "image_path, x1, y1, x2, y2", [(p, *b) for p, b in zip(m.paths, m.boxes, strict=True)], ", "
    ),
    "csv, semicolons and left,top,width,height": lambda f, m: table(
        f, "path;left;top;width;height", [(p, *b) for p, b in zip(m.paths, xywh(m), strict=True)], ";"
    ),
    "csv, bbox_x and so on": lambda f, m: table(
        f, "file,bbox_x,bbox_y,bbox_w,bbox_h", [(p, *b) for p, b in zip(m.paths, xywh(m), strict=True)]
    ),
    "csv, one column of numbers": lambda f, m: table(
        f, "image;bbox", [(p, [float(v) for v in b]) for p, b in zip(m.paths, xywh(m), strict=True)], ";"
    ),
    "csv, centres": lambda f, m: table(
        f,
        "image_path,x_center,y_center,width,height",
        [(p, *from_corners(b, "cxcywh")) for p, b in zip(m.paths, m.boxes, strict=True)],
    ),
    "csv, shares of the image": lambda f, m: table(
        f, "image_path,cx,cy,w,h", [(p, *b) for p, b in zip(m.paths, relative(m), strict=True)]
    ),
    "jsonl, box": lambda f, m: lines(
        f, [{"image_path": p, "box": list(b)} for p, b in zip(m.paths, xywh(m), strict=True)]
    ),
    "jsonl, names": lambda f, m: lines(
        f,
        [
            {"file_name": p, **dict(zip(("x", "y", "width", "height"), b, strict=True))}
            for p, b in zip(m.paths, xywh(m).tolist(), strict=True)
        ],
    ),
    "jsonl, bbox_xywh": lambda f, m: lines(
        f, [{"image": p, "bbox_xywh": list(b)} for p, b in zip(m.paths, xywh(m), strict=True)]
    ),
    "parquet": parquet,
}


def in_order(manifest, truth) -> np.ndarray:
    """The largest distance of a corner in pixels, row by row by path."""
    assert sorted(manifest.paths) == sorted(truth.paths)
    expected = dict(zip(truth.paths, truth.boxes, strict=True))
    return np.abs(np.array([manifest.boxes[i] for i in range(len(truth))]) - [expected[p] for p in manifest.paths])


@pytest.mark.parametrize("layout", LISTS)
def test_each_layout_gives_the_same_boxes(layout, ears, truth, tmp_path):
    manifest = read_manifest(LISTS[layout](tmp_path, truth), ears)
    assert list(manifest.paths) == list(truth.paths) and in_order(manifest, truth).max() < 1e-3, manifest.how


def tree(kind: str, ears: Path, truth: Manifest, folder: Path) -> Path:
    """A folder of the 24 photos, a folder per person, with annotations of one kind."""

    def below(path) -> Path:
        return Path(path if "sister" in kind else path.removeprefix("images/"))

    folders = {below(path).parent for path in truth.paths}
    for i, path in enumerate(truth.paths):
        place = folder / below(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ears / path, place)
        if kind == "pts":
            rows = "\n".join(f"{x} {y}" for x, y, seen in points(truth.boxes[i]) if seen)
            place.with_suffix(".pts").write_text(f"version: 1\nn_points: 54\n{{\n{rows}\n}}\n")
        if kind.startswith("yolo"):
            label = place.with_suffix(".txt")
            if kind == "yolo, sister folder":
                label = folder / Path(path.replace("images/", "labels/", 1)).with_suffix(".txt")
                label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(" ".join(map(str, (0, *relative(truth)[i]))) + "\n")
    if kind == "coco":
        for name in folders:
            here = truth.subset([i for i, path in enumerate(truth.paths) if below(path).parent == name])
            content = coco(here, [Path(path).name for path in here.paths])
            (folder / name / "_annotations.coco.json").write_text(json.dumps(content))
    if kind == "csv":
        for name in folders:
            here = truth.subset([i for i, path in enumerate(truth.paths) if below(path).parent == name])
            rows = [(Path(p).name, *b) for p, b in zip(here.paths, xywh(here), strict=True)]
            table(folder / name, "filename,x,y,w,h", rows).rename(folder / name / "ears_annotations.csv")
    return folder


TREES = ("coco", "csv", "pts", "yolo", "yolo, sister folder")


@pytest.mark.parametrize("kind", TREES)
def test_each_tree_gives_the_same_boxes(kind, ears, truth, tmp_path):
    manifest = read_manifest(tree(kind, ears, truth, tmp_path))
    expected = {path.removeprefix("images/"): box for path, box in zip(truth.paths, truth.boxes, strict=True)}
    found = [path.removeprefix("images/") for path in manifest.paths]
    assert sorted(found) == sorted(expected)
    off = [np.abs(np.subtract(box, expected[path])).max() for path, box in zip(found, manifest.boxes, strict=True)]
    assert max(off) < 1e-3, manifest.how


@pytest.mark.slow
def test_all_layouts_embed_to_the_same_vectors(run, ears, truth, tmp_path, earteach):
    def embedded(source, *words):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*.npy')))}.npy"
        said = earteach("embed", source, out, "--weights", run, *words)
        assert said.code == 0, said.err
        assert "24 with boxes" in said.err and "0 whole images" in said.err
        return np.load(out)  # noqa: TID251  (plain numpy, as users open the rows)

    expected = embedded(ears / "train_teacher.npy")
    for number, (layout, make) in enumerate(LISTS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert apart(embedded(make(folder, truth), "--root-dir", ears), expected) < 1e-3, layout
    coco_tree = embedded(tree("coco", ears, truth, tmp_path / "tree"))
    order = np.argsort(np.argsort(list(truth.paths)))
    assert apart(coco_tree[order], expected) < 1e-3


def test_one_photo_with_several_annotated_ears_and_one_without(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (200, 100)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("0 0.25 0.5 0.1 0.4\n0 0.75 0.5 0.1 0.4 0.9\n")
    (tmp_path / "b.txt").write_text("")
    manifest = read_manifest(tmp_path)
    assert list(manifest.paths) == ["a.png", "a.png"]
    assert np.allclose(list(manifest.boxes), [(40, 30, 60, 70), (140, 30, 160, 70)])
    assert any("1 images have no annotation" in warning for warning in manifest.warnings)


def test_keypoints_at_the_border_are_clamped_to_the_image(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    corners = [[0, 0, 2], [99, 0, 2], [99, 99, 2], [0, 99, 2]]
    manifest = read_manifest(save(tmp_path, image_paths=["a.png"], keypoints=[corners]))
    assert manifest.boxes[0] == (0, 0, 100, 100)


@pytest.mark.parametrize(
    "header, words",
    [
        ("image_path,xmin,ymin", "xmin, ymin, named like part of a box"),
        ("image_path,x1,y1,x2", "x1, x2, y1"),
        ("image_path,roi", "roi"),
        ("image_path,x1,y1,x2,y2,bbox", "bbox, named like another box"),
        ("image_path,x1,y1,x2,y2,xmin,ymin,xmax,ymax", "two boxes"),
        ("image_path,bounding_box_left", "bounding_box_left"),
        ("image_path,top,left,bottom", "bottom, left, top"),
        ("image_path,Image Path", "twice"),
        ("label,person", "no column of image paths"),
    ],
)
def test_names_that_look_like_a_box_are_refused_by_name(tmp_path, header, words):
    with pytest.raises(ManifestError, match=words):
        read_manifest(table(tmp_path, header, []))


def test_other_unknown_columns_are_warned_of_and_labels_offered(tmp_path, earteach):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    source = table(tmp_path, "image_path,person_id,weather,width", [("a.png", "p1", "rain", 50)])
    warnings = " ".join(read_manifest(source).warnings)
    assert "--identity-column person_id" in warnings and "weather: not used" in warnings and "width" not in warnings
    manifest = read_manifest(source, reading=Reading(identity_column="Person ID"))
    assert list(manifest.identities) == ["p1"]
    said = earteach("validate-data", source, "--identity-column", "person_id")
    assert "0 with boxes, 1 whole images, 1 identities" in said.err
    said = earteach("validate-data", source, "--identity-column", "subject")
    assert said.code == 1 and b"has no column 'subject'" in said.out


def test_coco_of_several_categories_and_images_without_annotation(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 80)).save(tmp_path / name)
    content = {
        "images": [{"id": 0, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "ear"}, {"id": 2, "name": "nose"}],
        "annotations": [{"image_id": 0, "category_id": c, "bbox": [1, 2, 30, 40]} for c in (1, 2)],
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    warnings = " ".join(read_manifest(tmp_path / "list.json").warnings)
    assert "1 ear, 1 nose" in warnings and "1 of 2 images have no annotation" in warnings
    named = read_manifest(tmp_path / "list.json", reading=Reading(identity_column="category"))
    assert list(named.identities) == ["ear", "nose"]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.txt", "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n", "has 9 numbers"),
        ("a.txt", "0 40 50 20 30\n", "not from 0 to 1"),
        ("a.pts", "version: 1\nn_points: 3\n{\n1 2\n3 4\n}\n", "3 lines of x y"),
        ("a.pts", "1 2\n3 4\n", "is not a .pts file"),
    ],
)
def test_annotations_that_are_not_understood_are_refused(tmp_path, name, text, words):
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=words):
        read_manifest(tmp_path)


def test_any_other_text_beside_an_image_is_no_label(tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a left ear\n")
    assert list(read_manifest(tmp_path).boxes) == [None]


def test_heic_is_read_with_the_extra_and_counted_without(tmp_path, monkeypatch, earteach):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    from ear_teacher_cli.data import crop, image_suffixes

    stripes = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))).convert("RGB")
    stripes.save(tmp_path / "a.heic", quality=95)
    stripes.save(tmp_path / "b.png")
    manifest = read_manifest(tmp_path)
    assert list(manifest.paths) == ["a.heic", "b.png"] and crop.image_size(manifest.file(0)) == (64, 48)
    pixels = [np.asarray(crop.read_image(manifest.file(i)).image, dtype=int) for i in range(2)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 4
    for module in (crop, image_suffixes):
        monkeypatch.setattr(module, "can_read_heic", lambda: False)
    manifest = read_manifest(tmp_path)
    assert list(manifest.paths) == ["b.png"] and "1 .heic cannot be read without the extra heic" in manifest.warnings[0]
    (tmp_path / "list.csv").write_text("path\na.heic\n")
    said = earteach("validate-data", tmp_path / "list.csv")
    assert said.code == 1 and b"is HEIC; pip install" in said.out


KEPT = {name: make for name, make in LISTS.items() if "parquet" not in name}


@pytest.mark.parametrize("layout", KEPT)
def test_a_cleaned_list_keeps_layout_order_and_names(layout, ears, truth, tmp_path):
    source = KEPT[layout](tmp_path, truth)
    manifest, out = read_manifest(source, ears), tmp_path / f"clean{source.suffix}"
    keep_rows(manifest, range(len(manifest)), out)
    again = read_manifest(out, ears)
    assert again.paths == manifest.paths and list(again.boxes) == list(manifest.boxes)
    if source.suffix == ".csv":
        assert out.read_text().replace(" ", "") == source.read_text().replace(" ", "")
    if source.suffix == ".jsonl":
        assert out.read_text() == source.read_text()
    if source.suffix == ".npy":
        old, new = (np.load(path, allow_pickle=True).item() for path in (source, out))  # noqa: TID251  (what users of the original package call)
        assert list(old) == list(new) and all(type(old[key]) is type(new[key]) for key in old)
        assert all(np.shape(old[key]) == np.shape(new[key]) for key in old)
    kept = [i for i in range(len(manifest)) if i % 3]
    keep_rows(manifest, kept, out)
    fewer = read_manifest(out, ears, Reading(box_format=manifest.box_format.split()[0]))
    assert list(fewer.paths) == [manifest.paths[i] for i in kept]
    assert list(fewer.boxes) == [manifest.boxes[i] for i in kept]


def test_of_several_boxes_of_a_row_one_is_dropped(tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    three = [[1, 2, 30, 40], [5, 5, 20, 20], [9, 9, 30, 30]]
    source = save(tmp_path, image_paths=["a.png", "a.png"], bboxes=[three, three[:1]], box_format="xyxy")
    keep_rows(read_manifest(source), [0, 2, 3], tmp_path / "clean.npy")
    content = np.load(tmp_path / "clean.npy", allow_pickle=True).item()  # noqa: TID251  (what users of the original package call)
    assert content["bboxes"] == [[three[0], three[2]], three[:1]] and content["image_paths"] == ["a.png", "a.png"]


def test_a_format_is_a_module_and_a_line_in_the_table(tmp_path, monkeypatch, earteach):
    """A toy format, `path x1 y1 x2 y2` per line, is read by every command once it is in the table."""

    def read(path: Path, name: str, identity_column: str | None) -> Rows:
        rows = Rows(order="xyxy", units="pixels", named_by="toy lines")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            file, *numbers = line.split()
            rows.add(number, file, four_numbers(numbers, name, number))
        return rows

    def keep(source: Path, out: Path, kept, identity_column: str | None) -> None:
        lines = source.read_text(encoding="utf-8").splitlines()
        out.write_text("".join(f"{lines[row]}\n" for row, _ in kept), encoding="utf-8")

    def write(path: Path, rows) -> None:
        lines = [f"{name} {' '.join(f'{value:g}' for value in box)}\n" for name, box, _, _ in rows]
        path.write_text("".join(lines), encoding="utf-8")

    for name in ("a.png", "b.png"):
        image(tmp_path, name)
    source = tmp_path / "list.toy"
    source.write_text("a.png 10 20 90 140\nb.png 15 25 95 145\nb.png 9 9 5 5\n", encoding="utf-8")
    assert "not a manifest" in earteach("validate-data", source).out.decode()
    monkeypatch.setitem(FORMATS, ".toy", Format(read, keep, write))
    manifest = read_manifest(source)
    assert list(manifest.paths) == ["a.png", "b.png", "b.png"] and manifest.boxes[0] == (10, 20, 90, 140)
    assert manifest.how == "x1,y1,x2,y2 by toy lines"
    write_manifest(manifest, tmp_path / "copy.toy")
    assert (tmp_path / "copy.toy").read_text() == source.read_text()
    said = earteach("validate-data", source, "--write-clean", tmp_path / "clean.toy")
    assert b"box-empty: 1" in said.out and len(read_manifest(tmp_path / "clean.toy")) == 2
    with pytest.raises(ManifestError, match=r"no such file.*\.toy"):
        read_manifest(tmp_path / "nowhere.toy")
    unread = "3 files that may be a list of ears were not read (clean.toy, copy.toy, list.toy)"
    assert any(unread in warning for warning in read_manifest(tmp_path).warnings)


def test_orders_are_undone_and_named_everywhere():
    assert BOX_FORMATS[1:] == tuple(boxes.BOX_FORMATS)
    box = (3.0, 4.0, 30.0, 50.0)
    for order in boxes.BOX_FORMATS:
        assert np.allclose(to_corners(np.array([from_corners(box, order)]), order), [box])


def test_image_sizes_beside_corners_are_no_second_box():
    columns = find_columns(["filename", "width", "height", "xmin", "ymin", "xmax", "ymax"], "x.csv")
    assert columns.four == ("xmin", "ymin", "xmax", "ymax") and columns.order == "xyxy" and not columns.warnings


def image(folder, name="a.png", size=(480, 360)) -> str:
    Image.new("RGB", size, (200, 190, 180)).save(folder / name)
    return name


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("annotation", {"image": "a.png", "annotation": [51, 46, 84, 161]}, "annotation holds what may be a box"),
        ("objects", {"image": "a.png", "objects": {"bbox": [[1, 2, 30, 40]]}}, "objects holds what may be a box"),
        ("shape", {"image": "a.png", "shape": {"x": 1, "y": 2, "w": 3}}, "shape holds what may be a box"),
        ("lx", {"image": "a.png", "lx": 1, "ly": 2, "rx": 30, "ry": 40}, "lx, ly, rx, ry may be a box"),
        ("b1", {"image": "a.png", "b1": 1, "b2": 2, "b3": 30, "b4": 40}, "b1, b2, b3, b4 may be a box"),
        ("two", {"image": "a.png", "bbox": [1, 2, 30, 40], "identity": ["x", "y"]}, "is not one text per ear"),
    ],
)
def test_a_box_under_an_unknown_name_is_refused(tmp_path, name, row, words):
    image(tmp_path)
    with pytest.raises(ManifestError, match=words):
        read_manifest(lines(tmp_path, [row]))


@pytest.mark.parametrize(
    "name", ["directory", "direction", "is_correct", "boxer", "inbox", "heroine", "Unnamed: 0", ""]
)
def test_names_that_hold_a_word_of_a_box_are_none(tmp_path, name):
    image(tmp_path)
    manifest = read_manifest(table(tmp_path, f"image_path,x1,y1,x2,y2,{name}", [("a.png", 1, 2, 30, 40, "q")]))
    assert manifest.boxes[0] == (1, 2, 30, 40)


def test_two_ears_of_a_row_have_each_their_name(tmp_path, earteach):
    image(tmp_path)
    row = {"image": "a.png", "boxes": [[1, 2, 30, 40], [50, 60, 90, 99]], "box_format": "xyxy"}
    manifest = read_manifest(lines(tmp_path, [row | {"identity": ["p", "q"], "side": "left"}]))
    assert list(manifest.identities) == ["p", "q"] and list(manifest.sides) == ["left", "left"]
    wrong = [[1, 2, 30, 40], [50, 60, 40, 99]]
    content = {"image_paths": ["a.png"], "bboxes": [wrong], "box_format": "xyxy", "person": [["p", "q"]]}
    for source in (save(tmp_path, **content), lines(tmp_path, [row | {"boxes": wrong, "person": ["p", "q"]}])):
        clean = tmp_path / f"clean{source.suffix}"
        earteach("validate-data", source, "--identity-column", "person", "--write-clean", clean, "--overwrite")
        kept = read_manifest(clean, reading=Reading(identity_column="person"))
        assert list(kept.identities) == ["p"] and list(kept.boxes) == [(1, 2, 30, 40)]


def test_a_csv_row_without_a_box_does_not_change_the_order_of_the_others(tmp_path):
    image(tmp_path)
    box, other = ("a.png", "[10, 20, 30, 40]", "xywh"), ("a.png", "[10, 20, 40, 60]", "xyxy")
    for rows in ([box, ("a.png", "", "xyxy")], [("a.png", "", ""), box]):
        manifest = read_manifest(table(tmp_path, "image;bbox;box_format", rows, ";"))
        assert (10, 20, 40, 60) in list(manifest.boxes) and None in list(manifest.boxes)
        assert "1 of 2 rows have no box" in manifest.warnings[-1]
    with pytest.raises(ManifestError, match="in another order than those before"):
        read_manifest(table(tmp_path, "image;bbox;box_format", [box, ("a.png", "", "xyxy"), other], ";"))


@pytest.mark.parametrize(
    "header, row",
    [
        ("image,x1,y1,x2,y2,box_format", "a.png,1,2,30,40,xywh"),
        ("image,bbox_xyxy,box_format", 'a.png,"[1,2,3,4]",xywh'),
    ],
)
def test_an_order_that_contradicts_the_names_is_refused(tmp_path, header, row):
    image(tmp_path)
    (tmp_path / "list.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(ManifestError, match="correct one"):
        read_manifest(tmp_path / "list.csv")


def test_sizes_that_the_list_states_are_those_of_the_files(tmp_path):
    image(tmp_path)
    with pytest.raises(ManifestError, match="as 960 x 720, but the file is 480 x 360"):
        read_manifest(table(tmp_path, "filename,width,height,xmin,ymin,xmax,ymax", [("a.png", 960, 720, 9, 9, 90, 99)]))
    for width, height in ((480, 360), (0, 0), (81, 90)):  # right, a placeholder, the box's own
        rows = [("a.png", width, height, 9, 9, 90, 99)]
        assert read_manifest(table(tmp_path, "filename,width,height,left,top,right,bottom", rows)).boxes[0] == (
            9,
            9,
            90,
            99,
        )
    content = {"images": [{"id": "0", "file_name": "a.png", "width": 240, "height": 180}]}
    content["annotations"] = [{"image_id": 0, "bbox": [1, 2, 30, 40]}]
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="240 x 180"):
        read_manifest(tmp_path / "list.json")


def test_coco_files_that_were_joined_without_new_ids_are_refused(tmp_path):
    content = {"images": [{"id": 0, "file_name": "a.png"}, {"id": 0, "file_name": "b.png"}], "annotations": []}
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="two images have the id 0"):
        read_manifest(tmp_path / "list.json")


def test_units_are_of_the_whole_list(tmp_path):
    image(tmp_path)
    shares = [("a.png", 0.1, 0.2, 0.5, 0.6)] * 20
    header = "image,x1,y1,x2,y2"
    assert read_manifest(table(tmp_path, header, shares)).boxes[0] == pytest.approx((48, 72, 240, 216))
    beyond = [*shares, ("a.png", 0.1, 0.2, 1.15, 0.6)]  # of a detector
    assert read_manifest(table(tmp_path, header, beyond)).boxes[0] == pytest.approx((48, 72, 240, 216))
    with pytest.raises(ManifestError, match="20 of 30 boxes have no number above 1.1"):
        read_manifest(table(tmp_path, header, shares + [("a.png", 10, 20, 50, 60)] * 10))
    with pytest.raises(ManifestError, match="can be x,y,width,height or centre x,centre y,width,height"):
        read_manifest(table(tmp_path, "image,x,y,w,h", [("a.png", 0.4, 0.5, 0.1, 0.2)] * 20))
    found = read_manifest(
        table(tmp_path, "image,x,y,w,h", [("a.png", 0.4, 0.5, 0.1, 0.2)] * 20), reading=Reading("cxcywh")
    )
    assert found.boxes[0] == pytest.approx((168, 144, 216, 216))


def test_a_box_of_under_two_pixels_is_an_error(tmp_path, earteach):
    image(tmp_path)
    rows = [("a.png", 9, 9, 90, 99)] * 20 + [("a.png", 0.1, 0.2, 0.5, 0.6)]
    said = earteach("validate-data", table(tmp_path, "image,x1,y1,x2,y2", rows))
    assert said.code == 1 and b"box-tiny: 1" in said.out and b"is it in other units?" in said.out


def test_a_cleaned_csv_keeps_byte_order_mark_quotes_and_line_ends(tmp_path, earteach):
    image(tmp_path)
    text = '\ufeff"Image";"x1";"y1";"x2";"y2";"note"\r\n"a.png";1;2;30;40;"two\r\nlines"\r\n"a.png";9;9;1;1;"bad"\r\n'
    (tmp_path / "list.csv").write_text(text, encoding="utf-8", newline="")
    earteach("validate-data", tmp_path / "list.csv", "--write-clean", tmp_path / "clean.csv")
    assert (tmp_path / "clean.csv").read_bytes().decode() == text[: text.index('"a.png";9')]


def test_what_spreadsheets_add_is_read_and_decimal_commas_are_named(tmp_path):
    image(tmp_path)
    (tmp_path / "list.csv").write_text("sep=;\nimage;x1;y1;x2;y2\na.png;1;2;30;40\n;;;;\n")
    assert list(read_manifest(tmp_path / "list.csv").boxes) == [(1, 2, 30, 40)]
    with pytest.raises(ManifestError, match="decimal commas"):
        read_manifest(table(tmp_path, "image;x1;y1;x2;y2", [("a.png", "1,5", "2,5", "30,5", "40,5")], ";"))


def test_of_a_long_csv_nothing_is_kept_that_is_not_asked_for(tmp_path, monkeypatch):
    """Its text is: a list of 300,000 rows once took minutes, because every line was added to one text."""
    image(tmp_path)
    kept = []
    lines_of = csv_table._Lines
    monkeypatch.setattr(csv_table, "_Lines", lambda *words: kept.append(lines_of(*words)) or kept[-1])
    read_manifest(table(tmp_path, "image,x1,y1,x2,y2", [("a.png", 1, 2, 30, 40)] * 100))
    assert kept and kept[-1].take() == ""

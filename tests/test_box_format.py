"""The order of a list's boxes is determined rightly, or refused, and never wrongly."""

import re

import numpy as np
import pytest
from PIL import Image

from ear_teacher_cli.config import Reading
from ear_teacher_cli.data.box_format import judge
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.errors import ManifestError

SIZES = np.array([[640, 480], [480, 640], [1920, 1080], [3024, 4032], [200, 300], [400, 400], [1280, 960]], float)


def boxes_at(centre, size, image) -> np.ndarray:
    """Corners [N, 4] clamped to the image."""
    return np.concatenate([(centre - size / 2).clip(0, image), (centre + size / 2).clip(0, image)], axis=1)


def ears_of(height, draw) -> np.ndarray:
    """[N, 2] widths and heights; ears are 1.6 times as high as wide, give or take."""
    return np.stack([height / draw.lognormal(np.log(1.6), 0.2, len(height)), height], axis=1)


# name -> (random numbers, sizes of images [N, 2]) -> corners [N, 4], sizes [N, 2]
def small_in_large(draw, image):
    size = ears_of(draw.uniform(0.05, 0.2, len(image)) * image.min(axis=1), draw)
    return boxes_at(size / 2 + draw.random(image.shape) * (image - size), size, image), image


def portraits(draw, image):
    size = ears_of(draw.uniform(0.08, 0.25, len(image)) * image[:, 1], draw)
    places = np.stack([draw.uniform(0.25, 0.75, len(image)), draw.uniform(0.2, 0.5, len(image))], axis=1)
    return boxes_at(places * image, size, image), image


def left_profiles(draw, image):
    """All ears left of and above the middle: as x,y,width,height every one of them is possible."""
    size = ears_of(draw.uniform(0.08, 0.25, len(image)) * image[:, 1], draw)
    spread = draw.uniform(0.01, 0.08)
    places = np.array([0.4, 0.33]) + spread * draw.standard_normal(image.shape)
    return boxes_at(places.clip(0.1, 0.49) * image, size, image), image


def beside_a_head(draw, image):
    """The larger the head, the farther the ear from the middle: position depends on size in the right order, too."""
    size = ears_of(draw.uniform(0.08, 0.3, len(image)) * image[:, 1], draw)
    shift = np.array([draw.uniform(-1.5, 1.5), draw.uniform(-1, 0.5)])
    noise = draw.uniform(0, 0.06) * draw.standard_normal(image.shape)
    return boxes_at(np.array([0.5, 0.45]) * image + shift * size + noise * image, size, image), image


def ear_centred(draw, image):
    """Crops around an ear with a margin: as corners every box of x,y,width,height is possible."""
    size = ears_of(draw.uniform(80, 900, len(image)), draw)
    margin = 1 + 2 * draw.uniform(0.05, 0.4)
    image = np.round(size * margin * (1 + draw.uniform(0.01, 0.15) * np.abs(draw.standard_normal(size.shape))))
    jitter = draw.uniform(0.005, 0.06) * draw.standard_normal(size.shape)
    return boxes_at(image * (0.5 + jitter), size, image), image


def square_crops(draw, image):
    size = ears_of(draw.uniform(80, 900, len(image)), draw)
    image = np.round(np.repeat(size[:, 1:] * draw.uniform(1.05, 2), 2, axis=1))
    jitter = draw.uniform(0.005, 0.05) * draw.standard_normal(size.shape)
    return boxes_at(image * (0.5 + jitter), size, image), image


def crops_of_one_size(draw, image):
    image = np.full(image.shape, 224.0)
    size = ears_of(224 / draw.uniform(1.1, 2) * (1 - 0.1 * np.abs(draw.standard_normal(len(image)))), draw)
    jitter = draw.uniform(0.005, 0.05) * draw.standard_normal(size.shape)
    return boxes_at(image * (0.5 + jitter), size, image), image


def at_borders(draw, image):
    size = ears_of(draw.uniform(0.2, 0.6, len(image)) * image[:, 1], draw)
    return boxes_at(draw.random(image.shape) * image, size, image), image


def one_camera(draw, image):
    image = np.repeat(image[:1], len(image), axis=0)
    spread = draw.uniform(0.02, 0.2) * draw.standard_normal(len(image))
    size = ears_of(image[:, 1] * draw.uniform(0.1, 0.4) * np.exp(spread), draw)
    places = draw.uniform(0.2, 0.8, 2) + draw.uniform(0.003, 0.05) * draw.standard_normal(image.shape)
    return boxes_at(image * places, size, image), image


def unclamped(draw, image):
    """Boxes of a detector that reach beyond the image."""
    size = ears_of(draw.uniform(0.2, 0.5, len(image)) * image[:, 1], draw)
    centre = draw.random(image.shape) * image
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1), image


WORLDS = (small_in_large, portraits, left_profiles, beside_a_head, ear_centred, square_crops, crops_of_one_size)
WORLDS += (at_borders, one_camera, unclamped)


def made_list(world, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(corners [N, 4], sizes [N, 2]) of 1 to 10,000 rows."""
    draw = np.random.default_rng([seed, WORLDS.index(world)])
    count = int(np.exp(draw.uniform(0, np.log(10_000))))
    image = (
        SIZES[draw.integers(len(SIZES), size=count)] if draw.random() < 0.7 else draw.integers(150, 2500, (count, 2))
    )
    corners, image = world(draw, image.astype(float))
    kept = ((corners[:, 2:] - corners[:, :2]) > 4).all(axis=1)
    return np.round(corners[kept]) if draw.random() < 0.7 else corners[kept], image[kept]


def outcome(corners, sizes, order: str) -> str:
    numbers = corners.copy()
    if order == "xywh":
        numbers[:, 2:] -= numbers[:, :2]
    found = judge(numbers[:400], sizes[:400])
    if not found.differ:
        return "same"
    return "refused" if found.order is None else "right" if found.order == order else "wrong"


def test_of_2_000_made_lists_none_is_read_wrongly():
    lists = {world: [made_list(world, seed) for seed in range(100)] for world in WORLDS}
    found = {(w, o): [outcome(*made, o) for made in lists[w]] for w in WORLDS for o in ("xyxy", "xywh")}
    assert not [key for key, outcomes in found.items() if "wrong" in outcomes]

    def decided(world, order) -> float:
        """The share of lists of 20 rows and more that are read, not refused."""
        long = [o for o, (corners, _) in zip(found[world, order], lists[world], strict=True) if len(corners) >= 20]
        return long.count("right") / len(long)

    for world in (small_in_large, portraits, at_borders):
        assert min(decided(world, "xyxy"), decided(world, "xywh")) > 0.95, world
    for world in (ear_centred, square_crops, crops_of_one_size):
        assert decided(world, "xyxy") > 0.9 and decided(world, "xywh") > 0.5, world


@pytest.mark.parametrize("count, bad", [(400, 3), (60, 2), (1, 1)])
def test_a_few_bad_rows_decide_nothing(count, bad):
    """Ear-centred x,y,width,height, of which some rows are nonsense that only corners could hold."""
    draw = np.random.default_rng(5)
    corners, sizes = square_crops(draw, np.ones((count, 2)))
    numbers = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    numbers[:bad] = np.concatenate([sizes[:bad] * 0.6, sizes[:bad] * 0.9], axis=1)
    assert judge(numbers, sizes).order in (None, "xywh")


def test_whole_images_are_the_same_in_both_orders():
    sizes = SIZES[[0, 1, 2]]
    found = judge(np.concatenate([np.zeros((3, 2)), sizes], axis=1), sizes)
    assert found.order == "xyxy" and not found.differ


def photos(folder, count=40, seed=3) -> tuple[np.ndarray, np.ndarray]:
    """`count` images with an ear-like box each, small in large."""
    draw = np.random.default_rng(seed)
    corners, sizes = small_in_large(draw, SIZES[draw.integers(4, 6, count)])
    for i, (width, height) in enumerate(sizes.astype(int)):
        Image.new("RGB", (width, height), (200, 190, 180)).save(folder / f"{i:03}.png")
    return np.round(corners), sizes


def save(path, numbers, **more):
    names = [f"{i:03}.png" for i in range(len(numbers))]
    np.save(path, np.array({"image_paths": names, "bboxes": numbers, **more}, dtype=object))
    return path


def as_sizes(corners) -> np.ndarray:
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def test_the_decision_is_printed_with_its_numbers(tmp_path, earteach):
    corners, _ = photos(tmp_path)
    source = save(tmp_path / "list.npy", as_sizes(corners))
    said = earteach("validate-data", source)
    assert said.code == 0, said.out
    assert re.search(
        r"list.npy: 40 with boxes \(x,y,width,height, inferred from the numbers: as x1,y1,x2,y2 \d+ of 40 boxes are impossible; "
        r"as x,y,width,height 0 of 40 boxes are impossible; if they are centres in pixels, "
        r"give --box-format cxcywh\), 0 whole images, 0 identities",
        said.err,
    )


def test_boxes_are_read_as_the_user_says_with_a_warning_if_unlikely(tmp_path, earteach):
    corners, _ = photos(tmp_path)
    source = save(tmp_path / "list.npy", as_sizes(corners))
    said = earteach("validate-data", source, "--box-format", "xyxy")
    assert said.code == 1 and "as x,y,width,height 0 of 40 boxes are impossible; is that order right?" in said.err
    assert b"(as x,y,width,height it would be valid)" in said.out
    assert earteach("validate-data", source, "--box-format", "xywh").code == 0
    assert earteach("validate-data", source, "--box-format", "yxyx").code == 2


def test_a_list_that_names_its_order_is_read_so_with_a_warning_if_unlikely(tmp_path):
    corners, _ = photos(tmp_path)
    source = save(tmp_path / "list.npy", as_sizes(corners), box_format="xyxy")
    manifest = read_manifest(source)
    assert np.allclose(list(manifest.boxes), as_sizes(corners)) and "is that order right?" in manifest.warnings[0]
    named = read_manifest(save(tmp_path / "b.npy", corners, box_format="xyxy"), reading=Reading(box_format="xywh"))
    assert np.allclose(list(named.boxes), corners) and "was not used" in named.warnings[0]


def test_an_order_that_cannot_be_determined_is_refused_with_an_image(tmp_path, monkeypatch, earteach):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    draw = np.random.default_rng(0)
    numbers = np.round(np.array([60, 40, 120, 150]) + draw.integers(-9, 9, (8, 4)))
    for i in range(8):
        Image.new("RGB", (300, 400), (200, 190, 180)).save(tmp_path / f"{i:03}.png")
    source = save(tmp_path / "list.npy", numbers)
    said = earteach("validate-data", source)
    assert said.code == 1 and b"its boxes can be x1,y1,x2,y2 or x,y,width,height" in said.out
    assert b"give --box-format (xyxy, xywh, cxcywh)" in said.out
    image = re.search(r"look at (\S+earteach-boxes-\S+.png)", said.out.decode())[1]
    with Image.open(image) as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert {(214, 40, 40), (0, 140, 70), (30, 80, 200)} <= colours
    assert earteach("embed", source, tmp_path / "x.npy").code == 1 and not (tmp_path / "x.npy").exists()


def test_shares_of_the_image_are_pixels_of_it(tmp_path):
    corners, sizes = photos(tmp_path)
    shares = corners / np.tile(sizes, 2)
    manifest = read_manifest(save(tmp_path / "list.npy", shares), reading=Reading(box_format="xyxy"))
    assert np.allclose(list(manifest.boxes), corners) and manifest.box_format == "xyxy relative"
    assert "as shares of the image" in manifest.how
    with pytest.raises(ManifestError, match="give --box-format"):  # x,y,width,height or centres: both are possible
        read_manifest(save(tmp_path / "list.npy", as_sizes(shares)))
    pixels = read_manifest(save(tmp_path / "list.npy", shares), reading=Reading("xyxy", "pixels"))
    assert np.allclose(list(pixels.boxes), shares)


def test_images_that_cannot_be_opened_are_warned_of(tmp_path):
    numbers = np.round(np.array([60, 40, 120, 150]) + np.random.default_rng(0).integers(-9, 9, (8, 4)))
    manifest = read_manifest(save(tmp_path / "list.npy", numbers))
    assert "none of its images could be opened" in manifest.warnings[0]


def test_of_many_images_a_sample_is_opened(tmp_path, monkeypatch):
    from ear_teacher_cli.data import resolve_boxes as reader

    opened = []
    monkeypatch.setattr(reader, "_size", lambda path: opened.append(path) or (400.0, 400.0))
    draw = np.random.default_rng(1)
    numbers, _ = small_in_large(draw, np.full((5000, 2), 400.0))
    manifest = read_manifest(save(tmp_path / "list.npy", as_sizes(np.round(numbers))))
    assert len(opened) == len(set(opened)) == 400
    assert "judged from 400 of 5000 boxes" in manifest.how and manifest.box_format == "xywh"


def test_boxes_that_would_be_wider_than_high_are_not_taken(tmp_path):
    """y1,x1,y2,x2, which no column and no option can name."""
    corners, _ = photos(tmp_path)
    with pytest.raises(ManifestError, match="give --box-format"):
        read_manifest(save(tmp_path / "list.npy", corners[:, [1, 0, 3, 2]]))


def test_centres_in_pixels_are_not_taken_for_corners_where_the_numbers_show_it(tmp_path):
    draw = np.random.default_rng(4)
    sizes = np.full((60, 2), 400.0)
    size = ears_of(draw.uniform(60, 160, 60), draw)
    centres = size / 2 + draw.random((60, 2)) * (sizes - size)
    for i in range(60):
        Image.new("RGB", (400, 400)).save(tmp_path / f"{i:03}.png")
    source = save(tmp_path / "list.npy", np.concatenate([centres, size], axis=1))
    with pytest.raises(ManifestError, match="or centre x,centre y,width,height"):
        read_manifest(source)
    manifest = read_manifest(source, reading=Reading("cxcywh"))
    assert np.allclose(list(manifest.boxes), np.concatenate([centres - size / 2, centres + size / 2], axis=1))

"""Columns of a manifest: texts in blocks, boxes in one array, and the memory that a row takes."""

import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ear_teacher_cli.data import texts
from ear_teacher_cli.data.boxes import Boxes
from ear_teacher_cli.data.manifest import Manifest, read_manifest
from ear_teacher_cli.data.texts import Texts

ROWS = 30_000
ANY_TEXTS = st.lists(st.text(st.characters(exclude_categories=()), max_size=4), max_size=20)  # with lone surrogates
BLOCKS = st.sampled_from((1, 3, 4096))
ANY_TIME = settings(deadline=None)
NUMBERS = st.floats(allow_nan=False)
ANY_BOXES = st.lists(st.none() | st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=12)


def sent(column):
    """What another process receives."""
    near, far = Pipe()
    with near, far, ThreadPoolExecutor(1) as sender:
        sender.submit(near.send, column)
        return far.recv()


@ANY_TIME
@given(ANY_TEXTS, BLOCKS)
@example(["a", "ä", "\udce4", "\ud83d\ude00", "\U0001f600", "", "a\0b"], 3)
@example(["x"] * 150 + ["é"] * 150, 100)
def test_texts_are_a_list_of_str(words, block):
    with patch.object(texts, "_BLOCK", block):
        column = Texts(words)
        assert list(column) == words and column == words and words == column and len(column) == len(words)
        assert [column[i] for i in range(-len(words), len(words))] == words * 2
        assert column[1:-1] == words[1:-1] and column[::-2] == words[::-2]
        assert column[:] == words and bool(column) == bool(words) and any(column) == any(words)
        assert sent(column) == column == Texts(words) and Texts.of(column) is column
        assert column != [*words, ""] and column != Texts([*words, ""]) and column != ["other", *words[1:]]
        with pytest.raises(IndexError):
            column[len(words)]


@ANY_TIME
@given(ANY_TEXTS, BLOCKS)
def test_equal_texts_are_grouped_by_their_first_position(words, block):
    groups = [[i for i, word in enumerate(words) if word == one] for one in dict.fromkeys(words)]
    with patch.object(texts, "_BLOCK", block):
        assert Texts(words).firsts().tolist() == [words.index(word) for word in words]
        assert list(Texts(words).groups()) == groups


def test_texts_of_equal_hashes_are_told_apart(monkeypatch):
    monkeypatch.setattr(texts, "hash", len, raising=False)
    assert Texts(["ab", "cd", "e", "cd", "ab"]).firsts().tolist() == [0, 1, 2, 1, 0]


@ANY_TIME
@given(ANY_BOXES, st.data())
def test_boxes_are_a_list_of_tuples(boxes, data):
    column = Boxes(boxes)
    assert list(column) == boxes and column == boxes and boxes == column and column != [*boxes, None]
    assert column.given.tolist() == [box is not None for box in boxes]
    assert [tuple(row) for row in column.numbers.tolist()] == [box or (0.0,) * 4 for box in boxes]
    rows = data.draw(st.lists(st.integers(0, len(boxes) - 1), max_size=5)) if boxes else []
    chosen = column.subset(np.array(rows, dtype=int))
    chosen.append((1.0, 2.0, 3.0, 4.0))
    assert sent(chosen) == [*(boxes[row] for row in rows), (1.0, 2.0, 3.0, 4.0)]
    turned = column.converted(lambda rows, numbers: np.column_stack([numbers[:, ::-1][:, :3], rows]))
    assert turned == [box and (*box[:0:-1], float(i)) for i, box in enumerate(boxes)] and column == boxes


def manifest_of(paths, **columns):
    return Manifest("x.csv", None, paths, [None] * len(paths), range(len(paths)), **columns)


@ANY_TIME
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("pq ")), min_size=1, max_size=8), st.data())
def test_subsets_and_whole_images_are_those_of_lists(rows, data):
    paths, people = [path for path, _ in rows], [person.strip() for _, person in rows]
    manifest = manifest_of(paths, identities=people)
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    for chosen in (indices, iter(indices), np.array(indices, dtype=int)):
        part = manifest.subset(chosen)
        assert part.paths == [paths[i] for i in indices] and part.identities == [people[i] for i in indices]
        assert list(part.rows) == indices and all(type(row) is int for row in part.rows) and part.sides is None
    of_image = {path: {person for other, person in zip(paths, people, strict=True) if other == path} for path in paths}
    whole = manifest.of_whole_images()
    assert whole.paths == list(of_image)
    assert whole.identities == [found.pop() if len(found) == 1 else "" for found in of_image.values()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A list of ROWS ears of two boxes per image, with paths of 38 characters."""
    path = tmp_path_factory.mktemp("lists") / "many.csv"
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_path,x1,y1,x2,y2,identity,side\n")
        for i in range(ROWS):
            name = f"photos/p{i // 10:07d}/{i // 2:010d}_session.jpg"
            file.write(f"{name},{i}.5,20.25,{i + 100}.5,140.25,p{i // 10:07d},{'left' if i % 2 else 'right'}\n")
    return path


def test_memory_per_row_is_bounded_in_every_process(source):
    read_manifest(source)  # imports, and caches of the libraries
    tracemalloc.start()
    try:
        manifest = read_manifest(source)
        held, peak = (size / ROWS for size in tracemalloc.get_traced_memory())
        received = sent(manifest)
        again = tracemalloc.get_traced_memory()[0] / ROWS - held
    finally:
        tracemalloc.stop()
    assert received == manifest and received.rows == range(ROWS)
    assert manifest.where(ROWS - 1).startswith(f"many.csv row {ROWS - 1} (photos/p")
    assert held < 120 and again < 120 and peak < 220  # bytes; as lists of str 264, 264 and 385
    assert len(pickle.dumps((manifest.rows, manifest.sides))) / ROWS < 10

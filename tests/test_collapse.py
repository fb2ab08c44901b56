"""Figures of collapse on embeddings of known shape, and the verdict."""

import pytest
import torch

from ear_teacher_cli.quality import collapse
from ear_teacher_cli.quality.collapse import Health, degraded, health, judge, judged_rows, retrieval, verdict


def normal(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def test_embeddings_all_over_the_sphere_are_healthy():
    found = health(normal(2000, 32))
    assert found.spread == pytest.approx(1, abs=0.01)
    assert 30 < found.effective_rank <= 32
    assert found.abs_cosine == pytest.approx((2 / (3.14159 * 32)) ** 0.5, rel=0.05)


def test_effective_rank_counts_directions():
    found = health(normal(500, 4) @ normal(4, 64, 1))
    assert 3 < found.effective_rank <= 4


def test_one_direction_is_a_collapse():
    point, jitter = torch.ones(1, 64), normal(200, 64)
    found = health(point + 1e-3 * jitter)
    assert found.spread < 0.01
    line = health(torch.linspace(-1, 1, 200)[:, None] * normal(1, 64))
    assert line.effective_rank == pytest.approx(1, abs=0.01) and line.abs_cosine == pytest.approx(1, abs=0.01)
    assert health(torch.ones(10, 8)).spread == pytest.approx(0, abs=1e-6)


def test_the_verdict_names_the_figure_that_fell():
    start = Health(0.6, 200.0, 0.1)
    assert verdict(Health(0.55, 180.0, 0.12), start) is None
    assert verdict(Health(0.1, 180.0, 0.12), start) == "spread 0.1 of 0.6 before training"
    assert "effective rank 20 of 200" in verdict(Health(0.1, 20.0, 0.9), start)


def test_a_fall_of_retrieval_counts_beyond_chance():
    assert degraded(51.25, 62.75, 400) == "retrieval 51.2 % of 62.8 % before training"
    assert degraded(9.0, 11.0, 400) is None and degraded(4.2, 6.2, 48) is None
    assert degraded(75.0, 11.0, 400) is None


def test_what_finds_images_better_than_its_start_has_not_collapsed():
    start = {"spread": 0.54, "effective_rank": 34.0, "abs_cosine": 0.3, "retrieval": 4.2}
    fewer = start | {"effective_rank": 12.0}
    assert judge(fewer, start, 48) == ("COLLAPSED", "effective rank 12 of 34 before training")
    assert judge(fewer | {"retrieval": 12.5}, start, 48)[0] == "COLLAPSED"  # of 48 images that is chance
    assert judge(fewer | {"retrieval": 29.2}, start, 48) == ("in order", "")
    assert judge(start | {"retrieval": 60.0}, start | {"retrieval": 90.0}, 400)[0] == "DEGRADED"
    assert judge({"retrieval": 3.0}, start, 48) == ("", "")


def test_of_many_images_whole_people_are_judged(monkeypatch):

    monkeypatch.setattr(collapse, "JUDGED_ON", 100)
    assert judged_rows([None] * 80) == list(range(80))
    assert judged_rows([None] * 1000)[::99] == [0, 999] and len(judged_rows([""] * 1000)) == 100
    people = [f"p{row // 10}" for row in range(1000)]  # ten images each, in order
    rows = judged_rows(people)
    assert 90 <= len(rows) <= 100 and rows == sorted(rows)
    assert {sum(people[row] == person for row in rows) for person in {people[row] for row in rows}} == {10}
    assert len(judged_rows(["one"] * 1000)) == 100


def test_retrieval_finds_a_image_from_its_own_view():
    rows = normal(50, 16)
    assert retrieval(rows, 3 * rows + 0.01) == 100
    assert retrieval(rows, rows.roll(1, 0)) == 0

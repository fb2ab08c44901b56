"""The learning rate, against values worked out by hand."""

import pytest

from ear_teacher_cli.training.optimisation import rate_at


def test_warmup_starts_above_zero_and_reaches_the_peak():
    assert [rate_at(step, 4, 12) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_halfway_is_half_and_the_end_is_near_zero():
    assert rate_at(8, 4, 12) == pytest.approx(0.5)  # t = 4/8
    assert rate_at(6, 4, 12) == pytest.approx(0.8535534)  # t = 1/4: (1 + cos 45 degrees) / 2
    assert 0 < rate_at(11, 4, 12) < 0.05
    assert rate_at(12, 4, 12) == pytest.approx(0.0)


def test_without_warmup_the_first_step_is_the_peak():
    assert rate_at(0, 0, 10) == 1.0


def test_never_rises_after_the_warmup_and_never_leaves_0_to_1():
    rates = [rate_at(step, 10, 100) for step in range(100)]
    assert all(0 < rate <= 1 for rate in rates)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))

"""Losses against formulas computed by hand with the math module."""

import math

import pytest
import torch

from ear_teacher_cli.config import METRIC_LOSSES
from ear_teacher_cli.training.losses import (
    LOGITS,
    arcface_logits,
    cosface_logits,
    cosines,
    margin_at,
    metric_loss,
    psnr,
)


def test_arcface_is_cos_of_theta_plus_margin():
    cosine = torch.tensor([[0.6, -0.2, 0.1], [0.3, 0.9, -0.5]])
    got = arcface_logits(cosine, torch.tensor([0, 1]), margin=0.5, scale=64.0)
    assert got[0, 0].item() == pytest.approx(64 * math.cos(math.acos(0.6) + 0.5), abs=1e-4)
    assert got[1, 1].item() == pytest.approx(64 * math.cos(math.acos(0.9) + 0.5), abs=1e-4)
    assert got[0, 1].item() == pytest.approx(64 * -0.2, abs=1e-4)
    assert got[1, 2].item() == pytest.approx(64 * -0.5, abs=1e-4)


def test_arcface_stays_monotone_beyond_pi_minus_margin():
    cosine = torch.linspace(-1, 1, 2001)[:, None]
    logits = arcface_logits(cosine, torch.zeros(2001, dtype=torch.int64), margin=0.5, scale=1.0)[:, 0]
    assert (logits.diff() > 0).all()
    # at theta = pi the straight line: cos(pi) - margin sin(margin)
    assert logits[0].item() == pytest.approx(-1 - 0.5 * math.sin(0.5), abs=1e-4)


def test_cosface_subtracts_the_margin_from_the_cosine():
    got = cosface_logits(torch.tensor([[0.6, -0.2]]), torch.tensor([0]), margin=0.35, scale=30.0)
    assert got.tolist()[0] == pytest.approx([30 * (0.6 - 0.35), 30 * -0.2], abs=1e-4)


@pytest.mark.parametrize("kind", ["arcface", "cosface"])
def test_loss_is_cross_entropy_of_the_margin_logits(kind):
    features, prototypes = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # cosines 0.6 and 0.8, label 1
    own = math.cos(math.acos(0.8) + 0.3) if kind == "arcface" else 0.8 - 0.3
    expected = -(10 * own - math.log(math.exp(10 * own) + math.exp(10 * 0.6)))
    got = metric_loss(kind, features, prototypes, torch.tensor([1]), margin=0.3, scale=10.0)
    assert got.item() == pytest.approx(expected, abs=1e-5)


def test_every_metric_loss_is_an_option_with_a_margin():
    assert set(METRIC_LOSSES) == {*LOGITS, "none"}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", LOGITS)
def test_no_nan_where_a_feature_lies_on_its_prototype(kind, sign):
    prototypes = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
    features = (sign * prototypes.clone()).requires_grad_()
    prototypes.requires_grad_()
    loss = metric_loss(kind, features, prototypes, torch.arange(5), margin=0.5, scale=64.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all() and torch.isfinite(prototypes.grad).all()


def test_angles_are_float32_under_autocast():
    features, prototypes = torch.randn(4, 8), torch.randn(3, 8)
    labels = torch.tensor([0, 1, 2, 0])
    plain = metric_loss("arcface", features, prototypes, labels, 0.5, 64.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = metric_loss("arcface", features, prototypes, labels, 0.5, 64.0)
    assert mixed.dtype == torch.float32 and mixed.item() == plain.item()


def test_cosines_of_half_precision_features_are_float32():
    assert cosines(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4)).dtype == torch.float32


def test_margin_grows_in_equal_steps():
    assert [margin_at(epoch, 0.5, 5) for epoch in range(7)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert margin_at(0, 0.5, 0) == 0.5


def test_psnr_on_minus_one_to_one():
    assert psnr(torch.tensor(0.04)).item() == pytest.approx(20.0, abs=1e-5)  # 10 log10(4 / 0.04)

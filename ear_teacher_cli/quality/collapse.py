"""Detect collapsed or degraded embeddings: metrics of their spread and rank, compared with the pretrained baseline.

All metrics are of embeddings of clean validation images in evaluation mode. M images, D dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

# Shares of the baseline below which a metric counts as fallen. Recipes that learn stay above (0.6 and 0.8 in
# examples/study/README.md).
FALLEN_SPREAD = 0.25
FALLEN_RANK = 0.5
# Standard errors of the difference of two proportions that a change of `retrieval` must exceed to be significant.
FALLEN_RETRIEVAL = 3
# Most images that are measured: comparing all pairs of a large validation set would take longer than training.
JUDGED_ON = 4096


@dataclass(frozen=True)
class Health:
    """Spread and rank of unit embeddings.

    `spread`: standard deviation of their coordinates times sqrt(D): 1 if uniform on the sphere, 0 if all are equal.
    `effective_rank`: exponential of the entropy of the singular values of the centred embeddings, in [1, min(M, D)]
    (RankMe, Garrido et al. 2023, eq. 1). `abs_cosine`: mean absolute cosine of two centred embeddings, in [0, 1]; 1 if
    they lie on one line.
    """

    spread: float
    effective_rank: float
    abs_cosine: float


def health(embeddings: torch.Tensor) -> Health:
    """Measure embeddings M,D of any norm; M at least 2."""
    unit = F.normalize(embeddings.double(), dim=1)
    about = unit - unit.mean(0)
    singular = torch.linalg.svdvals(about)
    shares = singular / singular.sum().clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    directions = F.normalize(about, dim=1)
    cosine = (directions @ directions.T).abs()
    others = len(unit) * (len(unit) - 1)
    return Health(
        spread=float(about.square().sum(1).mean().sqrt()),
        effective_rank=float(entropy.exp()),
        abs_cosine=float((cosine.sum() - cosine.diagonal().sum()) / others),
    )


def judge(now: Mapping[str, float], start: Mapping[str, float], images: int) -> tuple[str, str]:
    """Return (state, reason) of metrics `now` against the baseline's: `in order`, `COLLAPSED` or `DEGRADED`.

    `now`, `start`: metric name -> value, those of Health and `retrieval`, measured on `images` images. COLLAPSED: spread
    or effective rank has fallen, and retrieval has not risen significantly. DEGRADED: retrieval has fallen
    significantly. Both are empty if a metric is missing; the reason is empty if the state is `in order`.
    """
    needed = {"retrieval", *(spec.name for spec in fields(Health))}
    if not images or not needed <= now.keys() or not needed <= start.keys():
        return "", ""
    states = (Health(*(figures[spec.name] for spec in fields(Health))) for figures in (now, start))
    # random features have a high rank and low retrieval: a lower rank with better retrieval is no collapse
    better = now["retrieval"] - start["retrieval"] > _chance(start["retrieval"], images)
    if (fallen := verdict(*states)) and not better:
        return "COLLAPSED", fallen
    if lost := degraded(now["retrieval"], start["retrieval"], images):
        return "DEGRADED", lost
    return "in order", ""


def judged_rows(people: Sequence[Any]) -> list[int]:
    """Choose at most JUDGED_ON of N rows, evenly spaced.

    `people`: who is on each row, None or '' where unknown. Where people are known, all rows of a person are chosen or
    none, because single rows would leave no identity with two images.
    """
    if len(people) <= JUDGED_ON:
        return list(range(len(people)))
    evenly = torch.linspace(0, len(people) - 1, JUDGED_ON).round().long().tolist()
    if not any(people):
        return evenly
    rows_of: dict[Any, list[int]] = {}
    for row, person in enumerate(people):
        rows_of.setdefault(person or row, []).append(row)
    groups = list(rows_of.values())
    chosen: list[int] = []
    several = max(1, JUDGED_ON * len(groups) // len(people))
    for place in torch.linspace(0, len(groups) - 1, several).round().long().unique().tolist():
        if len(chosen) + len(groups[place]) <= JUDGED_ON:
            chosen += groups[place]
    return sorted(chosen) or evenly  # all rows are of one person


def verdict(now: Health, start: Health) -> str | None:
    """Return which of spread and effective rank fell below its share of the baseline, and how far; None if neither."""
    fallen = [
        f"{word} {value:.3g} of {before:.3g} before training"
        for word, value, before, share in (
            ("spread", now.spread, start.spread, FALLEN_SPREAD),
            ("effective rank", now.effective_rank, start.effective_rank, FALLEN_RANK),
        )
        if value < share * before
    ]
    return " and ".join(fallen) or None


def degraded(now: float, start: float, images: int) -> str | None:
    """Return how far `retrieval` (percent of `images` images) fell; None unless the fall is significant.

    Embeddings can keep their spread and rank and still lose their content, for example by training on random labels.
    """
    fell = start - now > _chance(start, images)
    return f"retrieval {now:.1f} % of {start:.1f} % before training" if fell else None


def _chance(start: float, images: int) -> float:
    """Return the change of a share (percent of `images` images) that is not significant, in percentage points."""
    return FALLEN_RETRIEVAL * math.sqrt(2 * max(start * (100 - start), 100) / images)


def retrieval(embeddings: torch.Tensor, views: torch.Tensor) -> float:
    """Return the percentage of M images whose own augmented view is the nearest of all M views (cosine).

    `embeddings`, `views`: M,D. By chance 100 / M.
    """
    nearest = (F.normalize(embeddings.float(), dim=1) @ F.normalize(views.float(), dim=1).T).argmax(1)
    return 100 * float((nearest == torch.arange(len(nearest), device=nearest.device)).float().mean())

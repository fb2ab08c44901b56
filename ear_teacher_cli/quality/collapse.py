"""Is the teacher still telling ears apart? Figures of collapse, and a plain verdict.

All are of the validation images' embeddings, clean, in evaluation mode. M images, D numbers each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

# Shares of the untouched start below which a figure counts as fallen. A recipe that learns moves them less (to 0.6 and
# 0.8 in examples/study/README.md).
FALLEN_SPREAD = 0.25
FALLEN_RANK = 0.5
# Standard errors of a difference of two shares that a change of `retrieval` must exceed, not to be taken for chance.
FALLEN_RETRIEVAL = 3
# Images, evenly spaced, that all this is measured on: comparing all pairs of a large validation set would cost more
# than training.
JUDGED_ON = 4096


@dataclass(frozen=True)
class Health:
    """`spread`: standard deviation of the unit embeddings' numbers, times sqrt(D): 1 on the whole sphere, 0 when all
    are one. `effective_rank`: how many directions carry them (RankMe, Garrido et al. 2023, eq. 1), of the embeddings
    about their mean, in [1, min(M, D)]. `abs_cosine`: mean absolute cosine of two embeddings about their mean, in
    [0, 1]; 1 when they lie on one line."""

    spread: float
    effective_rank: float
    abs_cosine: float


def health(embeddings: torch.Tensor) -> Health:
    """M,D of any length -> figures. M at least 2."""
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
    """(`in order`, `COLLAPSED` or `DEGRADED`; why, if it is a bad one) of figures by their names, those of Health and
    `retrieval`, measured on so many images. Both are empty where they could not be measured.

    COLLAPSED: spread or effective rank has fallen, and retrieval has not risen beyond chance. DEGRADED: retrieval has
    fallen beyond chance."""
    needed = {"retrieval", *(spec.name for spec in fields(Health))}
    if not images or not needed <= now.keys() or not needed <= start.keys():
        return "", ""
    states = (Health(*(figures[spec.name] for spec in fields(Health))) for figures in (now, start))
    # random features use many directions and say little: what finds images again better than they has not collapsed
    better = now["retrieval"] - start["retrieval"] > _chance(start["retrieval"], images)
    if (fallen := verdict(*states)) and not better:
        return "COLLAPSED", fallen
    if lost := degraded(now["retrieval"], start["retrieval"], images):
        return "DEGRADED", lost
    return "in order", ""


def judged_rows(people: Sequence[Any]) -> list[int]:
    """At most JUDGED_ON of N rows, evenly spaced; where they say who is on them (else None or ''), whole people: a row
    here and there of a list in order would leave nobody with two images."""
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
    return sorted(chosen) or evenly  # of one person


def verdict(now: Health, start: Health) -> str | None:
    """What fell, and how far, against the untouched start; None when the embeddings are in order."""
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
    """What `retrieval` (percent, of so many images) fell to; None unless it fell by more than chance. Embeddings may
    stay spread out and yet forget what they were of: labels that mean nothing do that to a pretrained backbone."""
    fell = start - now > _chance(start, images)
    return f"retrieval {now:.1f} % of {start:.1f} % before training" if fell else None


def _chance(start: float, images: int) -> float:
    """Points by which a share (percent, of so many images) may differ from the start's without a reason."""
    return FALLEN_RETRIEVAL * math.sqrt(2 * max(start * (100 - start), 100) / images)


def retrieval(embeddings: torch.Tensor, views: torch.Tensor) -> float:
    """Share of M images whose own augmented view is nearer (by cosine) than that of any other. M,D each; in
    percent. By chance 100 / M."""
    nearest = (F.normalize(embeddings.float(), dim=1) @ F.normalize(views.float(), dim=1).T).argmax(1)
    return 100 * float((nearest == torch.arange(len(nearest), device=nearest.device)).float().mean())

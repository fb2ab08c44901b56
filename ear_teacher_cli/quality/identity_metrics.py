"""Identity metrics of embeddings, with confidence intervals. Does not import torch.

Identification: leave-one-out, each image is the query once and all others are the gallery. Rank-k (CMC) is the share of queries with a match among
the k nearest; mAP@R is Musgrave, Belongie and Lim, "A Metric Learning Reality Check" (ECCV 2020), section 3.2. An
impostor at the same distance as a match is ranked before it. Images without a match are in the gallery only.

Verification: all pairs. AUC, EER and TAR at a FAR are read from one ROC curve, linear between its points.

Intervals are percentiles of a bootstrap over people (both ears of a person are drawn together). A resample draws as
many people as there are, with replacement. A person drawn w times has weight w: queries and genuine pairs have weight w,
an impostor pair of people drawn v and w times has weight v*w, pairs of a person with its own copy have weight 0 (Bolle,
Ratha and Pankanti, "Error analysis of pattern recognition systems: the subsets bootstrap", CVIU 2004; Snijders and
Borgatti, "Non-parametric standard errors and tests for network statistics", Connections 1999). The gallery of rank-k
and mAP@R is not resampled. More than pairs.MAX_GROUPS people are divided at random into that many groups, and groups
are drawn (Wolter, "Introduction to Variance Estimation", 2007, chapter 2).

R resamples     G groups     C coarse bins
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EarTeachError
from .pairs import CMC_DEPTH, Order, Side, Tally, arrange, coarse_bins, tally

RANKS = (1, 5)
FARS = (1e-2, 1e-3, 1e-4)
# Doddington's rule of 30: to know an error rate within 30 % of itself (with 90 % confidence), see at least 30 errors
# (Doddington et al., "The NIST speaker recognition evaluation", Speech Communication 2000).
FALSE_ACCEPTS = 30
SAME_SIDE, CROSS_SIDE = "same side", "cross side"


@dataclass(frozen=True)
class Figure:
    """A metric from 0 to 1 and its 95 % interval (NaN without a bootstrap)."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """Metrics of one file of embeddings. `draws`: the R bootstrap values of each metric, for paired differences."""

    figures: list[Figure]
    draws: dict[str, np.ndarray]
    cmc: np.ndarray  # [CMC_DEPTH, 3]: value, low, high of rank 1, 2, ...
    tally: Tally

    def figure(self, name: str) -> Figure:
        """Return the metric called `name`."""
        return next(figure for figure in self.figures if figure.name == name)


def rank1_and_eer(embeddings: np.ndarray, identities: Sequence[str]) -> tuple[float, float]:
    """Return leave-one-out rank-1 and all-pairs EER, both 0 to 1, of embeddings [N, D] of any norm and N names.

    Duplicates are not removed. Equal embeddings give rank-1 0 and EER 0.5. Raises EarTeachError if a row is not
    finite, if all rows are of one identity, or if no identity has two images.
    """
    order = arrange(identities)
    rows = np.asarray(embeddings, dtype=np.float32)[order.index]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise EarTeachError(
            f"embeddings row {int(order.index[~np.isfinite(norms[:, 0])].min())}: holds NaN or infinity; the model has diverged"
        )
    side = Side(rows / np.maximum(norms, 1e-12), order.ear, np.zeros(len(rows), np.int64))
    counted = tally(side, side, 1, None)
    check_population(order, counted)
    return float(np.mean(counted.first == 1)), float(eer(*roc(counted.genuine, counted.impostor)))


def can_be_scored(identities: Sequence[Any]) -> bool:
    """Return whether there are two identities or more, one of them with two images or more."""
    return 1 < len(set(identities)) < len(identities)


def check_population(order: Order, counted: Tally) -> None:
    """Raise EarTeachError if all rows are of one identity, or if no identity has two rows."""
    if order.ear[0] == order.ear[-1]:
        raise EarTeachError("labels: all images are of one identity; evaluate images of two identities or more")
    if not len(counted.first):
        raise EarTeachError(
            "labels: no identity has two different images; evaluate images with two or more of an identity"
        )


def measure(rows: np.ndarray, order: Order, fars: Iterable[float], weights: np.ndarray | None) -> Measured:
    """Compute all metrics of unit rows float32 [N, D] that are in `order`; `weights` from `resamples`, or None.

    Where sides are known, each ear is an identity (a person's other ear is an impostor). Metrics within a side (left
    among left, right among right) follow with the prefix 'same side'; metrics across sides (left among right and right
    among left, where the match is the person's other ear) with the prefix 'cross side'.
    """
    ears = Side(rows, order.ear, order.group)
    coarse = None if weights is None else coarse_bins(ears)
    whole = tally(ears, ears, order.groups, coarse)
    check_population(order, whole)
    parts: list[tuple[str, Tally, tuple[float, ...], tuple[int, ...]]] = [("", whole, tuple(fars), RANKS)]
    if order.lefts is not None and 0 < order.lefts < len(rows):
        people = Side(rows, order.person, order.group)
        left, right = people[: order.lefts], people[order.lefts :]
        same = tally(left, left, order.groups, coarse) + tally(right, right, order.groups, coarse)
        cross = tally(left, right, order.groups, coarse) + tally(right, left, order.groups, coarse)
        parts += [(f"{SAME_SIDE} ", same, (), (1,)), (f"{CROSS_SIDE} ", cross, (), (1,))]
    figures: list[Figure] = []
    draws: dict[str, np.ndarray] = {}
    for prefix, part, part_fars, ranks in parts:
        if not len(part.first) or not part.impostor.any():
            continue
        drawn = _draws(part, part_fars, ranks, weights)
        for name, value in _points(part, part_fars, ranks).items():
            figures.append(Figure(prefix + name, value, *interval(drawn.get(name))))
        draws |= {prefix + name: values for name, values in drawn.items()}
    return Measured(figures, draws, _cmc(whole, weights), whole)


def resamples(groups: int, count: int, seed: int) -> np.ndarray | None:
    """Draw `count` resamples of the groups: how often each is drawn, int64 [R, G]; None for a count of 0."""
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=count) if count else None


def interval(draws: np.ndarray | None) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the draws, without the resamples that hold no pair (NaN)."""
    if draws is None or np.isnan(draws).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def impostor_pairs(order: Order) -> int:
    """Count the unordered pairs of rows of different identities (ears, where sides are known)."""
    each = np.bincount(order.ear).astype(object)  # Python integers: the squares can exceed int64
    return int((len(order.ear) ** 2 - (each * each).sum()) // 2)


def genuine_pairs(order: Order) -> int:
    """Count the unordered pairs of rows of the same identity (ear, where sides are known)."""
    each = np.bincount(order.ear).astype(object)
    return int((each * (each - 1)).sum() // 2)


def smallest_far(pairs: int) -> float:
    """Return the smallest FAR that `pairs` impostor pairs can estimate: FALSE_ACCEPTS of them accepted."""
    return FALSE_ACCEPTS / max(1, pairs)


def roc(genuine: np.ndarray, impostor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return FAR and TAR [..., C + 1], from (0, 0) to (1, 1), of histograms [..., C] that start at the nearest pairs.

    NaN where a histogram is empty.
    """
    curves = []
    for histogram in (impostor, genuine):
        sums = np.cumsum(histogram, axis=-1, dtype=np.float64)
        sums = np.concatenate([np.zeros_like(sums[..., :1]), sums], axis=-1)
        total = sums[..., -1:]
        curves.append(sums / np.where(total > 0, total, np.nan))
    return curves[0], curves[1]


def auc(far: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """Return the area under the ROC: P(a genuine pair is nearer than an impostor pair), ties counting half."""
    return (np.diff(far) * (tar[..., 1:] + tar[..., :-1]) / 2).sum(-1)


def eer(far: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """Return the equal error rate: the FAR at which FAR = 1 - TAR."""
    gap = far + tar - 1  # ascends from -1 to 1
    after = np.maximum(1, (gap >= 0).argmax(-1))[..., None]

    def at(curve, index):
        return np.take_along_axis(curve, index, -1)[..., 0]

    step = at(gap, after) - at(gap, after - 1)
    share = -at(gap, after - 1) / np.where(step > 0, step, np.nan)
    return at(far, after - 1) + share * (at(far, after) - at(far, after - 1))


def tar_at(far: np.ndarray, tar: np.ndarray, wanted: float) -> np.ndarray:
    """Return the TAR at the FAR `wanted`, above 0; NaN where the ROC is NaN."""
    flat_far, flat_tar = far.reshape(-1, far.shape[-1]), tar.reshape(-1, far.shape[-1])
    found = [np.interp(wanted, f, t) if np.isfinite(f[-1]) else np.nan for f, t in zip(flat_far, flat_tar, strict=True)]
    return np.array(found).reshape(far.shape[:-1])


def _points(part: Tally, fars: Iterable[float], ranks: Iterable[int]) -> dict[str, float]:
    curve = roc(part.genuine, part.impostor)
    values: dict[str, Any] = {f"rank-{k}": np.mean(part.first <= k) for k in ranks}
    values |= {"mAP@R": part.precision.mean(), "AUC": auc(*curve), "EER": eer(*curve)}
    return {name: float(value) for name, value in (values | _tars(curve, fars)).items()}


def _draws(
    part: Tally, fars: Iterable[float], ranks: Iterable[int], weights: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return the R bootstrap values of each metric."""
    if weights is None:
        return {}
    values = {f"rank-{k}": _weighted_mean(part, part.first <= k, weights) for k in ranks}
    values["mAP@R"] = _weighted_mean(part, part.precision, weights)
    curve = roc(*_weighted_histograms(part, weights))
    return values | {"AUC": auc(*curve), "EER": eer(*curve)} | _tars(curve, fars)


def _tars(curve: tuple[np.ndarray, np.ndarray], fars: Iterable[float]) -> dict[str, np.ndarray]:
    return {f"TAR@FAR={far:g}": tar_at(*curve, far) for far in fars}


def _weighted_mean(part: Tally, of_query: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return means [R] or [R, K] of query values [Q] or [Q, K], each query weighted by how often its group was drawn."""
    sums = np.zeros((weights.shape[1], *of_query.shape[1:]))
    np.add.at(sums, part.group, of_query)
    count = weights @ np.bincount(part.group, minlength=weights.shape[1])
    count = np.where(count > 0, count, np.nan)
    return (weights @ sums) / (count[:, None] if of_query.ndim > 1 else count)


def _weighted_histograms(part: Tally, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the genuine and impostor histograms [R, C] of every resample.

    Impostor pairs of groups g and h count w_g w_h times, those within a group w_g times.
    """
    assert part.genuine_of is not None and part.impostor_of is not None  # counted when there are weights
    weights = weights.astype(np.float64)
    impostor = np.zeros((len(weights), part.genuine_of.shape[1]))
    for group, of_group in enumerate(part.impostor_of):  # G,C
        factors = weights.copy()
        factors[:, group] = 1
        impostor += weights[:, group, None] * (factors @ of_group)
    return weights @ part.genuine_of, impostor


def _cmc(part: Tally, weights: np.ndarray | None) -> np.ndarray:
    hits = part.first[:, None] <= np.arange(1, CMC_DEPTH + 1)  # Q,K
    draws = None if weights is None else _weighted_mean(part, hits, weights)
    bounds = [interval(None if draws is None else draws[:, k]) for k in range(CMC_DEPTH)]
    return np.column_stack([hits.mean(0), bounds])

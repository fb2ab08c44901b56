"""Determine the order of a list's boxes if the list does not name it: x1,y1,x2,y2 or x,y,width,height.

The original package documents corners and writes x,y,width,height; a list read in the wrong order gives wrong crops
without an error. `judge` compares all boxes with the sizes of their images, and decides or abstains. Two kinds of
evidence:

1. Impossible boxes. Read as corners, x,y,width,height is inverted wherever width < x. Read as x,y,width,height, corners
   leave the image wherever the centre of the box lies right of, or below, that of the image.
2. If all boxes are possible in both orders: in the right order the position of a box (its centre) and its size vary
   independently; in the wrong one they are correlated, since x2 = x + width. Both orders are linear maps of determinant
   1 of the same numbers, so their covariances have the same determinant. The product of the two variances equals that
   determinant exactly if centre and size are uncorrelated, and is larger otherwise (Hadamard's inequality): it is
   smaller in the right order. Half the number of boxes times the logarithm of the ratio of products is the
   log-likelihood ratio of two models with independent normal centre and size.

A single damaged row, or contradicting evidence, decides nothing: then the user must give the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .boxes import BOX_FORMATS, to_corners

_MARGIN = 1.0  # px: boxes that leave the image by more are impossible, as in crop.check_box_inside
# First kind of evidence: impossible boxes.
_MIN_IMPOSSIBLE = 5  # in the wrong order, at least
_DECISIVE = 10  # impossible boxes that decide even against the second kind of evidence
_MIN_IMPOSSIBLE_SHARE = 0.2  # of the boxes in the wrong order; the right order may have a tenth as many
_ASPECT_LIMITS = (0.85, 4.0)  # median height / width of boxes in the right order
# Second kind: correlation of centre and size.
_MIN_BOXES = 20  # distinct boxes for a meaningful correlation
_MIN_LOG_RATIO = 4.0  # log-likelihood ratio on each axis; e^8 for both axes together
_MAX_CORRELATION = 0.35  # in the chosen order
_MIN_CORRELATION = 0.7  # in the other order; or, if boxes are centred in their images along both axes in the chosen
# order only (medians, as shares of the image's side):
_MIN_CORRELATION_CENTRED, _CENTRED = 0.25, 0.025
_TYPICAL_ASPECTS = (1.1, 2.6)  # median height / width in the chosen order
# Boxes of x,y,width,height are all possible as corners only if they fill their images, which are then crops around an
# ear: the distance of the median centre from the image's, as a share of its side.
_MAX_OFF_CENTRE = 0.08
_MIN_DEVIATION = 0.004  # added to standard deviations, as a share of the image: equal boxes are no evidence


@dataclass(frozen=True)
class Judgement:
    """Result of `judge`."""

    order: str | None  # None: undecided
    reason: str  # the numbers, for messages
    boxes: int  # number of boxes that were judged
    impossible: dict[str, int]  # per order, number of impossible ones among them
    differ: bool = True  # False: all orders give the same boxes


def impossible(numbers: np.ndarray, sizes: np.ndarray, order: str, margin: float = _MARGIN) -> np.ndarray:
    """Return bool [N]: which boxes [N, 4], read in `order`, are inverted or leave images of `sizes` [N, 2] (NaN:
    unknown)."""
    corners = to_corners(numbers, order)
    with np.errstate(invalid="ignore"):
        inverted = ~((corners[:, 2:] > corners[:, :2]).all(axis=1))
        outside = (corners[:, :2] < -margin).any(axis=1) | (corners[:, 2:] > sizes + margin).any(axis=1)
    return np.asarray(inverted | outside)


def judge(numbers: np.ndarray, sizes: np.ndarray, orders: Sequence[str] = ("xyxy", "xywh")) -> Judgement:
    """Decide between `orders` for boxes [N, 4] in pixels of images of `sizes` [N, 2] (NaN: size unknown)."""
    corners = {order: to_corners(numbers, order) for order in orders}
    finite = np.isfinite(numbers).all(axis=1)
    first = corners[orders[0]]
    differ = finite & np.any([np.abs(corners[o] - first).max(axis=1) > _MARGIN for o in orders[1:]], axis=0)
    if not differ.any():
        return Judgement(orders[0], "every order gives the same boxes", len(numbers), dict.fromkeys(orders, 0), False)
    numbers, sizes = numbers[differ], sizes[differ]
    count = len(numbers)
    counts = {order: int(impossible(numbers, sizes, order).sum()) for order in orders}
    # repeated rows count once
    distinct = np.unique(np.concatenate([numbers, sizes], axis=1), axis=0)
    decided, reason = _decide(distinct[:, :4], distinct[:, 4:], orders)
    if not reason:
        shown = sorted(orders, key=lambda order: -counts[order])
        reason = "; ".join(f"as {BOX_FORMATS[o]} {counts[o]} of {count} boxes are impossible" for o in shown)
    return Judgement(decided, reason, count, counts)


def _decide(numbers: np.ndarray, sizes: np.ndarray, orders: Sequence[str]) -> tuple[str | None, str]:
    """Return (order or None, reason); the reason is '' if it is the number of impossible boxes."""
    count = len(numbers)
    counts = {order: int(impossible(numbers, sizes, order).sum()) for order in orders}
    best = min(orders, key=lambda order: counts[order])
    least = min(counts[order] for order in orders if order != best)
    by_correlation = _by_correlation(numbers, sizes, orders) if len(orders) == 2 else None
    if counts[best] <= least / 10 and least >= max(_MIN_IMPOSSIBLE, _MIN_IMPOSSIBLE_SHARE * count):
        if by_correlation is not None and by_correlation[0] != best and least < _DECISIVE:
            return None, ""
        return (best, "") if _like_ears(numbers, sizes, best) else (None, "")
    few = max(counts.values()) <= _MIN_IMPOSSIBLE_SHARE * count
    if by_correlation is not None and few and counts[by_correlation[0]] <= max(1, counts[best]):
        return by_correlation
    return None, ""


def could_be_centres(numbers: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes that fit x,y,width,height fit centre x,centre y,width,height better.

    Usually neither can be excluded, as they differ by half a box. Few lists have centres in pixels, so these are
    considered only if x,y,width,height is contradicted.
    """
    finite = np.isfinite(numbers).all(axis=1)
    numbers, sizes = numbers[finite], sizes[finite]
    corner, centre = (int(impossible(numbers, sizes, order).sum()) for order in ("xywh", "cxcywh"))
    decided = _by_correlation(numbers, sizes, ("xywh", "cxcywh")) if len(numbers) else None
    return (corner >= _MIN_IMPOSSIBLE and centre <= corner / 10) or (decided is not None and decided[0] == "cxcywh")


def _like_ears(numbers: np.ndarray, sizes: np.ndarray, order: str) -> bool:
    """Whether the boxes have proportions of ears; if not, the order is another one, or they are not ears."""
    corners = to_corners(numbers[~impossible(numbers, sizes, order)], order)
    if not len(corners):
        return False
    aspects = (corners[:, 3] - corners[:, 1]) / (corners[:, 2] - corners[:, 0])
    return bool(_ASPECT_LIMITS[0] <= np.median(aspects) <= _ASPECT_LIMITS[1])


def _by_correlation(numbers: np.ndarray, sizes: np.ndarray, orders: Sequence[str]) -> tuple[str, str] | None:
    """Return (order, reason) by the second kind of evidence, None if it does not decide between two `orders`."""
    numbers, sizes = numbers[np.isfinite(sizes).all(axis=1)], sizes[np.isfinite(sizes).all(axis=1)]
    distinct = np.unique(np.concatenate([numbers, sizes], axis=1), axis=0)
    numbers, sizes = distinct[:, :4], distinct[:, 4:]
    possible = ~np.any([impossible(numbers, sizes, order) for order in orders], axis=0)
    numbers, sizes = numbers[possible], sizes[possible]
    count = len(numbers)
    if count < _MIN_BOXES:
        return None
    found = {order: _statistics(to_corners(numbers, order), sizes) for order in orders}
    one, two = orders
    log_ratio = count / 2 * np.log(found[two].product / found[one].product)  # > 0: in favour of `one`
    chosen, other = (one, two) if log_ratio[0] > 0 else (two, one)
    axes_agree = (log_ratio > 0).all() or (log_ratio < 0).all()
    if not axes_agree or np.abs(log_ratio).min() < _MIN_LOG_RATIO:
        return None
    if not _TYPICAL_ASPECTS[0] <= found[chosen].aspect <= _TYPICAL_ASPECTS[1]:
        return None
    if found[chosen].aspect_spread > found[other].aspect_spread:
        return None
    if chosen != "xyxy" and np.abs(found[chosen].centre - 0.5).max() > _MAX_OFF_CENTRE:
        return None
    correlations = {order: statistics.correlation for order, statistics in found.items()}
    off = {order: np.abs(statistics.centre - 0.5) for order, statistics in found.items()}
    centred = off[chosen].max() <= _CENTRED and off[other].min() >= 2 * _CENTRED
    least = _MIN_CORRELATION_CENTRED if centred else _MIN_CORRELATION
    if correlations[chosen].max() > _MAX_CORRELATION or correlations[other].min() < least:
        return None
    return chosen, (
        f"over {count} boxes the position depends on the size as {BOX_FORMATS[other]} (correlations "
        f"{correlations[other][0]:.2f}, {correlations[other][1]:.2f}), but not as {BOX_FORMATS[chosen]} "
        f"({correlations[chosen][0]:.2f}, {correlations[chosen][1]:.2f})"
    )


@dataclass(frozen=True)
class _Statistics:
    """Statistics of boxes read in one order. Arrays are [2]: along x and y."""

    product: np.ndarray  # of the variances of centre and size
    correlation: np.ndarray  # of centre and size, absolute value
    centre: np.ndarray  # median, as a share of the image
    aspect: float  # median height / width in pixels
    aspect_spread: float  # standard deviation of its logarithm


def _statistics(corners: np.ndarray, sizes: np.ndarray) -> _Statistics:
    share = corners / np.tile(sizes, 2)
    centre, size = (_clipped(values) for values in ((share[:, :2] + share[:, 2:]) / 2, share[:, 2:] - share[:, :2]))
    product = (centre.var(axis=0) + _MIN_DEVIATION**2) * (size.var(axis=0) + _MIN_DEVIATION**2)
    covariance = ((centre - centre.mean(axis=0)) * (size - size.mean(axis=0))).mean(axis=0)
    log_aspects = np.log((corners[:, 3] - corners[:, 1]) / (corners[:, 2] - corners[:, 0]))
    return _Statistics(
        product=product,
        correlation=np.abs(covariance) / np.sqrt(product),
        centre=np.median(centre, axis=0),
        aspect=float(np.exp(np.median(log_aspects))),
        aspect_spread=float(log_aspects.std()),
    )


def _clipped(values: np.ndarray) -> np.ndarray:
    """Clip to the 2 % and 98 % quantiles: a few damaged rows must not decide."""
    low, high = np.quantile(values, [0.02, 0.98], axis=0)
    return values.clip(low, high)

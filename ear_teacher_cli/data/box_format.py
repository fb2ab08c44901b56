"""Which order a list's boxes are in, where the list does not say: x1,y1,x2,y2 or x,y,width,height.

The original package documents corners and writes x,y,width,height; a list read in the wrong order gives wrong crops
without an error. `judge` decides from all boxes against the sizes of their images, or not at all. Two kinds of evidence:

1. Impossible boxes. Read as corners, x,y,width,height is inside out wherever width < x. Read as x,y,width,height,
   corners leave the image wherever the box's centre is right of, or below, the image's.
2. Where both readings are possible throughout: in the right order the position of a box (its centre) and its size vary
   independently, in the wrong one they are tied together, since x2 = x + width. Both orders are linear maps of
   determinant 1 of the same numbers, so their covariances have one determinant, and the product of the two variances,
   which is that determinant exactly where centre and size are uncorrelated, is smaller in the right order (Hadamard's
   inequality). Half the number of boxes times the logarithm of the ratio of products is the log-likelihood ratio of two
   models with independent normal centre and size.

A single bad row decides nothing, and evidence that disagrees decides nothing: then the user has to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .boxes import BOX_FORMATS, to_corners

# Boxes beyond the image by more than a pixel are impossible, as in crop.check_box_inside.
_MARGIN = 1.0
_FEWEST = 5  # impossible boxes that decide
_MANY = 10  # impossible boxes that decide whatever the second kind of evidence says
_SHARE = 0.2  # share of impossible boxes in the wrong order at least, and of the right order at most a tenth of it
_FEWEST_TIED = 20  # distinct boxes from which a correlation says anything
_NATS = 4.0  # log-likelihood ratio on each axis at least; e^8 for both axes together
_MOST_TIED = 0.35  # correlation of centre and size at most, in the order that is taken,
_LEAST_TIED = 0.7  # and at least, in the other; less is asked where boxes of the order that is taken lie in the middle
# of their images along both axes, and those of the other do not: medians, as shares of the image's side.
_LEAST_TIED_CENTRED, _CENTRED = 0.25, 0.025
_ASPECTS = (1.1, 2.6)  # median height / width that boxes of ears may have where little else tells the order,
_WIDEST, _HIGHEST = 0.85, 4.0  # and where the numbers of impossible boxes do
# Sizes read as corners are possible throughout only where boxes fill their images, which are then crops around an ear:
# how far the median centre may be from the image's, as a share of its side.
_OFF_CENTRE = 0.08
# Standard deviation that no centre or size is believed to be below, as a share of the image: boxes that are all alike
# say nothing.
_FLOOR = 0.004


@dataclass(frozen=True)
class Judgement:
    """What `judge` found. `order` None: undecided. `reason`: the numbers, for a message."""

    order: str | None
    reason: str
    boxes: int  # how many were judged
    impossible: dict[str, int]  # per order, of those
    differ: bool = True  # False: both orders give the same boxes


def impossible(numbers: np.ndarray, sizes: np.ndarray, order: str, margin: float = _MARGIN) -> np.ndarray:
    """bool [N]: boxes [N, 4] that cannot be ears in images of `sizes` [N, 2] (NaN: unknown) if read in `order`."""
    corners = to_corners(numbers, order)
    with np.errstate(invalid="ignore"):
        inside_out = ~((corners[:, 2:] > corners[:, :2]).all(axis=1))
        beyond = (corners[:, :2] < -margin).any(axis=1) | (corners[:, 2:] > sizes + margin).any(axis=1)
    return np.asarray(inside_out | beyond)


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
    bad = {order: int(impossible(numbers, sizes, order).sum()) for order in orders}
    # a row that is written several times is one
    different = np.unique(np.concatenate([numbers, sizes], axis=1), axis=0)
    decided, found = _decided(different[:, :4], different[:, 4:], orders)
    if not found:
        shown = sorted(orders, key=lambda order: -bad[order])
        found = "; ".join(f"as {BOX_FORMATS[o]} {bad[o]} of {count} boxes are impossible" for o in shown)
    return Judgement(decided, found, count, bad)


def _decided(numbers: np.ndarray, sizes: np.ndarray, orders: Sequence[str]) -> tuple[str | None, str]:
    """(the order, or None; why, '' where the numbers of impossible boxes say it)."""
    count = len(numbers)
    bad = {order: int(impossible(numbers, sizes, order).sum()) for order in orders}
    best = min(orders, key=lambda order: bad[order])
    least = min(bad[order] for order in orders if order != best)
    by_tie = _tied(numbers, sizes, orders) if len(orders) == 2 else None
    if bad[best] <= least / 10 and least >= max(_FEWEST, _SHARE * count):
        if by_tie is not None and by_tie[0] != best and least < _MANY:
            return None, ""
        return (best, "") if _like_ears(numbers, sizes, best) else (None, "")
    if by_tie is not None and max(bad.values()) <= _SHARE * count and bad[by_tie[0]] <= max(1, bad[best]):
        return by_tie
    return None, ""


def could_be_centres(numbers: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes that fit x,y,width,height are better explained as centre x,centre y,width,height.

    Mostly neither can be excluded: the two differ by half a box. Few lists have centres in pixels, so that they are only
    considered where x,y,width,height is contradicted.
    """
    finite = np.isfinite(numbers).all(axis=1)
    numbers, sizes = numbers[finite], sizes[finite]
    corner, centre = (int(impossible(numbers, sizes, order).sum()) for order in ("xywh", "cxcywh"))
    tied = _tied(numbers, sizes, ("xywh", "cxcywh")) if len(numbers) else None
    return (corner >= _FEWEST and centre <= corner / 10) or (tied is not None and tied[0] == "cxcywh")


def _like_ears(numbers: np.ndarray, sizes: np.ndarray, order: str) -> bool:
    """Whether the boxes are mostly higher than wide, as those of ears are; others are of another order, or no ears."""
    corners = to_corners(numbers[~impossible(numbers, sizes, order)], order)
    if not len(corners):
        return False
    aspects = (corners[:, 3] - corners[:, 1]) / (corners[:, 2] - corners[:, 0])
    return bool(_WIDEST <= np.median(aspects) <= _HIGHEST)


def _tied(numbers: np.ndarray, sizes: np.ndarray, orders: Sequence[str]) -> tuple[str, str] | None:
    """(order, reason) by the second kind of evidence, None where it does not decide."""
    numbers, sizes = numbers[np.isfinite(sizes).all(axis=1)], sizes[np.isfinite(sizes).all(axis=1)]
    distinct = np.unique(np.concatenate([numbers, sizes], axis=1), axis=0)
    numbers, sizes = distinct[:, :4], distinct[:, 4:]
    possible = ~np.any([impossible(numbers, sizes, order) for order in orders], axis=0)
    numbers, sizes = numbers[possible], sizes[possible]
    count = len(numbers)
    if count < _FEWEST_TIED:
        return None
    found = {order: _ties(to_corners(numbers, order), sizes) for order in orders}
    one, two = orders
    nats = count / 2 * np.log(found[two].product / found[one].product)  # > 0: for `one`
    chosen, other = (one, two) if nats[0] > 0 else (two, one)
    agree = (nats > 0).all() or (nats < 0).all()
    if not agree or np.abs(nats).min() < _NATS or not _ASPECTS[0] <= found[chosen].aspect <= _ASPECTS[1]:
        return None
    if found[chosen].aspect_spread > found[other].aspect_spread:
        return None
    if chosen != "xyxy" and np.abs(found[chosen].centre - 0.5).max() > _OFF_CENTRE:
        return None
    correlations = {order: ties.correlation for order, ties in found.items()}
    off = {order: np.abs(ties.centre - 0.5) for order, ties in found.items()}
    centred = off[chosen].max() <= _CENTRED and off[other].min() >= 2 * _CENTRED
    least = _LEAST_TIED_CENTRED if centred else _LEAST_TIED
    if correlations[chosen].max() > _MOST_TIED or correlations[other].min() < least:
        return None
    return chosen, (
        f"over {count} boxes the position depends on the size as {BOX_FORMATS[other]} (correlations "
        f"{correlations[other][0]:.2f}, {correlations[other][1]:.2f}), but not as {BOX_FORMATS[chosen]} "
        f"({correlations[chosen][0]:.2f}, {correlations[chosen][1]:.2f})"
    )


@dataclass(frozen=True)
class _Ties:
    """Centre and size of boxes in one order, x and y apart: [2] each."""

    product: np.ndarray  # of the variances of centre and size
    correlation: np.ndarray  # of centre and size, without its sign
    centre: np.ndarray  # median, as a share of the image
    aspect: float  # median height / width in pixels
    aspect_spread: float  # standard deviation of its logarithm


def _ties(corners: np.ndarray, sizes: np.ndarray) -> _Ties:
    share = corners / np.tile(sizes, 2)
    centre, size = (_clipped(values) for values in ((share[:, :2] + share[:, 2:]) / 2, share[:, 2:] - share[:, :2]))
    product = (centre.var(axis=0) + _FLOOR**2) * (size.var(axis=0) + _FLOOR**2)
    together = ((centre - centre.mean(axis=0)) * (size - size.mean(axis=0))).mean(axis=0)
    aspects = np.log((corners[:, 3] - corners[:, 1]) / (corners[:, 2] - corners[:, 0]))
    correlation, middle = np.abs(together) / np.sqrt(product), np.median(centre, axis=0)
    return _Ties(product, correlation, middle, float(np.exp(np.median(aspects))), float(aspects.std()))


def _clipped(values: np.ndarray) -> np.ndarray:
    """Without the outermost 2 % on both sides: a few bad rows must not decide."""
    low, high = np.quantile(values, [0.02, 0.98], axis=0)
    return values.clip(low, high)

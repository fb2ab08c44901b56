"""Count all pairs of embeddings in blocks, for the identity metrics. Does not import torch.

Queries are compared with the gallery a few rows at a time, so memory is the embeddings and a block, never N x N.
One pass gives, for each query, the ranks of its matches; for all pairs, two histograms of similarity (genuine: same
identity; impostor: different); and, for the bootstrap, the same histograms in coarse bins for each pair of groups.
A group is one person, or several where there are more than `MAX_GROUPS`.

N, M  queries, gallery rows     D  embedding     T  ranks that are counted     G  groups     C  coarse bins
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_GROUPS = 200
CMC_DEPTH = 50
BLOCK = 2**23  # similarities at a time: 32 MiB, and about five times that while they are counted

# A histogram bin is the exponent and the first 13 bits of the mantissa of the float32 distance 1 - similarity:
# 8192 bins per halving of the distance, so the cosines of an untrained network, all above 0.999, are resolved as
# well as those of a trained one. Two similarities in one bin differ by less than 2^-13 (0.012 %) of their distance and count
# as equal. The last bin is for pairs that are not impostor pairs.
_MANTISSA = 13
_SHIFT = 23 - _MANTISSA
_NEAREST = np.float32(2.0**-24)
_FIRST_BIN = int(_NEAREST.view(np.int32)) >> _SHIFT
_NO_PAIR = np.float32(-3.0)
BINS = (int(np.float32(4.0).view(np.int32)) >> _SHIFT) - _FIRST_BIN


@dataclass(frozen=True)
class Order:
    """The order of rows for the passes: by side, then person, so that the rows of an identity are adjacent.

    All arrays have length N and are in the new order; `index` holds the positions before. `ear` and `person` are codes
    that ascend (`person` within a side), `group` is the person's group, 0 to `groups` - 1. Of rows with sides the
    first `lefts` are of left ears; None where sides are unknown (then `ear` is `person`).
    """

    index: np.ndarray
    person: np.ndarray
    ear: np.ndarray
    group: np.ndarray
    groups: int
    people: int
    lefts: int | None


def arrange(people: Sequence[str], sides: Sequence[str] | None = None, seed: int = 0) -> Order:
    """Sort rows by side and person.

    `people`: N names. `sides`: N times 'left' or 'right', or None. More than MAX_GROUPS people are divided at random
    (`seed`) into MAX_GROUPS groups of equal size.
    """
    names, person = np.unique(np.asarray(people, dtype=str), return_inverse=True)
    count = len(names)
    if count > MAX_GROUPS:
        person = np.random.default_rng(seed).permutation(count)[person]
    groups = min(count, MAX_GROUPS)
    right = np.zeros(len(person), np.int64) if sides is None else (np.asarray(sides, dtype=str) == "right").astype(int)
    ear = right * count + person
    index = np.argsort(ear, kind="stable")
    person = person[index]
    return Order(
        index,
        person,
        ear[index],
        person * groups // count,
        groups,
        count,
        None if sides is None else int((~right.astype(bool)).sum()),
    )


@dataclass
class Side:
    """The queries or the gallery: unit rows float32 [N, D], with the ascending `identity` code and the `group` of each."""

    rows: np.ndarray
    identity: np.ndarray
    group: np.ndarray

    def __getitem__(self, part: slice) -> "Side":
        return Side(self.rows[part], self.identity[part], self.group[part])


@dataclass
class Tally:
    """The result of one pass.

    For the Q queries that have a match in the gallery: their `group` [Q]; `first` [Q], the rank of the first match
    from 1 (CMC_DEPTH + 1: beyond that depth); `precision` [Q], the average precision at R of Musgrave et al.;
    `chance` [Q], the share of the gallery that matches. `genuine` and `impostor` int64 [BINS], nearest first, with each
    unordered pair counted twice where both its rows are queries. `genuine_of` [G, C], `impostor_of` [G, G, C]: the
    same by group, or None. `nearest`: the nearest impostor of each query; `farthest`: the farthest match of each query
    that has one; both as (similarity, query, gallery row).
    """

    group: np.ndarray
    first: np.ndarray
    precision: np.ndarray
    chance: np.ndarray
    genuine: np.ndarray
    impostor: np.ndarray
    genuine_of: np.ndarray | None
    impostor_of: np.ndarray | None
    nearest: list[tuple[float, int, int]]
    farthest: list[tuple[float, int, int]]

    def __add__(self, other: "Tally") -> "Tally":
        """Combine the results of two disjoint sets of queries, without `nearest` and `farthest`."""
        joined = {
            n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in ("group", "first", "precision", "chance")
        }
        added = {n: getattr(self, n) + getattr(other, n) for n in ("genuine", "impostor")}
        grouped: dict[str, Any] = {
            n: None if getattr(self, n) is None else getattr(self, n) + getattr(other, n)
            for n in ("genuine_of", "impostor_of")
        }
        return Tally(**joined, **added, **grouped, nearest=[], farthest=[])


def tally(queries: Side, gallery: Side, groups: int, coarse: np.ndarray | None, *, block: int = BLOCK) -> Tally:
    """Compare every query with every gallery row. If both are the same object, a row is not its own neighbour.

    `coarse` [BINS + 1]: the coarse bin of every bin, from `coarse_bins`; None: pairs are not counted by group. `block`:
    similarities in memory at a time; it affects results only by the last bit of a float32 product.
    """
    total, same = len(gallery.rows), queries is gallery
    starts = np.searchsorted(gallery.identity, queries.identity, "left")
    ends = np.searchsorted(gallery.identity, queries.identity, "right")
    matches = ends - starts - same  # R of each query
    depth = int(min(total, max(CMC_DEPTH, matches.max(initial=0))))
    keep = np.flatnonzero(matches > 0)
    first, precision = np.zeros(len(matches), np.int64), np.zeros(len(matches))
    genuine, impostor = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    bins = 0 if coarse is None else int(coarse[-1])
    genuine_of = None if coarse is None else np.zeros((groups, bins), np.int64)
    impostor_of = None if coarse is None else np.zeros((groups, groups, bins), np.uint32)
    column_of = gallery.group * (bins + 1)
    nearest: list[tuple[float, int, int]] = []
    farthest: list[tuple[float, int, int]] = []
    for begin, end in _chunks(queries.group, max(1, block // total)):
        similarity = queries.rows[begin:end] @ gallery.rows.T  # n,D x D,M -> n,M
        own: dict[int, np.ndarray] = {}  # query -> similarities of its matches, highest first
        for row in range(begin, end):
            columns = slice(starts[row], ends[row])
            values = similarity[row - begin, columns].copy()
            similarity[row - begin, columns] = _NO_PAIR
            if same:
                values[row - columns.start] = np.inf  # itself: sorted to the front and removed there
            if matches[row]:
                far = int(values.argmin())
                farthest.append((float(values[far]), row, columns.start + far))
                own[row] = np.sort(values)[::-1][int(same) :]
        found = distance_bins(similarity)
        impostor += np.bincount(found.ravel(), minlength=BINS + 1)[:BINS]
        mine = distance_bins(np.concatenate([*own.values(), np.empty(0, np.float32)]))
        genuine += np.bincount(mine, minlength=BINS)[:BINS]
        if coarse is not None and impostor_of is not None and genuine_of is not None:
            group = queries.group[begin]
            keys = coarse[found]
            keys += column_of
            impostor_of[group] += (
                np.bincount(keys.ravel(), minlength=groups * (bins + 1)).reshape(groups, -1)[:, :bins].astype(np.uint32)
            )
            genuine_of[group] += np.bincount(coarse[mine], minlength=bins)[:bins]
        best = similarity.argmax(1)
        nearest += zip(similarity[np.arange(end - begin), best].tolist(), range(begin, end), best.tolist(), strict=True)
        similarity.partition(total - depth, axis=1)
        impostors = np.sort(similarity[:, total - depth :])  # n,T: the nearest impostors
        for row, values in own.items():
            # an impostor at the same distance as a match is ranked before it, so that a collapsed model scores 0
            ahead = depth - np.searchsorted(impostors[row - begin], values)
            ranks = ahead + np.arange(1, len(values) + 1)
            first[row] = min(ranks[0], CMC_DEPTH + 1)
            hits = ranks <= len(values)
            precision[row] = (np.arange(1, len(values) + 1)[hits] / ranks[hits]).sum() / len(values)
    return Tally(
        queries.group[keep], first[keep], precision[keep], matches[keep] / (total - same),
        genuine, impostor, genuine_of, impostor_of, nearest, farthest,
    )  # fmt: skip


def hardest(
    pairs: Iterable[tuple[float, int, int]], label: np.ndarray, most: int, *, high: bool
) -> list[tuple[float, int, int]]:
    """Return the `most` highest (or lowest) of (similarity, row, row), at most one for each pair of labels.

    A single wrong label would otherwise fill the list.
    """
    found, seen = [], set()
    for similarity, row, other in sorted(pairs, reverse=high):
        labels = frozenset((int(label[row]), int(label[other])))
        if similarity > _NO_PAIR and labels not in seen:
            seen.add(labels)
            found.append((similarity, row, other))
            if len(found) == most:
                break
    return found


def distance_bins(similarity: np.ndarray) -> np.ndarray:
    """Return the int32 bin, 0 the nearest, of each float32 similarity (-1 to 1; -3: no pair), in the same shape."""
    distance = np.float32(1) - similarity
    np.maximum(distance, _NEAREST, out=distance)
    found = distance.view(np.int32)
    found >>= _SHIFT
    found -= _FIRST_BIN
    return found


def bin_similarities() -> np.ndarray:
    """Return the similarity at the middle of each bin, float64 [BINS], descending."""
    edges = ((np.arange(BINS + 1) + _FIRST_BIN).astype(np.int32) << _SHIFT).view(np.float32).astype(float)
    return 1 - (edges[:-1] + edges[1:]) / 2


def coarse_bins(side: Side, seed: int = 0, most: int = 1000) -> np.ndarray:
    """Assign every bin to one of at most 512 coarse bins: int64 [BINS + 1], the last entry is their number C.

    Coarse bins end at quantiles of the similarities within a sample of `most` rows: of the genuine pairs, of the
    impostor pairs, and, in geometric steps, of the nearest impostors, where the thresholds for small FARs are.
    """
    random = np.random.default_rng(seed)
    picked = np.sort(random.permutation(len(side.rows))[:most])
    found = distance_bins(side.rows[picked] @ side.rows[picked].T)
    impostors = np.sort(found[side.identity[picked][:, None] != side.identity[picked]])
    own = []
    for row in picked:
        start, end = np.searchsorted(side.identity, [side.identity[row], side.identity[row] + 1])
        others = np.setdiff1d(np.arange(start, min(end, start + 50)), [row])
        own.append(distance_bins(side.rows[others] @ side.rows[row]))
    genuine = np.sort(np.concatenate(own))
    even, tail = np.linspace(0, 1, 192), np.geomspace(1e-6, 0.1, 128)
    parts = [
        values[(share * (len(values) - 1)).astype(int)]
        for values, share in ((genuine, even), (impostors, even), (impostors, tail))
        if len(values)
    ]
    edges = np.unique(np.concatenate(parts))
    return np.append(np.searchsorted(edges, np.arange(BINS)), len(edges) + 1)


def _chunks(group: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of at most `most` rows of one group."""
    bounds = np.flatnonzero(np.diff(group)) + 1
    for start, end in zip([0, *bounds.tolist()], [*bounds.tolist(), len(group)], strict=True):
        for begin in range(start, end, most):
            yield begin, min(end, begin + most)

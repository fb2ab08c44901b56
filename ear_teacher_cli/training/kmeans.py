"""Spherical k-means with a cannot-link rule, warm starts and bounded cluster sizes; offline and deterministic.

N images, D features, K clusters.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

IMAGES_PER_CLASS = 4
LARGEST = 8  # a cluster of more than this many times the mean is split
_CHUNK = 16_384  # rows at a time: N x K similarities never exist at once


def directions(embeddings: torch.Tensor) -> torch.Tensor:
    """Return what is clustered: embeddings about their mean, at unit length. N,D -> float32 N,D."""
    embeddings = embeddings.float()
    return F.normalize(embeddings - embeddings.mean(0), dim=1)


def class_means(features: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean direction of every cluster at unit length: N,D and N -> K,D. Rows labelled -1 do not count."""
    kept = labels >= 0
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, labels[kept], features[kept])
    return F.normalize(sums, dim=1)


def kmeans(
    features: torch.Tensor,
    count: int,
    seed: int,
    *,
    start: torch.Tensor | None = None,
    apart: list[list[int]] | None = None,
    iterations: int = 20,
) -> torch.Tensor:
    """Cluster unit vectors (Dhillon and Modha 2001): N,D -> int64 labels N in [0, count).

    `start`: labels of the previous round, so that ids stay (a warm start); else k-means++ seeding
    (Arthur and Vassilvitskii 2007). Every cluster ends with at least one image, none with more than LARGEST
    times the mean (as far as distinct images allow). `apart`: groups of rows that must not share a cluster.
    """
    assert len(features) >= count >= 2
    centres = _plus_plus(features, count, seed) if start is None else class_means(features, start, count)
    labels = torch.full((len(features),), -1)
    for _ in range(iterations):
        new, similarity = _assign(features, centres)
        new = _fill_empty(new, similarity, count)
        if torch.equal(new, labels):
            break
        labels = new
        centres = class_means(features, labels, count)
    labels = _split_oversized(features, labels, count, seed)
    return _enforce_cannot_link(features, labels, class_means(features, labels, count), apart or [])


def kmeans_by_side(
    features: torch.Tensor, sides: list[str | None], count: int, seed: int, **options: Any
) -> torch.Tensor:
    """Cluster left and right ears separately, each with a share of the clusters in proportion: none holds both.

    `options`: `start` and `apart` of `kmeans`.
    """
    labels, first = torch.full((len(features),), -1), 0
    groups = [torch.tensor([i for i, s in enumerate(sides) if s == side]) for side in ("left", "right")]
    groups = [rows for rows in groups if len(rows)]
    start, apart = options.get("start"), options.get("apart") or []
    for number, rows in enumerate(groups):
        left_over = count - first - 2 * (len(groups) - number - 1)
        is_last = number == len(groups) - 1
        share = left_over if is_last else max(2, min(left_over, round(count * len(rows) / len(features))))
        share = min(share, len(rows))
        if share < 2:
            labels[rows] = first
        else:
            place = {row: i for i, row in enumerate(rows.tolist())}
            before = None if start is None else start[rows] - first
            if before is not None and (before.min() < 0 or before.max() >= share):
                before = None  # images came or went, and the clusters are divided anew
            together = [[place[r] for r in group if r in place] for group in apart]
            labels[rows] = first + kmeans(features[rows], share, seed, start=before, apart=together)
        first += share
    return labels


def _plus_plus(features: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return K,D centres by greedy k-means++: of a few candidates, drawn with probability proportional to the squared
    distance to the nearest centre so far, the one that leaves the least distance is next."""
    draw = np.random.default_rng([seed, 2])
    candidates = 2 + int(np.log(count))
    chosen = [int(draw.integers(len(features)))]
    distance = (1 - features @ features[chosen[0]]).clamp_min(0)  # half the squared distance of unit vectors
    while len(chosen) < count:
        total = distance.double().cumsum(0)
        at = torch.searchsorted(total, torch.from_numpy(draw.random(candidates)) * total[-1], right=True)
        rows = at.clamp_max(len(features) - 1)
        left = torch.minimum(distance[:, None], (1 - features @ features[rows].T).clamp_min(0))  # N,candidates
        best = int(left.sum(0).argmin())
        distance = left[:, best]
        chosen.append(int(rows[best]))
    return features[chosen]


def _assign(features: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (nearest centre int64 N, its cosine N), computed in chunks."""
    best = [(chunk @ centres.T).max(1) for chunk in features.split(_CHUNK)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def _fill_empty(labels: torch.Tensor, similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Give every empty cluster the image farthest from its own centre, of a cluster that has more than one."""
    sizes = labels.bincount(minlength=count)
    empty = (sizes == 0).nonzero().flatten().tolist()
    if not empty:
        return labels
    labels = labels.clone()
    for row in similarity.argsort(stable=True).tolist():
        if not empty:
            break
        if sizes[labels[row]] > 1:
            sizes[labels[row]] -= 1
            labels[row] = empty.pop(0)
            sizes[labels[row]] += 1
    return labels


def _split_oversized(features: torch.Tensor, labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Halve clusters above LARGEST times the mean; the id of the smallest cluster is freed for the other half."""
    bound = max(2 * IMAGES_PER_CLASS, LARGEST * len(labels) // count)
    for attempt in range(count):
        sizes = labels.bincount(minlength=count)
        largest, smallest = int(sizes.argmax()), int(sizes.argmin())
        if sizes[largest] <= bound or largest == smallest:
            break
        labels = labels.clone()
        centres = class_means(features, labels, count)
        unassigned = (labels == smallest).nonzero().flatten()  # to the nearest of the other clusters
        similarity = features[unassigned] @ centres.T
        similarity[:, smallest] = -torch.inf
        labels[unassigned] = similarity.argmax(1)
        members = (labels == largest).nonzero().flatten()
        halves = _assign(features[members], _plus_plus(features[members], 2, seed + attempt))[0]
        if halves.min() == halves.max():  # identical images: any halving is as good
            halves = torch.arange(len(members)) % 2
        labels[members[halves == 1]] = smallest
    return labels


def _enforce_cannot_link(
    features: torch.Tensor, labels: torch.Tensor, centres: torch.Tensor, groups: list[list[int]]
) -> torch.Tensor:
    """Keep one image (the closest) per cluster within each group; the others take their next best free cluster."""
    labels = labels.clone()
    for group in groups:
        similarity = features[group] @ centres.T
        taken: set[int] = set()
        for i in similarity.max(1).values.argsort(descending=True, stable=True).tolist():
            if int(labels[group[i]]) in taken:
                free = (c for c in similarity[i].argsort(descending=True).tolist() if c not in taken)
                labels[group[i]] = next(free, int(labels[group[i]]))
            taken.add(int(labels[group[i]]))
    return labels

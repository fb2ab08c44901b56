"""Pseudo-classes: which images count as the same ear while nobody knows.

A class belongs to an image, never to a position in a batch. `kmeans` is offline, deterministic, spherical
k-means over the embeddings (the recipe of unsupervised speaker verification: cluster, train a margin softmax
on the cluster ids, cluster again); `instance` makes every image its own class; `identity` takes the manifest's
word; `fixed` draws classes once at random, the control that any other must beat; `batch`, the seed's, is the one
exception to the first sentence, kept for comparison. N images, D features, K classes.
"""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.manifest import Manifest
from ..errors import ManifestError, WeightsError
from ..files import printable

PICTURES_PER_CLASS = 4
LARGEST = 8  # a class of more than this many times the mean is split
_CHUNK = 16_384  # rows at a time: N x K similarities never exist at once


@dataclass
class PseudoClasses:
    """`labels`: int64 N, -1 for an image that could not be read. `fingerprint`: of the manifest they belong to."""

    labels: torch.Tensor
    count: int
    round: int
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "labels": self.labels.to("cpu", torch.int32),
            "count": self.count,
            "round": self.round,
            "fingerprint": self.fingerprint,
        }

    @staticmethod
    def from_dict(state: dict[str, Any], fingerprint: str | None) -> "PseudoClasses":
        """Raises WeightsError if the training manifest is no longer the one the labels belong to."""
        if fingerprint is not None and state["fingerprint"] != fingerprint:
            raise WeightsError(
                "checkpoint: the training manifest has changed since, so its pseudo-classes do not "
                "fit; restore the manifest or start a new experiment"
            )
        return PseudoClasses(state["labels"].to(torch.int64), state["count"], state["round"], state["fingerprint"])


def class_count(kind: str, manifest: Manifest, most: int) -> int:
    """How many classes to use for the images of `manifest`; `most` 0 means no bound. Raises ManifestError."""
    if kind == "instance":
        return len(manifest)
    if kind == "identity":
        return int(identity_labels(manifest).max()) + 1
    count = max(2, len(manifest) // PICTURES_PER_CLASS)
    return min(count, most) if most else count


def is_round(epoch: int, every: int, max_epochs: int) -> bool:
    """Whether k-means clusters before `epoch` (from 0): at the start, then every `every` epochs, not in the last fifth."""
    return epoch == 0 or (epoch % every == 0 and epoch < 0.8 * max_epochs)


def identity_labels(manifest: Manifest) -> torch.Tensor:
    """The manifest's own ears, (person, side) where sides are known: int64 N, -1 where it does not say.

    Raises ManifestError if it names fewer than two.
    """
    ears = [manifest.ear(index) for index in range(len(manifest))]
    number = {ear: i for i, ear in enumerate(dict.fromkeys(ear for ear in ears if ear))}
    if len(number) < 2:
        raise ManifestError(
            f"{printable(manifest.source)}: names {len(number)} identities, and --pseudo-classes identity needs two; "
            "add an identity column (or folders, root/identity/image.jpg), or choose kmeans"
        )
    return torch.tensor([number[ear] if ear else -1 for ear in ears])


def batch_labels(images: int, count: int) -> torch.Tensor:
    """The seed's: the place in the batch. It says nothing of the image, so the best answer is to make all
    embeddings one. int64 B."""
    return torch.arange(images) % count


def fixed_labels(images: int, count: int, seed: int) -> torch.Tensor:
    """Random but constant classes of equal size. int64 N."""
    labels = np.arange(images) % count
    np.random.default_rng([seed, 1]).shuffle(labels)
    return torch.from_numpy(labels)


def fingerprint(manifest: Manifest, labelled: bool = False) -> str:
    """sha256 over the rows (paths and boxes; `labelled`: identities and sides, too) of a manifest."""
    digest = hashlib.sha256()
    for path, box in zip(manifest.paths, manifest.boxes, strict=True):
        digest.update(f"{path}\0{box}\n".encode("utf-8", "surrogateescape"))
    for index in range(len(manifest) if labelled else 0):
        digest.update(f"{manifest.ear(index)}\0{manifest.side(index)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def same_photo(manifest: Manifest) -> list[list[int]]:
    """Groups of rows cut out of one photo: two ears in it are two ears, never one class."""
    rows = defaultdict(list)
    for index, path in enumerate(manifest.paths):
        rows[path].append(index)
    return [group for group in rows.values() if len(group) > 1]


def kmeans_by_side(
    features: torch.Tensor, sides: list[str | None], count: int, seed: int, **options: Any
) -> torch.Tensor:
    """`kmeans`, left and right ears each for themselves, with classes in proportion: no class holds both."""
    labels, first = torch.full((len(features),), -1), 0
    groups = [torch.tensor([i for i, s in enumerate(sides) if s == side]) for side in ("left", "right")]
    groups = [rows for rows in groups if len(rows)]
    start, apart = options.get("start"), options.get("apart") or []
    for number, rows in enumerate(groups):
        left_over = count - first - 2 * (len(groups) - number - 1)
        share = (
            left_over if number == len(groups) - 1 else max(2, min(left_over, round(count * len(rows) / len(features))))
        )
        share = min(share, len(rows))
        if share < 2:
            labels[rows] = first
        else:
            place = {row: i for i, row in enumerate(rows.tolist())}
            before = None if start is None else start[rows] - first
            if before is not None and (before.min() < 0 or before.max() >= share):
                before = None  # images came or went, and the classes are shared out anew
            together = [[place[r] for r in group if r in place] for group in apart]
            labels[rows] = first + kmeans(features[rows], share, seed, start=before, apart=together)
        first += share
    return labels


def agreement_of_rounds(before: torch.Tensor, after: torch.Tensor) -> float:
    """Normalised mutual information of two labellings of N images (arithmetic mean; Strehl and Ghosh 2002):
    1 when they group alike, whatever the ids, 0 when one says nothing of the other. Rows of -1 do not count."""
    kept = (before >= 0) & (after >= 0)
    joint = torch.stack([before[kept], after[kept]]).unique(dim=1, return_counts=True)[1].double()
    together, a, b = (_entropy(c) for c in (joint, before[kept].bincount(), after[kept].bincount()))
    return float((2 * (a + b - together) / (a + b)).clamp(0, 1)) if a + b > 0 else 1.0


def figures(labels: torch.Tensor, count: int) -> dict[str, float]:
    """The state of K classes: share of them in use, entropy over log K (1: all of equal size), share of the
    images in the largest."""
    sizes = labels[labels >= 0].bincount(minlength=count).double()
    return {
        "in_use": float((sizes > 0).double().mean()),
        "entropy": float(_entropy(sizes) / math.log(max(2, count))),
        "largest": float(sizes.max() / sizes.sum().clamp_min(1)),
    }


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    shares = counts[counts > 0].double() / counts.sum()
    return -(shares * shares.log()).sum()


def directions(embeddings: torch.Tensor) -> torch.Tensor:
    """What is clustered: embeddings about their mean, at unit length. N,D -> float32 N,D."""
    embeddings = embeddings.float()
    return F.normalize(embeddings - embeddings.mean(0), dim=1)


def kmeans(
    features: torch.Tensor,
    count: int,
    seed: int,
    *,
    start: torch.Tensor | None = None,
    apart: list[list[int]] | None = None,
    iterations: int = 20,
) -> torch.Tensor:
    """Spherical k-means of unit vectors (Dhillon and Modha 2001): N,D -> int64 labels N in [0, count).

    `start`: labels of the previous round, so that ids stay (a warm start); else k-means++ seeding
    (Arthur and Vassilvitskii 2007). Every class ends with at least one image, none with more than LARGEST
    times the mean (as far as distinct images allow). `apart`: groups of rows that must not share a class.
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


def class_means(features: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Mean direction of every class at unit length: N,D and N -> K,D. Rows labelled -1 do not count."""
    kept = labels >= 0
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, labels[kept], features[kept])
    return F.normalize(sums, dim=1)


def _plus_plus(features: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Greedy k-means++: of a few candidates, drawn with probability proportional to the squared distance to the
    nearest seed so far, the one that leaves the least distance becomes the next seed. K,D."""
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
    """(nearest centre int64 N, its cosine N), in chunks."""
    best = [(chunk @ centres.T).max(1) for chunk in features.split(_CHUNK)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def _fill_empty(labels: torch.Tensor, similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Give every empty class the image farthest from its own centre, of a class that can spare it."""
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
    """Halve classes above LARGEST times the mean; the id of the smallest class is freed for the other half."""
    bound = max(2 * PICTURES_PER_CLASS, LARGEST * len(labels) // count)
    for attempt in range(count):
        sizes = labels.bincount(minlength=count)
        giant, smallest = int(sizes.argmax()), int(sizes.argmin())
        if sizes[giant] <= bound or giant == smallest:
            break
        labels = labels.clone()
        centres = class_means(features, labels, count)
        unassigned = (labels == smallest).nonzero().flatten()  # to the nearest of the other classes
        similarity = features[unassigned] @ centres.T
        similarity[:, smallest] = -torch.inf
        labels[unassigned] = similarity.argmax(1)
        members = (labels == giant).nonzero().flatten()
        halves = _assign(features[members], _plus_plus(features[members], 2, seed + attempt))[0]
        if halves.min() == halves.max():  # identical images: any halving is as good
            halves = torch.arange(len(members)) % 2
        labels[members[halves == 1]] = smallest
    return labels


def _enforce_cannot_link(
    features: torch.Tensor, labels: torch.Tensor, centres: torch.Tensor, groups: list[list[int]]
) -> torch.Tensor:
    """Within each group keep one image (the closest) per class; the others take their next best free class."""
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

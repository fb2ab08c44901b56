"""Pseudo-labels: which training images count as the same ear where nobody says so.

A label belongs to an image, never to a position in a batch. `kmeans` clusters the embeddings offline (the recipe of
unsupervised speaker verification: cluster, train a margin softmax on the cluster ids, cluster again); `instance` makes
every image its own class; `identity` takes the identities of the manifest; `fixed` draws classes once at random, the
control that any other must beat; `batch`, of the original package, is the exception to the first sentence, kept for
comparison. N images, M of them readable, D embedding, D' output of the heads, K classes.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from ..config import TrainConfig
from ..data.manifest import Manifest
from ..data.texts import Texts
from ..errors import EarTeachError, ManifestError, WeightsError
from ..files import printable
from .kmeans import IMAGES_PER_CLASS, class_means, directions, kmeans, kmeans_by_side
from .passes import embed_train_set_together


@dataclass
class PseudoClasses:
    """`labels`: int64 N, -1 for an image that could not be read. `fingerprint`: of the manifest they belong to."""

    labels: torch.Tensor
    count: int
    round: int
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values and an int32 tensor, for a checkpoint."""
        return {
            "labels": self.labels.to("cpu", torch.int32),
            "count": self.count,
            "round": self.round,
            "fingerprint": self.fingerprint,
        }

    @staticmethod
    def from_dict(state: dict[str, Any], fingerprint: str | None) -> "PseudoClasses":
        """Read `as_dict`. Raises WeightsError if the training manifest is no longer the one the labels belong to."""
        if fingerprint is not None and state["fingerprint"] != fingerprint:
            raise WeightsError(
                "checkpoint: the training manifest has changed since, so its pseudo-classes do not "
                "fit; restore the manifest or start a new experiment"
            )
        return PseudoClasses(state["labels"].to(torch.int64), state["count"], state["round"], state["fingerprint"])


class PseudoLabels:
    """The pseudo-classes of a run, and the rounds in which they are made.

    `classes` is None before the first round; `nmi` compares the last two rounds (see `agreement_of_rounds`).
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.classes: PseudoClasses | None = None
        self.nmi: float | None = None

    @property
    def round(self) -> int | None:
        """Return the number of the last round, from 0; None before the first."""
        return self.classes.round if self.classes else None

    def is_due(self, epoch: int) -> bool:
        """Return whether a round comes before `epoch` (from 0)."""
        config = self.config
        again = config.pseudo_classes == "kmeans" and is_round(epoch, config.cluster_every, config.max_epochs)
        return self.classes is None or again

    def move_to(self, device: torch.device) -> None:
        """Move the labels, which a checkpoint has on the CPU."""
        if self.classes is not None:
            self.classes.labels = self.classes.labels.to(device)

    def labels_of(self, index: torch.Tensor) -> torch.Tensor:
        """Return the labels of a batch of training images, int64 B; -1 where an image has none."""
        assert self.classes is not None
        if self.config.pseudo_classes == "batch":
            return batch_labels(len(index), self.classes.count, index.device)
        return self.classes.labels[index]

    def metrics(self) -> dict[str, float]:
        """Return `in_use`, `entropy`, `largest` (see `class_metrics`) and `nmi` of the classes, where there are any."""
        if self.classes is None or self.config.pseudo_classes == "batch":
            return {}
        found = class_metrics(self.classes.labels.cpu(), self.classes.count)
        return found if self.nmi is None else {**found, "nmi": self.nmi}

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps; None before the first round."""
        return None if self.classes is None else {**self.classes.as_dict(), "nmi": self.nmi}

    def load_state_dict(self, state: dict[str, Any], manifest: Manifest | None) -> None:
        """Read `state_dict`. Raises WeightsError if `manifest`, where there is one, has changed since."""
        mark = self._fingerprint(manifest) if manifest is not None else None
        self.classes, self.nmi = PseudoClasses.from_dict(state, mark), state.get("nmi")

    def make_round(self, module: pl.LightningModule) -> torch.Tensor | None:
        """Make the classes of a round: all ranks embed, rank 0 clusters. `module`: an EarTeacherLightningModule.

        Returns the class means of the heads' output, float32 K,D', which become the prototypes; None where the classes
        know nothing of the images. Raises EarTeachError, on all ranks, if there are not enough readable images.
        """
        manifest, count = module.train_set.manifest, len(module.prototypes)
        if self.config.pseudo_classes == "batch":
            labels = fixed_labels(len(manifest), count, self.config.seed)
            self.classes = PseudoClasses(labels, count, 0, self._fingerprint(manifest))
            return None
        result: Any = None
        try:
            embedded = embed_train_set_together(module)
            if embedded is not None:
                result = self._found(module, manifest, count, *embedded)
        except EarTeachError as error:
            result = error
        result = module.trainer.strategy.broadcast(result)
        if isinstance(result, EarTeachError):
            raise EarTeachError.on_all_ranks(str(result))
        state, means = result
        before = self.classes.labels.cpu() if self.classes else None
        self.classes = PseudoClasses.from_dict(state, None)
        self.nmi = None if before is None else agreement_of_rounds(before, self.classes.labels)
        return means

    def _found(
        self, module: pl.LightningModule, manifest: Manifest, count: int, embeddings: torch.Tensor, rows: torch.Tensor
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the next round's state and class means from the embeddings M,D of the readable `rows` M."""
        labels = self._label(embeddings, rows, manifest, count)
        means = _means_of_outputs(module, embeddings, labels[rows])
        number = self.classes.round + 1 if self.classes else 0
        return PseudoClasses(labels, count, number, self._fingerprint(manifest)).as_dict(), means

    def _label(self, embeddings: torch.Tensor, rows: torch.Tensor, manifest: Manifest, count: int) -> torch.Tensor:
        """Return int64 labels of all N training images from the embeddings M,D of the readable `rows` M."""
        config = self.config
        if config.pseudo_classes == "instance":
            return torch.arange(len(manifest))
        if config.pseudo_classes == "identity":
            return identity_labels(manifest)
        if config.pseudo_classes == "fixed":
            return fixed_labels(len(manifest), count, config.seed)
        if len(rows) < count:
            raise EarTeachError(
                f"{manifest.source}: {len(rows)} readable images cannot fill {count} pseudo-classes; "
                "mend the images or lower --num-pseudo-classes"
            )
        place = np.full(len(manifest), -1)
        place[rows.numpy()] = np.arange(len(rows))
        apart = [[i for i in place[group].tolist() if i >= 0] for group in same_photo(manifest)]
        start = self.classes.labels.cpu()[rows] if self.classes else None
        labels = torch.full((len(manifest),), -1)
        options: dict[str, Any] = {"start": start, "apart": apart}
        if config.side_policy == "separate":
            if count < 4:
                raise EarTeachError(
                    f"{manifest.source}: {count} pseudo-classes are too few for two sides; use --side-policy as-is"
                )
            sides = [manifest.side(row) for row in rows.tolist()]
            labels[rows] = kmeans_by_side(directions(embeddings), sides, count, config.seed, **options)
        else:
            labels[rows] = kmeans(directions(embeddings), count, config.seed, **options)
        return labels

    def _fingerprint(self, manifest: Manifest) -> str:
        """Return the fingerprint of the manifest, with the columns that the classes are made from."""
        labelled = self.config.pseudo_classes == "identity" or self.config.side_policy == "separate"
        return fingerprint(manifest, labelled)


@torch.no_grad()
def _means_of_outputs(module: pl.LightningModule, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the class means of the heads' output, K,D', in training mode: the loss compares them with such outputs."""
    parts = embeddings.tensor_split(-(-len(embeddings) // 65_536))
    outputs = [module.model.predict(part.to(module.device)).float().cpu() for part in parts]
    means = class_means(F.normalize(torch.cat(outputs), dim=1), labels, len(module.prototypes))
    # a class none of whose images could be read keeps its prototype
    return torch.where(means.norm(dim=1, keepdim=True) > 0, means, module.prototypes.detach().cpu())


def class_count(kind: str, manifest: Manifest, most: int) -> int:
    """Return how many classes to use for the images of `manifest`; `most` 0 means no bound. Raises ManifestError."""
    if kind == "instance":
        return len(manifest)
    if kind == "identity":
        return int(identity_labels(manifest).max()) + 1
    count = max(2, len(manifest) // IMAGES_PER_CLASS)
    return min(count, most) if most else count


def is_round(epoch: int, every: int, max_epochs: int) -> bool:
    """Return whether k-means clusters before `epoch` (from 0): at the start, then every `every` epochs, not in the last
    fifth."""
    return epoch == 0 or (epoch % every == 0 and epoch < 0.8 * max_epochs)


def identity_labels(manifest: Manifest) -> torch.Tensor:
    """Return the manifest's own ears, (person, side) where sides are known: int64 N, -1 where it does not say.

    Raises ManifestError if it names fewer than two.
    """
    number: dict[tuple[str, str | None], int] = {}
    ears = (manifest.ear(index) for index in range(len(manifest)))
    labels = np.fromiter((number.setdefault(ear, len(number)) if ear else -1 for ear in ears), np.int64, len(manifest))
    if len(number) < 2:
        raise ManifestError(
            f"{printable(manifest.source)}: names {len(number)} identities, and --pseudo-classes identity needs two; "
            "add an identity column (or folders, root/identity/image.jpg), or choose kmeans"
        )
    return torch.from_numpy(labels)


def batch_labels(images: int, count: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the original package's labels: the position in the batch, int64 B. They do not depend on the image, so the
    loss is least where all embeddings are the same."""
    return torch.arange(images, device=device) % count


def fixed_labels(images: int, count: int, seed: int) -> torch.Tensor:
    """Return random but constant classes of equal size. int64 N."""
    labels = np.arange(images) % count
    np.random.default_rng([seed, 1]).shuffle(labels)
    return torch.from_numpy(labels)


def fingerprint(manifest: Manifest, labelled: bool = False) -> str:
    """Return the sha256 of the rows (paths and boxes; `labelled`: identities and sides, too) of a manifest."""
    digest = hashlib.sha256()
    for path, box in zip(manifest.paths, manifest.boxes, strict=True):
        digest.update(f"{path}\0{box}\n".encode("utf-8", "surrogateescape"))
    for index in range(len(manifest) if labelled else 0):
        digest.update(f"{manifest.ear(index)}\0{manifest.side(index)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def same_photo(manifest: Manifest) -> list[list[int]]:
    """Return groups of rows cut out of one photo: two ears in it are two ears, never one class."""
    return [group for group in Texts.of(manifest.paths).groups() if len(group) > 1]


def agreement_of_rounds(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the normalised mutual information of two labellings of N images (arithmetic mean; Strehl and Ghosh 2002):
    1 when they group alike, whatever the ids, 0 when they are independent. Rows of -1 do not count."""
    kept = (before >= 0) & (after >= 0)
    joint = torch.stack([before[kept], after[kept]]).unique(dim=1, return_counts=True)[1].double()
    together, a, b = (_entropy(c) for c in (joint, before[kept].bincount(), after[kept].bincount()))
    return float((2 * (a + b - together) / (a + b)).clamp(0, 1)) if a + b > 0 else 1.0


def class_metrics(labels: torch.Tensor, count: int) -> dict[str, float]:
    """Return the state of K classes: share of them in use, entropy over log K (1: all of equal size), share of the
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

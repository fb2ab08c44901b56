"""Margin softmax losses over pseudo-classes, losses between two views, and the PSNR of reconstructions: pure functions.

B images, K classes, D' the heads' output size. Angles are computed in float32 whatever the precision.
"""

import math

import torch
import torch.nn.functional as F

from ..quality.reconstruction import psnr as psnr  # what a decoder is judged by is computed as its references are

# acos and sqrt(1 - cos^2) have infinite slope at |cos| = 1, which class means used as prototypes do reach.
_EDGE = 1e-6


def cosines(features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every image with every prototype: B,D' and K,D' -> B,K in [-1, 1]."""
    return F.normalize(features.float(), dim=1) @ F.normalize(prototypes.float(), dim=1).T


def arcface_logits(cosine: torch.Tensor, labels: torch.Tensor, margin: float, scale: float) -> torch.Tensor:
    """Return scale * cos(theta + margin) at the label, scale * cos(theta) elsewhere (ArcFace, Deng et al. 2019, eq. 3).

    Beyond theta = pi - margin, where cos(theta + margin) would rise again, it continues as the straight line
    cos(theta) - margin * sin(margin), as the authors' code does. `margin` in radians. B,K -> B,K.
    """
    target = cosine.gather(1, labels[:, None]).clamp(-1 + _EDGE, 1 - _EDGE)  # B,1
    sine = (1 - target * target).sqrt()
    widened = target * math.cos(margin) - sine * math.sin(margin)
    widened = torch.where(target > -math.cos(margin), widened, target - margin * math.sin(margin))
    return scale * cosine.scatter(1, labels[:, None], widened)


def cosface_logits(cosine: torch.Tensor, labels: torch.Tensor, margin: float, scale: float) -> torch.Tensor:
    """Return scale * (cos(theta) - margin) at the label, scale * cos(theta) elsewhere (CosFace, Wang et al. 2018,
    eq. 4)."""
    return scale * (cosine - margin * F.one_hot(labels, cosine.shape[1]))


LOGITS = {"arcface": arcface_logits, "cosface": cosface_logits}


def metric_loss(
    kind: str, features: torch.Tensor, prototypes: torch.Tensor, labels: torch.Tensor, margin: float, scale: float
) -> torch.Tensor:
    """Return the mean cross-entropy of the margin softmax over the images that have a label; 0 if none has one.

    `features` B,D', `prototypes` K,D', `labels` int64 B in [0, K), -1 without a label.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = torch.where((labels >= 0)[:, None], features, 0)  # what is not finite would reach the gradient
        logits = LOGITS[kind](cosines(features, prototypes), labels.clamp_min(0), margin, scale)
        # the sum and a division, because the mean over no image is NaN
        total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        return total / (labels >= 0).sum().clamp_min(1)


def contrastive_loss(projections: torch.Tensor, temperature: float, others: torch.Tensor | None = None) -> torch.Tensor:
    """Return NT-Xent (SimCLR, Chen et al. 2020, eq. 1): find every view's other view among all views of the batch.

    `projections` 2B,D': the first views of B images, then their second views. `others` N,D': views of other images, the
    batches of other devices; rows of zeros are padding and are ignored. At chance: log(2B - 1 + N).
    """
    with torch.autocast(projections.device.type, enabled=False):
        unit = F.normalize(projections.float(), dim=1)
        logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)  # 2B,2B
        if others is not None:
            others = F.normalize(others.float(), dim=1)
            is_none = (others == 0).all(1)
            logits = torch.cat([logits, (unit @ others.T / temperature).masked_fill(is_none, -torch.inf)], dim=1)
        return F.cross_entropy(logits, torch.arange(len(unit), device=unit.device).roll(len(unit) // 2))


def consistency_loss(predictions: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
    """Return the negative cosine of each view's prediction with the other view's projection, whose gradient is stopped
    (SimSiam, Chen and He 2021, eq. 1 and 3). Both 2B,D', laid out as in `contrastive_loss`. In [-1, 1]."""
    other = projections.detach().roll(len(projections) // 2, 0)
    return -F.cosine_similarity(predictions.float(), other.float(), dim=1).mean()


def margin_at(epoch: int, margin: float, warmup_epochs: int) -> float:
    """Return the margin in `epoch` (from 0): it grows evenly from 0 in epoch 0 to full in epoch `warmup_epochs`."""
    return margin if epoch >= warmup_epochs else margin * epoch / warmup_epochs

"""The loss terms of training, each in one place: its weight, its heads, what it computes, how it is described.

A new term is a class here, listed in `TERMS`, an option for its weight in config.py (marked `loss_term`), and a line in
`_TERMS` of metrics_catalogue.py, which names it.
B images, V views of each, D embedding, D' output of the heads, K pseudo-classes, H = W = image_size pixels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..config import TrainConfig
from ..data.preprocessing import to_unit
from ..distillation import Distillation, Targets, relation_loss
from ..distributed import rows_of_other_ranks
from ..model.anchor import SCALE
from ..model.map_reader import Maps
from ..model.teacher import TeacherModel
from . import losses

# Gradients of a mean over 150,000 pixels vanish in half precision unless scaled.
_GRADIENT_SCALE = 2.0**12


@dataclass(frozen=True)
class ClassTargets:
    """What the metric loss compares the images with: `prototypes` K,D', and in training `labels`, int64 B in [0, K), -1
    where an image has none. `epoch` counts from 0 and sets the margin in training."""

    prototypes: torch.Tensor
    labels: torch.Tensor | None = None
    epoch: int = 0


class Outputs:
    """The teacher's outputs for V views of B images. Each part of the model runs when first asked for, and once.

    `embedding` VB,D: the first views of all images, then their second views. `target` uint8 B,3,H,W: what the first
    views are reconstructed to; `clean` uint8 B,3,H,W: the first views without changes of colour. `maps`: feature maps by
    stride, VB,C,G,G, where a loss or the decoder needs them. `classes` is None where no metric loss is part of the run, and
    `distillation` where no student is distilled.
    """

    def __init__(
        self,
        model: TeacherModel,
        embedding: torch.Tensor,
        target: torch.Tensor,
        classes: ClassTargets | None = None,
        clean: torch.Tensor | None = None,
        maps: Maps | None = None,
        distillation: Distillation | None = None,
    ):
        self.model, self.embedding, self.target, self.classes = model, embedding, target, classes
        self.clean, self.maps, self.distillation = clean, maps or {}, distillation

    @property
    def images(self) -> int:
        """B."""
        return len(self.target)

    @cached_property
    def reconstruction(self) -> torch.Tensor:
        """Float B,3,H,W on [-1, 1], of the first views alone: decoding costs as much as embedding."""
        assert self.model.decoder is not None
        return self.model.decoder(self.decoder_input[: self.images]).float()

    @cached_property
    def decoder_input(self) -> torch.Tensor:
        """What the decoder reads: VB,D or VB,C,G,G."""
        return self.model.decoder_input(self.embedding, self.maps)

    @cached_property
    def projection(self) -> torch.Tensor:
        """VB,D'."""
        assert self.model.projection is not None
        return self.model.projection(self.embedding)

    @cached_property
    def prediction(self) -> torch.Tensor:
        """VB,D'."""
        assert self.model.prediction is not None
        return self.model.prediction(self.projection)

    @cached_property
    def targets(self) -> Targets:
        """What the teacher of a student gives for the first views."""
        assert self.distillation is not None
        return self.distillation.teacher(self.target)


class LossTerm:
    """One term of the loss. Metrics are named after it: `train/{name}_loss` and `val/{name}_loss`."""

    name: ClassVar[str]
    weight_option: ClassVar[str]  # in config.py
    heads: ClassVar[tuple[str, ...]] = ()  # of TeacherModel: "projection", "prediction"
    fewest_images: ClassVar[int] = 1  # in a validation batch; a smaller one is left out of the term's mean

    def __init__(self, config: TrainConfig):
        self.config = config

    @property
    def weight(self) -> float:
        """Return the weight from the configuration."""
        return getattr(self.config, self.weight_option)

    @property
    def is_active(self) -> bool:
        """Return whether the term is part of a run with this configuration."""
        return self.weight > 0

    @property
    def loss_name(self) -> str:
        """Return the name of the loss among metrics, without `train/` or `val/`."""
        return f"{self.name}_loss"

    def describe(self) -> str:
        """Return the weight and the term in words, for the summary of a run."""
        return f"{self.weight:g} {self.name}"

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        """Return the unweighted loss of a training batch, a scalar with a gradient."""
        raise NotImplementedError

    def validation_metrics(self, outputs: Outputs) -> dict[str, torch.Tensor]:
        """Return `{name}_loss` and further metrics of a validation batch.

        The first views of `outputs` are clean images, the second an augmented view of each.
        """
        return {self.loss_name: self.training_loss(outputs)}


class Reconstruction(LossTerm):
    """Mean squared error on [-1, 1]. Always active: with weight 0 it is measured, and adds nothing to the loss."""

    name = "recon"
    weight_option = "reconstruction_weight"

    @property
    def is_active(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{self.weight:g} reconstruction"

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        loss = F.mse_loss(outputs.reconstruction, to_unit(outputs.target))
        # a decoder of maps does not use the layers behind the last map, and DDP wants a gradient for every parameter
        return loss + 0 * outputs.embedding.float().sum() if outputs.model.decodes_map else loss

    def validation_metrics(self, outputs: Outputs) -> dict[str, torch.Tensor]:
        squares = (outputs.reconstruction - to_unit(outputs.target)).square().mean((1, 2, 3))  # B,3,H,W -> B
        return {self.loss_name: squares.mean(), "psnr": losses.psnr(squares).mean()}


class Metric(LossTerm):
    """Margin softmax over pseudo-classes, at the end of the heads, so that both learn."""

    name = "metric"
    weight_option = "metric_weight"
    heads = ("projection", "prediction")

    @property
    def is_active(self) -> bool:
        return self.config.learns_classes

    def describe(self) -> str:
        config = self.config
        return (
            f"{self.weight:g} {config.metric_loss} (margin {config.margin:g}, scale {config.scale:g}) over "
            f"{config.pseudo_classes} classes"
        )

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        classes, features = outputs.classes, outputs.prediction
        assert classes is not None and classes.labels is not None
        labels = classes.labels.repeat(len(features) // outputs.images)  # B -> VB
        margin = losses.margin_at(classes.epoch, self.config.margin, self.config.margin_warmup_epochs)
        return losses.metric_loss(
            self.config.metric_loss, features, classes.prototypes, labels, margin, self.config.scale
        )

    def validation_metrics(self, outputs: Outputs) -> dict[str, torch.Tensor]:
        """Return the loss of the augmented views with the full margin, and `agreement`: the share of images whose view
        keeps the class. The class is the prototype nearest to the clean image: validation images have no label."""
        config, classes = self.config, outputs.classes
        assert classes is not None
        clean, views = (outputs.model.predict(part) for part in outputs.embedding.split(outputs.images))
        labels = losses.cosines(clean, classes.prototypes).argmax(1)
        same = losses.cosines(views, classes.prototypes).argmax(1) == labels
        loss = losses.metric_loss(config.metric_loss, views, classes.prototypes, labels, config.margin, config.scale)
        return {self.loss_name: loss, "agreement": same.float().mean()}


class Contrastive(LossTerm):
    """NT-Xent between two views, of the projection."""

    name = "contrastive"
    weight_option = "contrastive_weight"
    heads = ("projection",)
    fewest_images = 2

    def describe(self) -> str:
        return f"{self.weight:g} contrastive (temperature {self.config.temperature:g})"

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        others = rows_of_other_ranks(outputs.projection, self.config.batch_size * self.config.views)
        return losses.contrastive_loss(outputs.projection, self.config.temperature, others)

    def validation_metrics(self, outputs: Outputs) -> dict[str, torch.Tensor]:
        """Return the loss among the images of this rank: the ranks' batches need not come in pairs."""
        return {self.loss_name: losses.contrastive_loss(outputs.projection, self.config.temperature)}


class Anchor(LossTerm):
    """Distance of the first views' maps from those of the frozen pretrained backbone (model/anchor.py)."""

    name = "anchor"
    weight_option = "anchor_weight"
    fewest_images = 2  # channels are standardised over the batch

    @property
    def is_active(self) -> bool:
        return self.config.is_anchored

    def describe(self) -> str:
        return f"{self.weight:g} anchor (maps of the pretrained backbone at {SCALE * self.config.image_size} px)"

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        assert outputs.clean is not None and outputs.model.anchor is not None
        first = {stride: found[: outputs.images] for stride, found in outputs.maps.items()}
        return outputs.model.anchor(first, outputs.clean)


class Consistency(LossTerm):
    """Each view's prediction against the other view's projection."""

    name = "consistency"
    weight_option = "consistency_weight"
    heads = ("projection", "prediction")
    fewest_images = 2

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        return losses.consistency_loss(outputs.prediction, outputs.projection)


class DistilledMaps(LossTerm):
    """Distance of the first views' maps from the teacher's (distillation/distillation.py)."""

    name = "map"
    weight_option = "map_weight"

    def describe(self) -> str:
        return f"{self.weight:g} map loss (strides {', '.join(map(str, self.config.map_strides))})"

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        assert outputs.distillation is not None
        first = {stride: found[: outputs.images] for stride, found in outputs.maps.items()}
        # no map is made of the layers behind the last of them, and DDP wants a gradient for every parameter
        return outputs.distillation.map_loss(outputs.targets, first) + 0 * outputs.embedding.float().sum()


class DistilledEmbedding(LossTerm):
    """Distance of the first views' embeddings from the teacher's."""

    name = "embedding"
    weight_option = "embedding_weight"

    def describe(self) -> str:
        return f"{self.weight:g} embedding loss"

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        assert outputs.distillation is not None
        return outputs.distillation.embedding_loss(outputs.targets, outputs.embedding[: outputs.images])


class DistilledRelations(LossTerm):
    """Distance of the cosines between the first views from the teacher's."""

    name = "relation"
    weight_option = "relation_weight"
    fewest_images = 2

    def describe(self) -> str:
        return f"{self.weight:g} relation loss"

    def training_loss(self, outputs: Outputs) -> torch.Tensor:
        return relation_loss(outputs.targets.embeddings, outputs.embedding[: outputs.images])


# Reconstruction first: the ratio of gradients compares the sum of the others with it.
TERMS: tuple[type[LossTerm], ...] = (Reconstruction, Metric, Contrastive, Anchor, Consistency)
DISTILLATION_TERMS: tuple[type[LossTerm], ...] = (DistilledMaps, DistilledEmbedding, DistilledRelations)


@dataclass(frozen=True)
class Losses:
    """The losses of a batch: `total`, the weighted `reconstruction` and the weighted sum of the `others`; `metrics` by
    name (`loss`, `recon_loss`, ...), unweighted but for `loss`."""

    total: torch.Tensor
    reconstruction: torch.Tensor
    others: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective:
    """The weighted sum of the terms that a configuration asks for."""

    def __init__(self, config: TrainConfig):
        self.config = config
        kinds = DISTILLATION_TERMS if config.distils else TERMS
        self.terms = [term for kind in kinds if (term := kind(config)).is_active]

    @property
    def heads(self) -> frozenset[str]:
        """Return the heads that the terms need: a head without a term would have no gradient."""
        return frozenset(head for term in self.terms for head in term.heads)

    def training(self, outputs: Outputs) -> Losses:
        """Return the losses of a training batch."""
        return self._sum({term.loss_name: term.training_loss(outputs) for term in self.terms})

    def validation(self, outputs: Outputs) -> Losses:
        """Return the losses and metrics of a validation batch."""
        metrics: dict[str, torch.Tensor] = {}
        for term in self.terms:
            if outputs.images >= term.fewest_images:
                metrics |= term.validation_metrics(outputs)
        return self._sum(metrics)

    def gradient_ratio(self, found: Losses, outputs: Outputs) -> torch.Tensor | None:
        """Return the norm of the gradient that the other terms send into what the decoder reads (the embedding, or the last
        map), divided by that of the reconstruction; None where no other term acts on it."""
        if not self.config.reconstruction_weight or not self.config.decodes or len(self.terms) < 2:
            return None
        given = outputs.decoder_input
        others, reconstruction = (
            torch.autograd.grad(loss * _GRADIENT_SCALE, given, retain_graph=True, allow_unused=True)[0]
            for loss in (found.others, found.reconstruction)
        )
        if others is None:  # the anchor loss does not act on the embedding
            return None
        return others.float().norm() / reconstruction.float().norm().clamp_min(1e-12)

    def _sum(self, metrics: dict[str, torch.Tensor]) -> Losses:
        weighted = {
            term.name: term.weight * metrics[term.loss_name] for term in self.terms if term.loss_name in metrics
        }
        reconstruction = weighted.pop(Reconstruction.name, torch.zeros(()))
        others = sum(weighted.values(), torch.zeros(()))
        total = reconstruction + others
        return Losses(total, reconstruction, others, {"loss": total, **metrics})

"""The losses of distillation, and the layers that carry a student's features over to the teacher's.

    teacher = Teacher("teacher/", strides=(8, 16))
    distillation = Distillation(teacher, channels={8: 88, 16: 96})      # of the student's maps
    optimizer = torch.optim.AdamW([*student.parameters(), *distillation.parameters()], lr=1e-3)
    for pixels in loader:                                               # uint8 B,3,S,S, without labels
        fine, coarse = student(pixels.float() / 127.5 - 1)              # B,88,S/8,S/8 and B,96,S/16,S/16
        loss = distillation(pixels, maps={8: fine, 16: coarse})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

Maps: FitNets (Romero et al. 2015, eq. 3) with standardised targets. Relations: RKD (Park et al. 2019, eq. 1) with cosines.
B images, C channels of a student's map and C' of the teacher's, G and G' cells along a side, D and K numbers in an embedding.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import EarTeachError
from ..model.decoder import averaged
from .teacher import Targets, Teacher


class Distillation(nn.Module):
    """The weighted sum of map, embedding and relation loss, with a projection to the teacher for each of the student's
    outputs. The projections are trained with the student, and not needed afterwards.

    The mean and deviation of the teacher's maps are buffers: a checkpoint of this module has them.
    """

    def __init__(
        self,
        teacher: Teacher,
        channels: Mapping[int, int] | None = None,
        embedding_dim: int | None = None,
        map_weight: float = 1.0,
        embedding_weight: float = 1.0,
        relation_weight: float = 1.0,
    ):
        """`channels`: stride in pixels -> channels C of the student's map, for some of the teacher's strides; None: no map
        loss. `embedding_dim`: D of the student; None: no embedding and no relation loss.

        Raises EarTeachError if there is neither, or the teacher has no map of a stride.
        """
        super().__init__()
        if not channels and not embedding_dim:
            raise EarTeachError("Distillation: has nothing to compare; give channels of maps, or embedding_dim")
        self.teacher = teacher  # not a Module: its weights are not this module's
        self.weights = {"map": map_weight, "embedding": embedding_weight, "relation": relation_weight}
        self.projections = nn.ModuleDict()
        for stride, width in (channels or {}).items():
            if stride not in teacher.channels:
                known = ", ".join(map(str, teacher.channels)) or "none"
                raise EarTeachError(
                    f"{teacher.name}: was loaded with maps of strides {known}; load it with {stride}, too"
                )
            self.projections[str(stride)] = nn.Conv2d(width, teacher.channels[stride], 1)
            for part in ("mean", "deviation"):
                self.register_buffer(f"{part}_{stride}", torch.full((teacher.channels[stride],), torch.nan))
        self.projection = nn.Linear(embedding_dim, teacher.embedding_dim) if embedding_dim else None
        self._is_measured = False
        if teacher.statistics:
            self.take_statistics()

    def take_statistics(self) -> None:
        """Take the statistics of the teacher's maps, as they are now."""
        for stride in map(int, self.projections):
            for part, values in zip(("mean", "deviation"), self.teacher.statistics[stride], strict=True):
                getattr(self, f"{part}_{stride}").copy_(values)

    def do_without_statistics(self) -> None:
        """Leave maps as they are, if the teacher's were not measured: for a step that measures time or memory only."""
        if not self.teacher.statistics:
            for name, buffer in self.named_buffers():
                buffer.fill_(0.0 if name.startswith("mean") else 1.0)

    def forward(
        self,
        images: torch.Tensor | Targets,
        maps: Mapping[int, torch.Tensor] | None = None,
        embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weighted sum of the losses, a scalar.

        `images`: RGB, uint8 B,3,S,S of any side S, or what the teacher gave for them. `maps`: stride -> B,C,G,G and
        `embedding` B,D of the student for the same images.
        """
        return sum(self.weights[name] * loss for name, loss in self.losses(images, maps, embedding).items())

    def losses(
        self,
        images: torch.Tensor | Targets,
        maps: Mapping[int, torch.Tensor] | None = None,
        embedding: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the losses by name, unweighted: `map`, `embedding`, `relation`, those that there are."""
        targets, found = images if isinstance(images, Targets) else self.teacher(images), {}
        if self.projections:
            found["map"] = self.map_loss(targets, maps or {})
        if self.projection is not None:
            if embedding is None:
                raise EarTeachError("embedding: is missing; give it, or make Distillation without embedding_dim")
            found["embedding"] = self.embedding_loss(targets, embedding)
            found["relation"] = relation_loss(targets.embeddings, embedding)
        return found

    def map_loss(self, targets: Targets, maps: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return the mean over the strides of smooth L1 plus 1 - cosine over channels, between the projected maps and the
        teacher's, standardised. The finer of two maps is averaged to the cells of the coarser one."""
        self._require_statistics()
        if missing := sorted({*map(int, self.projections)} - {*maps}):
            raise EarTeachError(
                f"maps: that of stride {missing[0]} is missing; give all that Distillation was made for"
            )
        found = []
        for stride, projection in self.projections.items():
            given, target = projection(maps[int(stride)]).float(), targets.maps[int(stride)].float()
            mean, deviation = (getattr(self, f"{part}_{stride}")[:, None, None] for part in ("mean", "deviation"))
            cells = min(given.shape[-1], target.shape[-1])
            given, target = averaged(given, cells), averaged((target - mean) / deviation, cells)
            found.append(F.smooth_l1_loss(given, target) + (1 - F.cosine_similarity(given, target, dim=1)).mean())
        return torch.stack(found).mean()

    def _require_statistics(self) -> None:
        if not self._is_measured:
            if self.teacher.statistics and not all(bool(buffer.isfinite().all()) for buffer in self.buffers()):
                self.take_statistics()
            self._is_measured = all(bool(buffer.isfinite().all()) for buffer in self.buffers())
            if not self._is_measured:
                raise EarTeachError(
                    "teacher: the statistics of its maps are not known; call teacher.measure(batches of images) first, or "
                    "load an exported folder"
                )

    def embedding_loss(self, targets: Targets, embedding: torch.Tensor) -> torch.Tensor:
        """Return the mean of 1 - cosine between the projected embedding, B,D, and the teacher's."""
        assert self.projection is not None
        return (1 - F.cosine_similarity(self.projection(embedding).float(), targets.embeddings, dim=1)).mean()


def relation_loss(of_teacher: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference between the cosines of all pairs of a batch: B,K of the teacher, B,D of the
    student. 0 for a single image."""
    count = len(embedding)
    if count < 2:
        return embedding.float().sum() * 0
    with torch.autocast(embedding.device.type, enabled=False):
        cosines = [rows @ rows.T for rows in (F.normalize(each.float(), dim=1) for each in (of_teacher, embedding))]
        return (cosines[0] - cosines[1]).square().sum() / (
            count * (count - 1)
        )  # a row's cosine with itself is 1 in both

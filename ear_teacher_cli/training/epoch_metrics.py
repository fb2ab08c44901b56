"""The metrics of an epoch: means over its training steps, and the quality of its validation embeddings.

N validation images, D embedding.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from ..data.manifest import Manifest
from ..quality import collapse, reconstruction
from ..quality.identity_metrics import can_be_scored, rank1_and_eer


class TrainingMeans:
    """Means of training metrics over an epoch, weighted by images.

    Kept here, and not by Lightning, which forgets the part of an epoch before an interruption: `sums` goes into the
    checkpoint. It holds for each name a float32 pair: the sum, and the number of images it is over.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: dict[str, torch.Tensor], images: int) -> None:
        """Add means over `images` images."""
        for name, mean in metrics.items():
            total = self.sums.setdefault(name, torch.zeros(2, device=mean.device))
            total += torch.stack((mean.detach().float() * images, total.new_full((), images)))

    def add_finite(self, values: dict[str, torch.Tensor]) -> None:
        """Add the finite values of an optimizer step. In float16 an overflow makes the norm infinite, and the scaler skips
        the step."""
        for name, value in values.items():
            total = self.sums.setdefault(name, torch.zeros(2, device=value.device))
            is_finite = torch.isfinite(value)
            total += torch.stack((torch.where(is_finite, value, 0).float(), is_finite.float()))

    def move_to(self, device: torch.device) -> None:
        """Move the sums, which a checkpoint has on the CPU."""
        self.sums = {name: total.to(device) for name, total in self.sums.items()}

    def finish(self, strategy: Any) -> dict[str, torch.Tensor]:
        """Return the means over all ranks, and begin anew."""
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        totals = strategy.reduce(torch.stack(list(sums.values())), reduce_op="sum")
        return dict(zip(sums, (totals[:, 0] / totals[:, 1]).unbind(), strict=True))

    def share_of_rank(self, strategy: Any) -> dict[str, torch.Tensor]:
        """Return an equal part of what all ranks have, for a checkpoint from which each rank continues."""
        return {name: strategy.reduce(total.clone(), reduce_op="mean") for name, total in self.sums.items()}


@dataclass(frozen=True)
class ValidationRows:
    """Embeddings of validation images as the model gives them: not at unit length, not whitened, without augmentation.

    `index`: int64 N, rows of the validation list, sorted and unique. `embeddings`: float32 N,D. Both on the CPU.
    `epoch`: epochs completed with these weights; 0 for the initial ones.
    """

    index: torch.Tensor
    embeddings: torch.Tensor
    epoch: int = 0


class ValidationOutputs:
    """Collects the embeddings of a pass over the validation images, on every rank, and measures them."""

    def __init__(self) -> None:
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def clear(self) -> None:
        """Forget what was collected."""
        self._batches = []

    def add(self, index: torch.Tensor, embeddings: torch.Tensor, views: torch.Tensor) -> None:
        """Add a batch: rows of the list B, embeddings B,D of the clean images and B,D of an augmented view of each."""
        self._batches.append((index, embeddings, views))

    def finish(self, trainer: pl.Trainer, epoch: int) -> tuple[ValidationRows | None, dict[str, float]]:
        """Return the embeddings of all ranks and their quality (see `quality`), and begin anew.

        Both are empty with fewer than two images, and the quality if an embedding is not finite: the loss reports it.
        """
        columns = _gathered(self._batches, trainer)
        self.clear()
        if not columns or len(columns[0]) < 2:
            return None, {}
        index, embeddings, views = columns
        rows = ValidationRows(index, embeddings, epoch)
        if not torch.isfinite(rows.embeddings).all():
            return rows, {}
        return rows, quality(rows, views, trainer.datamodule.val_set.manifest)


class ReferencePSNR:
    """Collects the references of `val/psnr` (quality/reconstruction.py) of a pass over the validation images, on every
    rank. `basis`: the same on all ranks."""

    def __init__(self, basis: reconstruction.PixelBasis):
        self.basis = basis
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def add(self, index: torch.Tensor, pixels: torch.Tensor) -> None:
        """Add a batch: rows of the list B, and the clean crops, uint8 B,3,H,W on the CPU."""
        found = reconstruction.reference_psnr(self.basis, pixels)
        self._batches.append((index, *(found[name] for name in reconstruction.REFERENCES)))

    def finish(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the means over the images of all ranks in dB, by name; empty if none could be read."""
        gathered = _gathered(self._batches, trainer)
        if not gathered:
            return {}
        _, *columns = gathered
        return {name: float(values.mean()) for name, values in zip(reconstruction.REFERENCES, columns, strict=True)}


def judged_images(trainer: pl.Trainer) -> int:
    """Return how many of the validation images quality is measured on."""
    return min(len(trainer.datamodule.val_set), collapse.JUDGED_ON)


def quality(rows: ValidationRows, views: torch.Tensor, manifest: Manifest) -> dict[str, float]:
    """Return the quality of validation embeddings: `retrieval` (percent), `spread`, `effective_rank` and `abs_cosine`
    (quality/collapse.py) and, where `manifest` names identities, `rank1` and `eer` (percent). `views` float32 N,D."""
    people = [ear and ear[0] for ear in map(manifest.ear, rows.index.tolist())]
    some = torch.tensor(collapse.judged_rows(people))
    embeddings = rows.embeddings[some]
    found = {
        "retrieval": collapse.retrieval(embeddings, views[some]),
        **asdict(collapse.health(embeddings)),
    }
    ears = [manifest.ear(row) for row in rows.index[some].tolist()]
    named = [i for i, ear in enumerate(ears) if ear]
    if can_be_scored([ears[i] for i in named]):
        rank1, eer = rank1_and_eer(embeddings[named].numpy(), [str(ears[i]) for i in named])
        found |= {"rank1": 100 * rank1, "eer": 100 * eer}
    return found


def _gathered(batches: Sequence[tuple[torch.Tensor, ...]], trainer: pl.Trainer) -> list[torch.Tensor]:
    """Return the columns of the batches of all ranks on the CPU, one row for each image, by the first column: int64, the
    rows of the list. The others become float32. Empty without an image."""
    columns = [torch.cat(column) for column in zip(*batches, strict=True)]
    if trainer.world_size > 1:
        columns = _on_all_ranks(columns, trainer.world_size)
    if not columns:
        return []
    index, order = torch.unique(columns[0].cpu(), return_inverse=True)  # ranks may share an image to come out even
    first = torch.empty(len(index), dtype=torch.long).scatter_(0, order, torch.arange(len(order)))
    return [index, *(column.float().cpu()[first] for column in columns[1:])]


def _on_all_ranks(columns: list[torch.Tensor], world_size: int) -> list[torch.Tensor]:
    """Return the columns of all ranks, one after the other; a rank whose images were all unreadable has none."""
    everything: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everything, [column.cpu() for column in columns])
    return [torch.cat(parts) for parts in zip(*(found for found in everything if found), strict=True)]

"""Passes over images without training: of the training set for pseudo-labels, whitening, PCA of the pixels and the start
of the decoder, of the validation set for the baseline. All in evaluation mode, without augmentation, in full precision.

M readable images, D embedding. `module`: an EarTeacherLightningModule with a Trainer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch

from ..console import Console
from ..distillation import MEASURED_ON, Distillation
from ..distributed import Ranks
from ..errors import EarTeachError
from ..quality.reconstruction import COMPONENTS, FITTED_ON, PixelBasis
from .epoch_metrics import ReferencePSNR, ValidationOutputs, ValidationRows

Result = TypeVar("Result")


@contextmanager
def evaluation_mode(module: pl.LightningModule) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and back to the mode before."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def embed_train_set(module: pl.LightningModule, rows: range, about: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Embed the readable ones of `rows` of the training images on this rank alone, with the progress `about`, if given.

    Returns (float32 M,D, their rows int64 M), on the CPU. Raises EarTeachError if none can be read.
    """
    return _joined(_embedded(module, rows, about))


def embed_train_set_together(module: pl.LightningModule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Embed all readable training images, each rank its share, in the batches that one rank would make.

    Returns (float32 M,D, their rows int64 M) on rank 0, on the CPU, and None on the others. Raises EarTeachError, on rank
    0 alone, if none can be read or too many cannot.
    """
    trainer, images = module.trainer, len(module.train_set)
    rank, world = trainer.global_rank, trainer.world_size
    mine = Ranks(rank, world).block(images, module.config.batch_size)
    batches: list[Any] = []
    try:
        batches = _embedded(module, mine, "making pseudo-classes")
    except EarTeachError as error:
        if world == 1:
            raise
        batches = [error]
    if world == 1:
        return _joined(batches)
    gathered: list[Any] = [None] * world
    torch.distributed.gather_object(batches, gathered if rank == 0 else None)
    if rank:
        return None
    everything = [batch for of_rank in gathered for batch in of_rank]
    for batch in everything:
        if isinstance(batch, EarTeachError):
            raise batch
    return _joined(everything)


def _embedded(module: pl.LightningModule, rows: range, about: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each batch of `rows` of the training images (float32 B,D, rows int64 B) of those that can be read."""
    found = []
    console = module.console if about else Console(quiet=True)
    with evaluation_mode(module), console.progress(about, len(rows), "images") as steps:
        for batch in module.trainer.datamodule.clean_dataloader(rows) if rows else ():
            module.unreadable.record("train", batch, module.trainer, this_rank_only=True)
            if len(batch["index"]):
                found.append((module(batch["pixels"].to(module.device)).float().cpu(), batch["index"]))
            steps.advance(len(batch["index"]) + len(batch["bad"]))
    return found


def _joined(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    if not batches:
        raise EarTeachError("training images: not one could be read; run earteach validate-data")
    embeddings, rows = (torch.cat(column) for column in zip(*batches, strict=True))
    return embeddings, rows


def clean_train_batches(module: pl.LightningModule, most: int, about: str) -> Iterator[Any]:
    """Yield batches of at most `most` of the training images, evenly spaced, on this rank alone, with the progress
    `about`; without unreadable images."""
    images = len(module.train_set)
    rows = range(0, images, -(-images // most))
    with module.console.progress(about, len(rows), "images") as steps:
        for batch in module.trainer.datamodule.clean_dataloader(rows):
            module.unreadable.record("train", batch, module.trainer, this_rank_only=True)
            if len(batch["index"]):
                yield batch
            steps.advance(len(batch["index"]) + len(batch["bad"]))


def read_train_crops(module: pl.LightningModule, most: int) -> torch.Tensor | None:
    """Read at most `most` of the training crops, evenly spaced, on this rank alone: uint8 M,3,H,W, clean; None if none
    of them can be read."""
    about = "reading crops for the PCA of their pixels"
    found = [batch["pixels"] for batch in clean_train_batches(module, most, about)]
    return torch.cat(found) if found else None


def measure_teacher(module: pl.LightningModule, distillation: Distillation) -> None:
    """Measure the teacher's maps on training images, on rank 0 for all ranks, unless its export has their statistics.

    Raises EarTeachError, on all ranks, if too many images cannot be read.
    """
    teacher = distillation.teacher
    if not teacher.channels or teacher.statistics:
        return

    def measure() -> dict[int, tuple[torch.Tensor, ...]]:
        batches = clean_train_batches(module, MEASURED_ON, "measuring the teacher's maps")
        teacher.measure(batch["pixels"].to(module.device) for batch in batches)
        return teacher.statistics

    teacher.statistics = on_first_rank(module, measure)
    distillation.take_statistics()


def on_first_rank(module: pl.LightningModule, compute: Callable[[], Result]) -> Result:
    """Compute something on rank 0 and return it on all ranks; raise its EarTeachError on all of them."""
    result: Any = None
    if module.trainer.is_global_zero:
        try:
            result = compute()
        except EarTeachError as error:
            result = error
    result = module.trainer.strategy.broadcast(result)
    if isinstance(result, EarTeachError):
        raise EarTeachError.on_all_ranks(str(result))
    return result


def fit_pixel_basis(module: pl.LightningModule, components: int) -> PixelBasis | None:
    """Fit the mean and the principal components of the training crops on rank 0, and return them on all ranks; None if
    no crop can be read. Raises EarTeachError, on all ranks, if too many cannot."""

    def fit() -> PixelBasis | None:
        crops = read_train_crops(module, FITTED_ON)
        return None if crops is None else PixelBasis.fit(crops, components)

    return on_first_rank(module, fit)


def measure_initial_weights(module: pl.LightningModule) -> tuple[ValidationRows | None, dict[str, float]]:
    """Embed the validation images, each rank its share, and return the embeddings of all with their quality (see
    `ValidationOutputs.finish`) and the references of the PSNR (see `ReferencePSNR.finish`)."""
    outputs, datamodule = ValidationOutputs(), module.trainer.datamodule
    basis = fit_pixel_basis(module, COMPONENTS) if module.config.decodes else None
    references = ReferencePSNR(basis) if basis else None
    progress = module.console.progress("evaluating the initial weights", len(datamodule.val_set), "images")
    with evaluation_mode(module), progress as steps:
        for batch in datamodule.val_dataloader():
            module.unreadable.record("val", batch, module.trainer)
            if len(batch["index"]):
                views = (module(batch[name].to(module.device)) for name in ("pixels", "view"))
                outputs.add(batch["index"].to(module.device), *views)
                if references:
                    references.add(batch["index"], batch["pixels"])
            steps.advance(len(batch["index"]) + len(batch["bad"]))
    rows, quality = outputs.finish(module.trainer, 0)
    return rows, quality | (references.finish(module.trainer) if references else {})

"""The closed-form start of the decoder: the best linear map from the initial embeddings to the training images.

Trained from random weights, the transposed convolutions need hundreds of steps to show more than the mean image; a
ridge regression on principal components shows more than that before the first step, in seconds.
M images, D embedding, K principal components of the images at S x S pixels.
"""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from ..errors import EarTeachError
from ..model.decoder import COMPONENTS, basis_side
from ..quality.reconstruction import FITTED_ON, PixelBasis, ridge
from .passes import clean_train_batches, evaluation_mode


def start_decoder(module: pl.LightningModule) -> None:
    """Set the linear part of the decoder from at most FITTED_ON training images; on rank 0, for all ranks.

    Raises EarTeachError, on all ranks, if too many images cannot be read.
    """
    result: Any = None
    if module.trainer.is_global_zero:
        try:
            result = _fit(module)
        except EarTeachError as error:
            result = error
    result = module.trainer.strategy.broadcast(result)
    if isinstance(result, EarTeachError):
        raise EarTeachError.on_all_ranks(str(result))
    if result is not None:
        module.model.decoder.set_linear(*(tensor.to(module.device) for tensor in result))


def _fit(module: pl.LightningModule) -> tuple[torch.Tensor, ...] | None:
    """Return the arguments of `LinearStart.set_linear`; None if the images do not differ or none can be read."""
    side = basis_side(module.config.image_size)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with evaluation_mode(module):
        for batch in clean_train_batches(module, FITTED_ON, "starting the decoder"):
            small = F.interpolate(batch["pixels"].float(), size=(side, side), mode="bilinear", antialias=True)
            embeddings = module(batch["pixels"].to(module.device)).float().cpu()
            found.append((embeddings, small.round().clamp(0, 255).byte()))
    if not found:
        return None
    embeddings, crops = (torch.cat(parts) for parts in zip(*found, strict=True))
    basis = PixelBasis.fit(crops, COMPONENTS)
    if not len(basis.components):
        return None
    codes = basis.project(crops) / basis.deviations  # M,K, of unit variance
    weight, bias = ridge(embeddings, codes, basis.deviations)
    components = basis.components * basis.deviations[:, None]
    return weight, bias, basis.mean.unflatten(0, (3, side, side)), components.unflatten(1, (3, side, side))

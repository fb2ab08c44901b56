"""The closed-form start of the decoder: the best linear map from the initial embeddings to the training images.

Trained from random weights, the transposed convolutions need hundreds of steps to show more than the mean image; a
ridge regression on principal components shows more than that before the first step, in seconds.
M images, D embedding, K principal components of the images at S x S pixels.
"""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from ..model.decoder import COMPONENTS, basis_side
from ..quality.reconstruction import FITTED_ON, PixelBasis, ridge
from .passes import clean_train_batches, evaluation_mode, on_first_rank


def start_decoder(module: pl.LightningModule) -> None:
    """Set the linear part of the decoder from at most FITTED_ON training images; on rank 0, for all ranks.

    Raises EarTeachError, on all ranks, if too many images cannot be read.
    """
    fitted = on_first_rank(module, lambda: _fit(module))
    if fitted is not None:
        module.model.decoder.set_linear(*fitted)


def _fit(module: pl.LightningModule) -> tuple[torch.Tensor, ...] | None:
    """Return the arguments of `LinearStart.set_linear`; None if the images do not differ or none can be read."""
    side = basis_side(module.config.image_size)
    rows, crops = [], []
    with evaluation_mode(module):
        for batch in clean_train_batches(module, FITTED_ON, "starting the decoder"):
            rows.append(module(batch["pixels"].to(module.device)).float().cpu())
            small = F.interpolate(batch["pixels"].float(), size=(side, side), mode="bilinear", antialias=True)
            crops.append(small.round().clamp(0, 255).byte())
    if not rows:
        return None
    basis = PixelBasis.fit(torch.cat(crops), COMPONENTS)
    if not len(basis.components):
        return None
    codes = basis.project(torch.cat(crops)) / basis.deviations  # M,K, of unit variance
    weight, bias = ridge(torch.cat(rows), codes, basis.deviations)
    return weight, bias, basis.mean, basis.components * basis.deviations[:, None]

"""The closed-form start of the decoder: the best linear map from the initial embeddings, or last feature maps, to the
training images.

Trained from random weights, the transposed convolutions need hundreds of steps to show more than the mean image; a
ridge regression on principal components shows more than that before the first step, in seconds.
M images, D' values of the embedding or map, K principal components of the images at S x S pixels.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    values, crops = [], []
    with _statistics_of_training(module) as of_batches:
        for batch in clean_train_batches(module, FITTED_ON, "starting the decoder"):
            if of_batches and len(batch["index"]) < 2:  # the last one: a batch has no statistics of one image
                continue
            given = module.model.decoder_input(*module.features(batch["pixels"].to(module.device)))
            values.append(module.model.decoder.values(given).float().cpu())
            small = F.interpolate(batch["pixels"].float(), size=(side, side), mode="bilinear", antialias=True)
            crops.append(small.round().clamp(0, 255).byte())
    if not values:
        return None
    basis = PixelBasis.fit(torch.cat(crops), COMPONENTS)
    if not len(basis.components):
        return None
    rows = torch.cat(values)
    codes = basis.project(torch.cat(crops)) / basis.deviations  # M,K, of unit variance
    weight, bias = ridge(rows, codes, basis.deviations)
    deviations, centre = torch.std_mean(rows, 0, correction=0)
    return weight, bias, basis.mean, basis.components * basis.deviations[:, None], centre, deviations


@contextmanager
def _statistics_of_training(module: pl.LightningModule) -> Iterator[bool]:
    """Evaluation mode, but with the batch statistics of those layers of the backbone that normalise by them in training: a
    random backbone's stored ones are not those of any image. Yield whether there are such layers."""
    module.model.train()
    layers = [
        layer
        for layer in module.model.backbone.modules()
        # synchronised ones would wait for the other ranks
        if isinstance(layer, _BatchNorm) and layer.training and not isinstance(layer, nn.SyncBatchNorm)
    ]
    before = copy.deepcopy([layer.state_dict() for layer in layers])
    with evaluation_mode(module):
        for layer in layers:
            layer.train()
        try:
            yield bool(layers)
        finally:
            for layer, state in zip(layers, before, strict=True):
                layer.load_state_dict(state)

"""What the principal axes of the embeddings hold, drawn by the decoder: "eigen-ears"."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..console import Console
from ..data.preprocessing import from_unit
from ..drawing import labelled_grid
from ..embedding.embedder import crops_of
from ..errors import EarTeachError
from ..model.checkpoint import Checkpoint
from ..quality import reconstruction
from ..quality.principal_axes import PrincipalAxes
from ..training.module import EarTeacherLightningModule, module_of
from .validation_embeddings import ValidationEmbeddings

AXES = 6
FITTED_ON = 256  # images whose maps are regressed on the axes
STEPS = -3, -2, 0, 2, 3  # standard deviations from the mean
# The PSNR of the decoder must exceed that of the mean image by this many dB: a squared error lower by 37 %. In
# examples/docs/metrics.md.
SHOWN_FROM = 2.0


@dataclass(frozen=True)
class DrawnAxes:
    """A grid of decoded images with its description, or why there is none."""

    image: Image.Image | None = None
    description: str = ""
    why_not: str = ""


def draw_principal_axes(
    checkpoint: Checkpoint, found: ValidationEmbeddings, metrics: Mapping[str, float], console: Console
) -> DrawnAxes:
    """Draw the mean embedding, and the mean moved by STEPS along each of the first AXES principal axes, as images.

    A decoder of maps draws the map that goes with such an embedding: the linear regression of the maps of FITTED_ON of
    the images on that axis alone. `found`: embeddings of the weights of `checkpoint`. `metrics`: of its epoch, name -> value,
    without `val/`. Raises WeightsError if the checkpoint does not hold the weights of its configuration, EarTeachError
    if no image can be read any more.
    """
    if why_not := _unfit(metrics):
        return DrawnAxes(why_not=why_not)
    axes = PrincipalAxes.fit(found.unscaled, AXES)
    if not len(axes.axes):
        return DrawnAxes(why_not="the embeddings do not differ")
    module = module_of(checkpoint)
    given = torch.from_numpy(axes.along(STEPS))  # K,M,D
    if module.model.decodes_map:
        given = _expected_maps(module, found, axes, console)  # K,M,C,G,G
    labels = [(f"axis {number}", f"{_percent(share)} of the variance") for number, share in enumerate(axes.shares, 1)]
    heads = [f"{step:+d} sd" if step else "mean" for step in STEPS]
    image = labelled_grid(_decode(module.model.decoder, given), labels, heads)
    return DrawnAxes(image, ", ".join(": ".join(label) for label in labels))


def _unfit(metrics: Mapping[str, float]) -> str:
    """Return why the reconstructions are too poor to draw the axes, or not known to be good enough; '' if they are not.

    Below SHOWN_FROM the decoder hardly reacts to the embedding: steps along an axis would show its noise.
    """
    if not {"psnr", reconstruction.MEAN_IMAGE} <= metrics.keys():
        return (
            f"metrics.csv has no val/psnr or no val/{reconstruction.MEAN_IMAGE} of this epoch, so it is not known whether "
            "reconstructions show more than the mean image"
        )
    above = round(metrics["psnr"] - metrics[reconstruction.MEAN_IMAGE], 1)  # as it is stated
    if above >= SHOWN_FROM:
        return ""
    if not math.isfinite(above):
        return "reconstructions are not finite"
    side = "below" if above < 0 else "above"
    return (
        f"reconstructions are {abs(above):.1f} dB {side} the mean image; {SHOWN_FROM:g} dB above it are needed to show more "
        "than noise"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %"


@torch.inference_mode()
def _expected_maps(
    module: EarTeacherLightningModule, found: ValidationEmbeddings, axes: PrincipalAxes, console: Console
) -> torch.Tensor:
    """Return the last feature map to be expected of an embedding at STEPS along each axis: K,M,C,G,G."""
    config, manifest = module.config, found.manifest()
    rows = range(0, len(manifest), -(-len(manifest) // FITTED_ON))
    options = (config.batch_size, config.num_workers, config.load_timeout, console, "drawing the principal axes", rows)
    good, maps = [], []
    for kept, pixels, _ in crops_of(manifest, module.preprocessing, *options):
        if pixels is not None:
            good += kept
            maps.append(module.model.decoder_input(*module.features(pixels)))
    if not good:
        raise EarTeachError(f"{manifest.source}: no image can be read any more")
    about = torch.cat(maps).double()  # N,C,G,G
    mean = about.mean(0)
    scores = torch.from_numpy((found.unscaled[good] - axes.mean) @ axes.axes.T)  # N,K
    scores = scores - scores.mean(0)
    slopes = torch.einsum("nk,nchw->kchw", scores, about - mean)
    slopes = slopes / scores.square().sum(0).clamp_min(1e-12)[:, None, None, None]  # per unit along the axis
    moves = torch.from_numpy(np.multiply.outer(axes.deviations, np.asarray(STEPS, np.float64)))  # K,M
    return mean + moves[..., None, None, None] * slopes[:, None]


@torch.inference_mode()
def _decode(decoder: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Return images uint8 K,M,3,H,W of what the decoder reads: K,M,D or K,M,C,G,G."""
    return from_unit(decoder(given.float().flatten(0, 1))).unflatten(0, given.shape[:2])

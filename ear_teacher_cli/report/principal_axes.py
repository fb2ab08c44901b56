"""What the principal axes of the embeddings hold, drawn by the decoder: "eigen-ears"."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.preprocessing import from_unit
from ..drawing import labelled_grid
from ..errors import WeightsError
from ..files import printable
from ..model.checkpoint import Checkpoint
from ..model.decoder import build_decoder
from ..quality import reconstruction
from ..quality.principal_axes import PrincipalAxes

AXES = 6
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


def draw_principal_axes(checkpoint: Checkpoint, embeddings: np.ndarray, metrics: Mapping[str, float]) -> DrawnAxes:
    """Draw the mean embedding, and the mean moved by STEPS along each of the first AXES principal axes, as images.

    `embeddings`: N,D of the weights of `checkpoint`, as the backbone gives them. `metrics`: of its epoch, name -> value,
    without `val/`. Raises WeightsError if the checkpoint holds no decoder of its configuration.
    """
    if why_not := _unfit(metrics):
        return DrawnAxes(why_not=why_not)
    found = PrincipalAxes.fit(embeddings, AXES)
    if not len(found.axes):
        return DrawnAxes(why_not="the embeddings do not differ")
    labels = [(f"axis {number}", f"{_percent(share)} of the variance") for number, share in enumerate(found.shares, 1)]
    heads = [f"{step:+d} sd" if step else "mean" for step in STEPS]
    image = labelled_grid(_decode(_decoder(checkpoint), found.along(STEPS)), labels, heads)
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


def _decoder(checkpoint: Checkpoint) -> nn.Module:
    """Return the decoder of a checkpoint, in evaluation mode."""
    decoder = build_decoder(checkpoint.config, checkpoint.embedding_dim)
    state = {k.removeprefix("decoder."): v for k, v in checkpoint.model_state.items() if k.startswith("decoder.")}
    try:
        decoder.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"{printable(checkpoint.path)}: its decoder does not fit its configuration; use another checkpoint"
        ) from error
    return decoder.eval()


@torch.inference_mode()
def _decode(decoder: nn.Module, embeddings: np.ndarray) -> torch.Tensor:
    """Return images uint8 K,M,3,H,W of embeddings K,M,D."""
    images = decoder(torch.from_numpy(embeddings).float().flatten(0, 1))
    return from_unit(images).unflatten(0, embeddings.shape[:2])

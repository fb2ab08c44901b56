"""Draw the reconstruction collage, a GIF of how it changes over a run, labelled grids, and sheets of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import whole_file

if TYPE_CHECKING:  # evaluate draws without torch
    import torch

_INK, _PAPER, _FAINT = (24, 28, 36), (250, 250, 248), (110, 116, 128)


def collage(originals: "torch.Tensor", reconstructions: "torch.Tensor", title: str) -> Image.Image:
    """Return two rows: originals above, reconstructions below, the PSNR of each underneath.

    Both uint8 B,3,H,W. Tiles keep the size the model sees, between 96 and 224 pixels.
    """
    count, side = len(originals), min(224, max(96, originals.shape[-1]))
    gap, left, top, foot = 6, 118, 40, 24
    width = max(left + count * (side + gap) + gap, left + 420)
    page = Image.new("RGB", (width, top + 2 * (side + gap) + foot), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((12, 10), title, fill=_INK, font=_font(17))
    for row, (name, images) in enumerate((("original", originals), ("reconstruction", reconstructions))):
        y = top + row * (side + gap)
        draw.text((12, y + side // 2), name, fill=_FAINT, font=_font(14), anchor="lm")
        for column in range(count):
            page.paste(
                to_image(images[column]).resize((side, side), Image.Resampling.BICUBIC),
                (left + column * (side + gap), y),
            )
    for column, decibel in enumerate(psnr_of_bytes(originals, reconstructions)):
        x = left + column * (side + gap) + side // 2
        draw.text((x, top + 2 * (side + gap) + 8), f"{decibel:.1f} dB", fill=_FAINT, font=_font(13), anchor="mm")
    return page


def labelled_grid(images: "torch.Tensor", labels: Sequence[tuple[str, str]], heads: Sequence[str]) -> Image.Image:
    """Return uint8 R,C,3,H,W as R rows and C columns: two lines of text beside each row, one above each column.

    Tiles keep the size the model sees, between 128 and 160 pixels.
    """
    rows, columns, side = len(labels), len(heads), min(160, max(128, images.shape[-1]))
    gap, top, fonts = 6, 34, (_font(15), _font(13))
    left = 24 + round(max(font.getlength(line) for label in labels for font, line in zip(fonts, label, strict=True)))
    page = Image.new("RGB", (left + columns * (side + gap), top + rows * (side + gap)), _PAPER)
    draw = ImageDraw.Draw(page)
    for column, head in enumerate(heads):
        draw.text((left + column * (side + gap) + side // 2, top // 2), head, fill=_INK, font=_font(14), anchor="mm")
    for row, label in enumerate(labels):
        y = top + row * (side + gap)
        for font, line, colour, middle in zip(fonts, label, (_INK, _FAINT), (-10, 10), strict=True):
            draw.text((12, y + side // 2 + middle), line, fill=colour, font=font, anchor="lm")
        for column in range(columns):
            tile = to_image(images[row, column]).resize((side, side), Image.Resampling.BICUBIC)
            page.paste(tile, (left + column * (side + gap), y))
    return page


@dataclass(frozen=True)
class Pair:
    """Two crops and what to write beneath them."""

    left: Image.Image
    right: Image.Image
    score: str
    names: tuple[str, str]


def pairs_sheet(sections: Sequence[tuple[str, Sequence[Pair]]]) -> Image.Image:
    """Return titled sections of pairs, three to a row, each with its score above and its two names below."""
    side, gap, line, columns = 132, 20, 18, 3
    wide, high = 2 * side + 4, line + side + 2 * line + gap
    rows = [-(-len(pairs) // columns) for _, pairs in sections]
    page = Image.new("RGB", (gap + columns * (wide + gap), gap + sum(46 + n * high for n in rows)), _PAPER)
    draw, top = ImageDraw.Draw(page), gap
    for (title, pairs), count in zip(sections, rows, strict=True):
        draw.text((gap, top), title, fill=_INK, font=_font(18))
        top += 36
        for place, pair in enumerate(pairs):
            x, y = gap + place % columns * (wide + gap), top + place // columns * high
            draw.text((x, y), pair.score, fill=_INK, font=_font(13))
            page.paste(pair.left.resize((side, side), Image.Resampling.BICUBIC), (x, y + line))
            page.paste(pair.right.resize((side, side), Image.Resampling.BICUBIC), (x + side + 4, y + line))
            for number, name in enumerate(pair.names):
                _fitted(draw, (x, y + line + side + 4 + number * (line - 2)), name, wide)
        top += 10 + count * high
    return page


def _fitted(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """Draw small text, shortened in the middle if it is too long: both ends of a path are informative."""
    font, cut = _font(12), text
    while draw.textlength(cut, font=font) > width and len(text) > 8:
        text = text[: len(text) // 2 - 1] + text[len(text) // 2 + 1 :]
        cut = text[: len(text) // 2] + "..." + text[len(text) // 2 :]
    draw.text(place, cut, fill=_FAINT, font=font)


def psnr_of_bytes(originals: "torch.Tensor", reconstructions: "torch.Tensor") -> list[float]:
    """Return the PSNR in dB of each pair of uint8 images B,3,H,W: 10 log10(255^2 / MSE)."""
    mse = (originals.double() - reconstructions.double()).square().mean((1, 2, 3)).clamp_min(1e-6)
    return (10 * (255.0**2 / mse).log10()).tolist()


def to_image(pixels: "torch.Tensor") -> Image.Image:
    """Return uint8 3,H,W as an RGB image."""
    return Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy().transpose(1, 2, 0)))


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a PNG, which appears under its name only when complete."""
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")


def read_saved_image(path: Path) -> Image.Image:
    """Read an image that `save_image` wrote. Raises OSError if it is damaged."""
    with Image.open(path) as image:
        return image.convert("RGB")


def save_gif(frames: Sequence[Path], path: Path, most: int = 60) -> None:
    """Write an endless GIF of at most `most` frames, evenly chosen, at half size; the last one is shown longer."""
    if len(frames) < 2:
        return
    chosen = sorted(
        {round(i * (len(frames) - 1) / (min(most, len(frames)) - 1)) for i in range(min(most, len(frames)))}
    )
    images = []
    for i in chosen:
        frame = read_saved_image(frames[i])
        images.append(frame.resize((frame.width // 2, frame.height // 2), Image.Resampling.LANCZOS))
    pause = [max(80, 3000 // len(images))] * (len(images) - 1) + [2500]
    with whole_file(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=pause, loop=0)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)

"""Draw photos with boxes, so that a user sees whether a list is read as it was meant."""

import hashlib
import os
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import EarTeachError, ImageError
from ..files import printable, whole_file
from .boxes import BOX_FORMATS, Box, to_corners
from .crop import read_image

Colour = tuple[int, int, int]
BoxedPhoto = tuple[Image.Image, list[tuple[Box, Colour]], str]  # photo, boxes with their colours, caption

PAPER, INK = (250, 250, 248), (24, 28, 36)
_SIDE, _GAP, _FOOT = 220, 10, 20  # px of a photo, between photos, for its caption
# One colour per order of the numbers.
_COLOURS = {"xyxy": (214, 40, 40), "xywh": (0, 140, 70), "cxcywh": (30, 80, 200)}


def draw_readings(
    where: str, rows: Sequence[tuple[str | None, Box]], orders: Sequence[str], most: int = 10
) -> str | None:
    """Draw up to `most` photos, each with its box read in each of `orders`; return the file, None if none could be
    drawn.

    `rows`: (path, the box's numbers in pixels as the list `where` gives them). The file lies in the folder for
    temporary files, one for each list.
    """
    shown: list[BoxedPhoto] = []
    seen: set[str] = set()
    for path, box in rows:
        if path is None or path in seen or len(shown) >= most:
            continue
        try:
            photo = read_image(path).image
        except ImageError:
            continue
        seen.add(path)
        boxes = [(_corners(box, order), _COLOURS[order]) for order in orders]
        shown.append((photo, boxes, printable(os.path.basename(path))))
    if not shown:
        return None
    legend = [(f"as {BOX_FORMATS[order]}", _COLOURS[order]) for order in orders]
    mark = hashlib.sha256(os.path.abspath(where).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    name = os.path.join(tempfile.gettempdir(), f"earteach-boxes-{mark}.png")
    try:
        with whole_file(name) as temporary:
            photo_page(shown, "Which boxes are around the ears?", legend).save(temporary, format="PNG")
    except (OSError, EarTeachError):
        return None
    return name


def _corners(box: Box, order: str) -> Box:
    x1, y1, x2, y2 = to_corners(np.array(box, dtype=np.float64), order)
    return float(x1), float(y1), float(x2), float(y2)


def photo_page(
    photos: Sequence[BoxedPhoto],
    title: str,
    legend: Sequence[tuple[str, Colour]] = (),
    columns: int = 5,
) -> Image.Image:
    """Draw a page of photos, each with coloured boxes and a caption. `legend`: (text, colour)."""
    columns = min(columns, len(photos))
    rows = -(-len(photos) // columns)
    head = 34 + 18 * bool(legend)
    page = Image.new("RGB", (max(560, columns * (_SIDE + _GAP) + _GAP), head + rows * (_SIDE + _FOOT + _GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, 8), title, fill=INK, font=ImageFont.load_default(16))
    x = _GAP
    for text, colour in legend:
        draw.rectangle((x, 37, x + 10, 47), outline=colour, width=2)
        draw.text((x + 16, 34), text, fill=INK, font=ImageFont.load_default(12))
        x += 40 + int(draw.textlength(text, font=ImageFont.load_default(12)))
    for place, (photo, boxes, caption) in enumerate(photos):
        left = _GAP + place % columns * (_SIDE + _GAP)
        top = head + place // columns * (_SIDE + _FOOT + _GAP)
        page.paste(_with_boxes(photo, boxes), (left, top))
        draw.text((left, top + _SIDE + 2), caption[:34], fill=(90, 96, 108), font=ImageFont.load_default(11))
    return page


def _with_boxes(photo: Image.Image, boxes: Sequence[tuple[Box, Colour]]) -> Image.Image:
    """Scale a photo into a square of _SIDE px, with a margin on which boxes that leave the photo are drawn."""
    tile = Image.new("RGB", (_SIDE, _SIDE), (226, 226, 222))
    scale = 0.82 * _SIDE / max(photo.size)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    corner = (_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2
    tile.paste(photo.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST), corner)
    draw = ImageDraw.Draw(tile)
    for box, colour in boxes:
        try:
            x1, y1, x2, y2 = (round(corner[i % 2] + value * scale) for i, value in enumerate(box))
        except (ValueError, OverflowError):  # NaN, infinity
            continue
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        limits = [max(-2, min(_SIDE + 1, value)) for value in (x1, y1, x2, y2)]
        draw.rectangle(limits, outline=colour, width=2)
    return tile

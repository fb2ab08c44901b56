"""The contact sheet of validate-data: photos with their boxes, above the smallest and blurriest crops."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from ..errors import ImageError
from ..files import printable
from .box_drawing import INK, PAPER, BoxedPhoto, photo_page
from .crop import cut, read_image
from .image_checks import PREVIEW, SMALL, CropStats
from .manifest import Manifest

_RIGHT, _WRONG = (0, 140, 70), (214, 40, 40)  # colours of boxes
_MAX_PHOTOS, _MAX_CROPS = 10, 60
_SIDE, _GAP, _FOOT, _HEAD = 120, 8, 34, 34  # px of a crop, between crops, for its caption, for the title
T = TypeVar("T")


def contact_sheet(
    manifests: Sequence[Manifest],
    wrong: Collection[tuple[str, int | None]],
    stats: Mapping[tuple[int, int], CropStats],
) -> Image.Image | None:
    """Draw the sheet, RGB; None if there is neither a photo with a box nor a crop.

    `wrong`: (source of a manifest, ear) with an impossible box. `stats`: (number of a manifest, ear) -> its crop.
    """
    pages = [page for page in (_photos(manifests, wrong), _worst_crops(manifests, stats)) if page is not None]
    if not pages:
        return None
    sheet = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), PAPER)
    top = 0
    for page in pages:
        sheet.paste(page, (0, top))
        top += page.height
    return sheet


def _photos(manifests: Sequence[Manifest], wrong: Collection[tuple[str, int | None]]) -> Image.Image | None:
    """Draw up to ten photos with all their boxes, up to half of them with a wrong one; None if no row has a box.

    They show whether the list is read as it was meant.
    """
    boxed: dict[tuple[int, str], list[int]] = defaultdict(list)
    for number, manifest in enumerate(manifests):
        for index, box in enumerate(manifest.boxes):
            if box is not None:
                boxed[number, manifest.paths[index]].append(index)
    bad = [key for key, rows in boxed.items() if any((manifests[key[0]].source, i) in wrong for i in rows)]
    good = [key for key in boxed if key not in set(bad)]
    first = _spread(bad, max(_MAX_PHOTOS // 2, _MAX_PHOTOS - len(good)))
    shown: list[BoxedPhoto] = []
    for number, name in first + _spread(good, _MAX_PHOTOS - len(first)):
        manifest, rows = manifests[number], boxed[number, name]
        try:
            photo = read_image(manifest.file(rows[0])).image
        except ImageError:
            continue
        colours = [_WRONG if (manifest.source, i) in wrong else _RIGHT for i in rows]
        boxes = [(box, colour) for i, colour in zip(rows, colours, strict=True) if (box := manifest.boxes[i])]
        place = f"{printable(Path(manifest.source).stem)[:16]} {manifest.rows[rows[0]]}"
        shown.append((photo, boxes, f"{place}: {photo.width} x {photo.height}"))
    if not shown:
        return None
    legend = [("box", _RIGHT), *([("wrong box", _WRONG)] if bad else [])]
    return photo_page(shown, f"{len(shown)} of {len(boxed)} photos with boxes, as they were read", legend)


def _spread(keys: list[T], most: int) -> list[T]:
    """Return at most `most` of the keys, evenly spread."""
    return keys if len(keys) <= most else [keys[i * len(keys) // most] for i in range(most)]


def _worst_crops(manifests: Sequence[Manifest], stats: Mapping[tuple[int, int], CropStats]) -> Image.Image | None:
    """Draw the smallest crops, then the blurriest, each with its row and size; None if there is no crop."""
    worst = sorted(stats, key=lambda ear: (min(stats[ear].size, SMALL), stats[ear].sharpness))[:_MAX_CROPS]
    if not worst:
        return None
    columns = min(10, len(worst))
    rows = -(-len(worst) // columns)
    size = max(560, columns * (_SIDE + _GAP) + _GAP), _HEAD + rows * (_SIDE + _FOOT + _GAP)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    title = f"the {len(worst)} smallest and blurriest of {len(stats)} ears"
    draw.text((_GAP, 8), title, fill=INK, font=ImageFont.load_default(16))
    for place, (number, index) in enumerate(worst):
        x, y = _GAP + place % columns * (_SIDE + _GAP), _HEAD + place // columns * (_SIDE + _FOOT + _GAP)
        manifest, crop = manifests[number], stats[number, index]
        preview = cut(read_image(manifest.file(index)).image, manifest.boxes[index], PREVIEW)
        page.paste(preview.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (x, y))
        name = f"{Path(manifest.source).stem[:16]} {manifest.rows[index]}"
        caption = f"{name}\n{crop.size:.0f} px, sharp {crop.sharpness:.0f}"
        draw.text((x, y + _SIDE + 2), caption, fill=(90, 96, 108), font=ImageFont.load_default(11))
    return page

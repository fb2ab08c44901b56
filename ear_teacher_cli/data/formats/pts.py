"""`.pts`: landmarks of one image in a file beside it (`version: 1`, `n_points: N`, `{`, lines of x y, `}`).

Each ear has its own `n_points: N` and braces.
"""

import re
from pathlib import Path

import numpy as np

from ...errors import ManifestError
from ...files import short_message
from ..boxes import Box, box_around
from .rows import points_of

SUFFIX = ".pts"
_BLOCK = re.compile(r"n_points\s*:\s*(\d+)[^{}]*\{([^{}]*)\}", re.IGNORECASE)


def read_boxes(path: Path, where: str) -> list[Box]:
    """Return a box around each ear's landmarks, x1, y1, x2, y2 in pixels, 10 % larger on each side.

    Raises ManifestError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{where}: cannot be read ({short_message(error)}); check the file") from error
    blocks = _BLOCK.findall(text)
    if not blocks:
        raise ManifestError(f"{where}: is not a .pts file; it needs n_points: N, and N lines of x y between braces")
    if text.count("{") != len(blocks):
        raise ManifestError(
            f"{where}: has "
            f"{text.count('{')} opening braces, but {len(blocks)} blocks with n_points and a closing brace; "
            "write n_points: N before each ear's points"
        )
    return [box_around(_points(count, lines, where)) for count, lines in blocks]


def _points(count: str, lines: str, where: str) -> np.ndarray:
    try:
        points = np.array([[float(v) for v in line.split()] for line in lines.strip().splitlines()])
        if points.shape != (int(count), 2):
            raise ValueError
    except ValueError:
        raise ManifestError(
            f"{where}: does not have the {count} lines of x y that n_points states; correct the file"
        ) from None
    return points_of(points, where, 0)

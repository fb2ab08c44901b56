"""`.pts`: landmarks of one image in a file of its own, beside it (`version: 1`, `n_points: N`, `{`, x y lines, `}`)."""

import re
from pathlib import Path

import numpy as np

from ...errors import ManifestError
from ...files import brief
from ..boxes import Box, box_around
from .rows import points_of

SUFFIX = ".pts"


def read_box(path: Path, where: str) -> Box:
    """The box around the landmarks, x1, y1, x2, y2 in pixels, 10 % larger on each side. Raises ManifestError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{where}: cannot be read ({brief(error)}); check the file") from error
    found = re.search(r"n_points\s*:\s*(\d+).*?\{(.*?)\}", text, re.DOTALL | re.IGNORECASE)
    if not found:
        raise ManifestError(f"{where}: is no .pts file; it needs n_points: N and N lines of x y between braces")
    try:
        points = np.array([[float(v) for v in line.split()] for line in found[2].strip().splitlines()])
        if points.shape != (int(found[1]), 2):
            raise ValueError
    except ValueError:
        raise ManifestError(f"{where}: does not hold the {found[1]} lines of x y that n_points says; mend it") from None
    return box_around(points_of(points, where, 0))

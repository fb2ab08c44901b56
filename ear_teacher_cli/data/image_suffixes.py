"""Suffixes of image files, and which of them this installation reads."""

from functools import cache
from importlib.util import find_spec

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".ppm", ".pgm"})
HEIC = frozenset({".heic", ".heif"})  # need the extra `heic` (pillow-heif)


@cache
def can_read_heic() -> bool:
    """Whether the extra `heic` is installed."""
    return find_spec("pillow_heif") is not None


def readable() -> frozenset[str]:
    """Return the suffixes of images that this installation reads."""
    return IMAGES | HEIC if can_read_heic() else IMAGES

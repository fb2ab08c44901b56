"""Names of image files: which suffixes are images, and which of them can be read here."""

from functools import cache
from importlib.util import find_spec

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".ppm", ".pgm"})
HEIC = frozenset({".heic", ".heif"})  # with the extra `heic` (pillow-heif)


@cache
def can_read_heic() -> bool:
    return find_spec("pillow_heif") is not None


def readable() -> frozenset[str]:
    """Suffixes of images that this installation reads."""
    return IMAGES | HEIC if can_read_heic() else IMAGES

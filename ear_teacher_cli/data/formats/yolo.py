"""YOLO's labels: `.txt` beside the image, or under `labels/` where the image is under `images/`; a line per box.

`class centre-x centre-y width height [confidence]`, as a share of the image's width and height.
"""

import posixpath
from pathlib import Path

from ...errors import ManifestError
from ...files import brief
from ..boxes import Box

SUFFIX = ".txt"


def label_paths(image: str) -> list[str]:
    """Where the labels of an image (a path with slashes) can be: beside it, or in the sister folder `labels`."""
    stem = posixpath.splitext(image)[0]
    parts = stem.split("/")
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    sisters = ["/".join([*parts[: places[-1]], "labels", *parts[places[-1] + 1 :]])] if places else []
    return [f"{path}{SUFFIX}" for path in (stem, *sisters)]


def read_boxes(path: Path, where: str) -> list[Box] | None:
    """The boxes as they stand there, centre x, centre y, width, height from 0 to 1; None if these are no labels.

    Raises ManifestError where only some lines are labels, or they are of polygons or keypoints.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{where}: cannot be read ({brief(error)}); check the file") from error
    boxes: list[Box] = []
    for number, words in enumerate(lines, 1):
        try:
            kind, *values = map(float, words)
        except ValueError:
            if not boxes:
                return None  # any other text
            raise ManifestError(f"{where} line {number}: is not numbers; mend or remove the line") from None
        if len(values) < 4 and not boxes:
            return None
        if len(values) not in (4, 5):
            raise ManifestError(
                f"{where} line {number}: has {len(values) + 1} numbers; YOLO's labels of boxes have 5 (class, centre x, "
                "centre y, width, height): export boxes, not polygons or keypoints"
            )
        if not all(-0.01 <= value <= 1.01 for value in values[:4]):
            raise ManifestError(f"{where} line {number}: is not from 0 to 1, as YOLO's labels are; mend it")
        x, y, width, height = values[:4]
        boxes.append((x, y, width, height))
    return boxes

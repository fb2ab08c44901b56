"""`.json`: COCO detection (boxes x, y, width, height; or keypoints), or a list of objects as in JSON Lines."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import ManifestError
from ...files import printable, short_message
from ..boxes import Box, box_around
from .columns import IDENTITY, OFFERED, SIDE, compare, names_of
from .json_lines import read_objects
from .rows import Rows, four_numbers, path_text, points_of, stated_size


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Rows are annotations in file order; all categories are read as ears. Raises ManifestError."""
    content = _content(path, where)
    if isinstance(content, list) and all(isinstance(line, dict) for line in content):
        return read_objects(enumerate(content), where, identity_column)
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ManifestError(f"{where}: has no 'images' and 'annotations'; a .json manifest is COCO (else use .jsonl)")
    rows = Rows(order="xywh", named_by="COCO")
    try:
        names = _image_names(content["images"], where)
        categories = {c["id"]: c["name"] for c in content.get("categories") or [] if isinstance(c, dict)}
        from_points = []
        for number, mark in enumerate(content["annotations"]):
            if str(mark["image_id"]) not in names:
                raise ManifestError(f"{where} annotation {number}: image_id {mark['image_id']} is not in 'images'")
            name = path_text(names[str(mark["image_id"])], where, number)
            box = _box(mark, where, number)
            from_points.append(mark.get("bbox") is None)
            identity = _identity(mark, categories, identity_column, where, number)
            rows.add(number, name, box, identity, next((mark[s] for s in SIDE if s in mark), None))
        rows.from_points = any(from_points)
        for image in content["images"]:
            if size := stated_size(image.get("width"), image.get("height")):
                rows.sizes[str(image["file_name"]).replace("\\", "/")] = size
        rows.warnings = _warnings(content, categories, names, identity_column, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"{where}: is not COCO ({type(error).__name__}: {error}); see cocodataset's format"
        ) from error
    return rows


def _image_names(images: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """Id (as text: some tools write numbers here and texts there) -> file name. Raises ManifestError for two of one id."""
    names: dict[str, Any] = {}
    for image in images:
        key = str(image["id"])
        if names.setdefault(key, image["file_name"]) != image["file_name"]:
            raise ManifestError(
                f"{where}: the image id {printable(key)[:40]} is that of two images ({printable(names[key])}, "
                f"{printable(image['file_name'])}), as when files are joined; number the images anew"
            )
    return names


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the file with the annotations `kept`, (annotation, 0); images and categories stay."""
    content = _content(source, printable(source))
    numbers = {row for row, _ in kept}
    if isinstance(content, list):
        content = [line for number, line in enumerate(content) if number in numbers]
    else:
        content["annotations"] = [mark for number, mark in enumerate(content["annotations"]) if number in numbers]
    out.write_text(json.dumps(content), encoding="utf-8")


def _content(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not readable as JSON ({short_message(error)}); save it as UTF-8") from error


def _box(mark: dict[str, Any], where: str, number: int) -> Box:
    """The box as x, y, width, height; around the keypoints where an annotation has no box."""
    if mark.get("bbox") is None and mark.get("keypoints") is not None:
        x1, y1, x2, y2 = box_around(points_of(mark["keypoints"], where, number))
        return x1, y1, x2 - x1, y2 - y1
    if mark.get("bbox") is None:
        raise ManifestError(f"{where} annotation {number}: has neither bbox nor keypoints; export boxes")
    return four_numbers(mark["bbox"], where, number)


def _identity(mark: dict, categories: dict, wanted: str | None, where: str, number: int) -> Any:
    if wanted is None:
        return next((mark[name] for name in IDENTITY if name in mark), None)
    if compare(wanted) in ("category", "categoryname", "class"):
        return categories.get(mark["category_id"])
    found = {compare(name): value for name, value in mark.items()}
    if compare(wanted) not in found:
        raise ManifestError(
            f"{where} annotation {number}: has no {printable(wanted)!r} (found: {names_of(mark)}); "
            "give --identity-column one of these, or category"
        )
    return found[compare(wanted)]


def _warnings(content: dict, categories: dict, names: dict, identity_column: str | None, where: str) -> list[str]:
    marks = content["annotations"]
    warnings = []
    used = Counter(categories.get(mark.get("category_id")) for mark in marks if mark.get("category_id") in categories)
    if len(used) > 1 and identity_column is None:
        found = ", ".join(f"{count} {printable(name)}" for name, count in used.most_common(5))
        warnings.append(
            f"{where}: annotations of {len(used)} categories are all read as ears ({found}); remove what is no ear, or "
            "add --identity-column category if the categories are people"
        )
    bare = len(names) - len({str(mark["image_id"]) for mark in marks})
    if bare:
        warnings.append(f"{where}: {bare} of {len(names)} images have no annotation and are left out")
    offered = sorted({name for mark in marks[:100] for name in mark if compare(name) in map(compare, OFFERED)})
    if offered and identity_column is None:
        warnings.append(
            f"{where}: {names_of(offered)} of the annotations is not used; if it says who is on the image, add "
            f"--identity-column {printable(offered[0])}"
        )
    return warnings

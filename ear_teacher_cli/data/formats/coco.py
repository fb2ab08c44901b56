"""`.json`: COCO (boxes x, y, width, height, or keypoints), or a list of objects as in JSON Lines."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import ManifestError
from ...files import printable, short_message
from ..boxes import Box, box_around
from .columns import IDENTITY, MAYBE_IDENTITY, SIDE, compare, names_of
from .json_lines import read_objects
from .rows import Rows, four_numbers, path_text, points_of, stated_size


def read(path: Path, where: str, identity_column: str | None) -> Rows:
    """Read the annotations as rows, in file order; all categories are taken as ears. Raises ManifestError."""
    content = _content(path, where)
    if isinstance(content, list) and all(isinstance(line, dict) for line in content):
        return read_objects(enumerate(content), where, identity_column)
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ManifestError(f"{where}: has no 'images' and 'annotations'; give COCO, or a list of objects")
    rows = Rows(order="xywh", named_by="COCO")
    try:
        names = _image_names(content["images"], where)
        categories = {c["id"]: c["name"] for c in content.get("categories") or [] if isinstance(c, dict)}
        for number, annotation in enumerate(content["annotations"]):
            image_id = annotation["image_id"]
            if str(image_id) not in names:
                raise ManifestError(
                    f"{where} annotation {number}: its image_id {printable(image_id)[:40]} is not in 'images'; correct "
                    "it"
                )
            name = path_text(names[str(image_id)], where, number)
            box = _box(annotation, where, number)
            rows.from_points |= annotation.get("bbox") is None
            identity = _identity(annotation, categories, identity_column, where, number)
            rows.add(number, name, box, identity, next((annotation[s] for s in SIDE if s in annotation), None))
        for image in content["images"]:
            if size := stated_size(image.get("width"), image.get("height")):
                rows.sizes[str(image["file_name"]).replace("\\", "/")] = size
        rows.warnings = _warnings(content, categories, names, identity_column, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{where}: is not COCO ({type(error).__name__}: {error}); export it again") from error
    return rows


def _image_names(images: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """Return id -> file name; ids as text, because some tools mix numbers and texts.

    Raises ManifestError if two images have the same id.
    """
    names: dict[str, Any] = {}
    for image in images:
        key = str(image["id"])
        if names.setdefault(key, image["file_name"]) != image["file_name"]:
            raise ManifestError(
                f"{where}: two images have the id {printable(key)[:40]} ({printable(names[key])}, "
                f"{printable(image['file_name'])}), perhaps because files were joined; give each image its own id"
            )
    return names


def keep(source: Path, out: Path, kept: Iterable[tuple[int, int]], identity_column: str | None) -> None:
    """Copy the file with only the annotations `kept`, (annotation, 0); images and categories are unchanged."""
    content = _content(source, printable(source))
    numbers = {row for row, _ in kept}
    if isinstance(content, list):
        content = [line for number, line in enumerate(content) if number in numbers]
    else:
        content["annotations"] = [one for number, one in enumerate(content["annotations"]) if number in numbers]
    out.write_text(json.dumps(content), encoding="utf-8")


def _content(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: is not readable as JSON ({short_message(error)}); save it as UTF-8") from error


def _box(annotation: dict[str, Any], where: str, number: int) -> Box:
    """Return the box as x, y, width, height; around the keypoints if the annotation has no box."""
    if annotation.get("bbox") is not None:
        return four_numbers(annotation["bbox"], where, number)
    if annotation.get("keypoints") is not None:
        x1, y1, x2, y2 = box_around(points_of(annotation["keypoints"], where, number))
        return x1, y1, x2 - x1, y2 - y1
    raise ManifestError(f"{where} annotation {number}: has neither bbox nor keypoints; export boxes")


def _identity(annotation: dict, categories: dict, identity_column: str | None, where: str, number: int) -> Any:
    if identity_column is None:
        return next((annotation[name] for name in IDENTITY if name in annotation), None)
    wanted = compare(identity_column)
    if wanted in ("category", "categoryname", "class"):
        return categories.get(annotation["category_id"])
    found = {compare(name): value for name, value in annotation.items()}
    if wanted not in found:
        raise ManifestError(
            f"{where} annotation {number}: has no {printable(identity_column)!r} (found: {names_of(annotation)}); "
            "give --identity-column one of these, or category"
        )
    return found[wanted]


def _warnings(content: dict, categories: dict, names: dict, identity_column: str | None, where: str) -> list[str]:
    annotations = content["annotations"]
    warnings = []
    used = Counter(categories[id] for one in annotations if (id := one.get("category_id")) in categories)
    if len(used) > 1 and identity_column is None:
        found = ", ".join(f"{count} {printable(name)}" for name, count in used.most_common(5))
        warnings.append(
            f"{where}: annotations of {len(used)} categories are all read as ears ({found}); remove those that are not "
            "ears, or add --identity-column category if the categories are people"
        )
    unmarked = len(names) - len({str(one["image_id"]) for one in annotations})
    if unmarked:
        warnings.append(f"{where}: {unmarked} of {len(names)} images have no annotation and are left out")
    keys = {name for one in annotations[:100] for name in one}
    possible = sorted(name for name in keys if compare(name) in map(compare, MAYBE_IDENTITY))
    if possible and identity_column is None:
        warnings.append(
            f"{where}: {names_of(possible)} of the annotations is not used; if it names the people on the images, add "
            f"--identity-column {printable(possible[0])}"
        )
    return warnings

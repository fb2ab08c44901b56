"""YOLO's labels: `.txt` beside the image, or in a folder `labels` beside, in or instead of one of the image's folders.

A line per box: `class centre-x centre-y width height [confidence]`, as a share of the image's width and height, between
spaces or commas; the class is a number or a name. Names are compared without case.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ManifestError
from ...files import printable, short_message
from ..boxes import Box
from .tree import Tree

SUFFIX = ".txt"
# Names of classes, in the folder of the labels or above it.
_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
# Texts that tools put into folders of labels.
_NO_LABELS = frozenset("classes readme license notes train val valid test predefined_classes".split())


@dataclass
class Labels:
    """The labels of one image."""

    boxes: list[Box] = field(default_factory=list)  # centre x, centre y, width, height from 0 to 1
    classes: list[str] = field(default_factory=list)  # as they stand there, one per box
    problem: str = ""  # where and why the text is not understood
    may_be_other: bool = False  # it may be any other text, a caption


def read_labels(path: Path, where: str) -> Labels:
    """Read one file; what is not understood is in `problem`. Raises ManifestError if it cannot be opened."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return Labels(problem=f"{where}: is not UTF-8 ({short_message(error)}); save it as UTF-8", may_be_other=True)
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read ({short_message(error)}); check the file") from error
    labels = Labels()
    for number, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        reason, name, box = _parsed(words)
        if box is None:
            numbers = sum(map(_is_number, words))
            other = not labels.boxes and numbers < 4
            return Labels(problem=f"{where} line {number}: {reason}", may_be_other=other)
        labels.boxes.append(box)
        labels.classes.append(name)
    return labels


def _parsed(words: list[str]) -> tuple[str, str, Box | None]:
    """(why it is no label, the class, the box) of one line."""
    named = next((place for place, word in enumerate(words) if _is_number(word)), len(words))
    name, numbers = " ".join(words[:named]), words[named:]
    if not name and numbers:
        name, numbers = _plain(numbers[0]), numbers[1:]
    layout = "YOLO's labels of boxes are: class, centre x, centre y, width, height"
    if not all(map(_is_number, numbers)):
        return f"is not numbers; {layout}: correct or remove the line", name, None
    if len(numbers) not in ((4, 5) if not named else (4,)):
        what = f"{len(words)} numbers" if not named else f"{len(numbers)} numbers after {printable(name)[:40]!r}"
        hint = ". Export boxes, not polygons or keypoints" if len(numbers) > 5 else ""
        return f"has {what}; {layout}{hint}", name, None
    x, y, width, height = map(float, numbers[:4])
    if not all(-0.01 <= value <= 1.01 for value in (x, y, width, height)):
        return "is not from 0 to 1, as YOLO's labels are; correct it", name, None
    return "", name, (x, y, width, height)


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|[-+]?inf", word, re.IGNORECASE) is not None


def _plain(number: str) -> str:
    """`0` of `0.0`: some tools write classes so."""
    return str(int(float(number))) if re.fullmatch(r"\d+\.0*", number) else number


def find_labels(tree: Tree) -> dict[str, list[str]]:
    """Image -> the texts that may be its labels. Raises ManifestError if one may be of images in two folders."""
    find = tree.by_stem(SUFFIX)
    claims: dict[str, list[tuple[int, str]]] = defaultdict(list)
    if any(path.lower().endswith(SUFFIX) for path in tree.files):
        for image in tree.images:
            ranks: dict[str, int] = {}
            for rank, stem in _places(posixpath.splitext(image)[0]):
                if path := find(stem):
                    ranks[path] = min(rank, ranks.get(path, rank))
            for path, rank in ranks.items():
                claims[path].append((rank, image))
    found: dict[str, list[str]] = defaultdict(list)
    for path, claimed in sorted(claims.items()):
        surest = min(rank for rank, _ in claimed)
        images = [image for rank, image in claimed if rank == surest]
        other = next((image for image in images if posixpath.dirname(image) != posixpath.dirname(images[0])), None)
        if other:
            raise ManifestError(
                f"{printable(tree.root / path)}: can be of {printable(images[0])} or {printable(other)}; put labels beside "
                "their images, or into labels/ where the images are in images/"
            )
        for image in images:
            found[image].append(path)
    return found


def _places(stem: str) -> Iterator[tuple[int, str]]:
    """Where labels of an image can be, without their suffix: (rank, path), a low rank for what is surer."""
    parts = stem.split("/")
    yield 0, stem
    for place, part in enumerate(parts[:-1]):
        yield (1 if part.casefold() == "images" else 3), "/".join([*parts[:place], "labels", *parts[place + 1 :]])
    for place in range(len(parts)):
        yield 2, "/".join([*parts[:place], "labels", *parts[place:]])


def read_all(tree: Tree) -> tuple[dict[str, Labels], list[str]]:
    """(image -> its labels, warnings). Raises ManifestError for what is not understood where labels are."""
    texts = find_labels(tree)
    read = {
        path: read_labels(tree.root / path, printable(tree.root / path)) for paths in texts.values() for path in paths
    }
    with_labels = {posixpath.dirname(path) for path, labels in read.items() if labels.boxes}
    for path, labels in read.items():
        sure = is_in_labels(path) or posixpath.dirname(path) in with_labels
        if labels.problem and (sure or not labels.may_be_other):
            raise ManifestError(labels.problem)
    found: dict[str, Labels] = {}
    used: set[str] = set()
    for image, paths in texts.items():
        understood = [path for path in paths if not read[path].problem]
        for path in understood[1:]:
            if read[path].boxes != read[understood[0]].boxes:
                raise ManifestError(
                    f"{printable(tree.root / image)}: has other labels in {printable(understood[0])} than in "
                    f"{printable(path)}; remove one of them"
                )
        if understood:
            found[image] = read[understood[0]]
            used.add(understood[0])
    of_file = {path: read[path].classes for path in used}
    return found, [*_class_warnings(tree, of_file), *_unmatched(tree, read)]


def is_in_labels(path: str) -> bool:
    return "labels" in path.casefold().split("/")[:-1]


def _unmatched(tree: Tree, known: dict[str, Labels]) -> list[str]:
    lone = [
        path
        for path in tree.files
        if path.lower().endswith(SUFFIX)
        and path not in known
        and is_in_labels(path)
        and posixpath.splitext(posixpath.basename(path))[0].casefold() not in _NO_LABELS
    ]
    if not lone:
        return []
    return [
        f"{printable(tree.root)}: {len(lone)} labels match no image ({printable(lone[0])}); put them beside their images, or "
        "into labels/ where the images are in images/"
    ]


def _class_warnings(tree: Tree, classes: dict[str, list[str]]) -> list[str]:
    """A warning per file of names (or for want of one) whose labels are of several classes."""
    files = {path.casefold(): path for path in tree.files}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    nearest: dict[str, str] = {}
    for path, own in classes.items():
        folder = posixpath.dirname(path)
        if folder not in nearest:
            nearest[folder] = _names_file(folder, files)
        counts[nearest[folder]].update(own)
    warnings = []
    for path, counted in sorted(counts.items()):
        if len(counted) < 2:
            continue
        names = _class_names(tree.root / path) if path else {}
        said = ", ".join(f"{count} {printable(names.get(name, name))}" for name, count in counted.most_common(5))
        where = printable(tree.root / (posixpath.dirname(path) if path else ""))
        warnings.append(
            f"{where}: YOLO labels of {len(counted)} classes are all read as ears ({said}); remove what is no ear"
        )
    return warnings


def _names_file(folder: str, files: dict[str, str]) -> str:
    while True:
        for name in _NAMES:
            if path := files.get(posixpath.join(folder, name).casefold()):
                return path
        if not folder:
            return ""
        folder = posixpath.dirname(folder)


def _class_names(path: Path) -> dict[str, str]:
    """Number -> name, of `classes.txt` (a name a line) or `names:` in a YAML file, as far as it is simple; else none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return {}
    if path.suffix.lower() not in (".yaml", ".yml"):
        return _numbered([line for line in text.splitlines() if line.strip()])
    block = r"(?:#.*)?\n((?:[ \t]*(?:-|\d+\s*:).*\n?)+)"
    found = re.search(rf"^names\s*:[ \t]*(?:([\[{{])([^\]}}]*)|{block})", text, re.MULTILINE)
    if not found:
        return {}
    entries = found[2].split(",") if found[1] else found[3].splitlines()
    keyed = [re.fullmatch(r"\s*['\"]?(\d+)['\"]?\s*:\s*(.*)", entry) for entry in entries]
    if all(keyed):
        return {match[1]: _unquoted(match[2]) for match in keyed if match}
    return _numbered([re.sub(r"^\s*-\s*", "", entry) for entry in entries if entry.strip()])


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(number): _unquoted(name) for number, name in enumerate(names)}


def _unquoted(name: str) -> str:
    return re.sub(r"\s+#.*$", "", name).strip().strip("'\"")

"""YOLO labels: `.txt` beside the image, or in a folder `labels` beside, in or instead of one of the image's folders.

One line per box: `class centre-x centre-y width height [confidence]`, as shares of the image's width and height,
separated by spaces or commas; the class is a number or a name. Case of file names is ignored.
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
# Files with the names of classes, in the folder of the labels or above it.
_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
# Other text files (without .txt) that tools put into folders of labels.
_NO_LABELS = frozenset("classes readme license notes train val valid test predefined_classes".split())


@dataclass
class Labels:
    """The labels of one image."""

    boxes: list[Box] = field(default_factory=list)  # centre x, centre y, width, height from 0 to 1
    classes: list[str] = field(default_factory=list)  # number or name, one per box
    problem: str = ""  # message, if the file is not understood
    may_be_other: bool = False  # it may be another text, such as a caption


def read_labels(path: Path, where: str) -> Labels:
    """Read one file; if it is not understood, set `problem`. Raises ManifestError if it cannot be opened."""
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
        problem, name, box = _parse(words)
        if box is None:
            other = not labels.boxes and sum(map(_is_number, words)) < 4
            return Labels(problem=f"{where} line {number}: {problem}", may_be_other=other)
        labels.boxes.append(box)
        labels.classes.append(name)
    return labels


def _parse(words: list[str]) -> tuple[str, str, Box | None]:
    """Parse one line: return (problem or "", class, box or None)."""
    name_words = next((place for place, word in enumerate(words) if _is_number(word)), len(words))
    name, numbers = " ".join(words[:name_words]), words[name_words:]
    if not name and numbers:
        name, numbers = _class_number(numbers[0]), numbers[1:]
    layout = "a YOLO label of a box is: class, centre x, centre y, width, height"
    if not all(map(_is_number, numbers)):
        return f"has words among its numbers; {layout}: correct or remove the line", name, None
    if len(numbers) not in ((4, 5) if not name_words else (4,)):
        found = f"{len(words)} numbers" if not name_words else f"{len(numbers)} numbers after {printable(name)[:40]!r}"
        hint = ". Export boxes, not polygons or keypoints" if len(numbers) > 5 else ""
        return f"has {found}; {layout}{hint}", name, None
    x, y, width, height = map(float, numbers[:4])
    if not all(-0.01 <= value <= 1.01 for value in (x, y, width, height)):
        return "is not from 0 to 1, as numbers of YOLO labels are; correct it", name, None
    return "", name, (x, y, width, height)


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|[-+]?inf", word, re.IGNORECASE) is not None


def _class_number(number: str) -> str:
    """Return `0` for `0.0`, which some tools write."""
    return str(int(float(number))) if re.fullmatch(r"\d+\.0*", number) else number


def find_labels(tree: Tree) -> dict[str, list[str]]:
    """Return image -> files that may be its labels.

    Raises ManifestError if a file may belong to images in two folders.
    """
    find = tree.by_stem(SUFFIX)
    claims: dict[str, list[tuple[int, str]]] = defaultdict(list)
    if any(path.lower().endswith(SUFFIX) for path in tree.files):
        for image in tree.images:
            ranks: dict[str, int] = {}
            for rank, stem in _candidates(posixpath.splitext(image)[0]):
                if path := find(stem):
                    ranks[path] = min(rank, ranks.get(path, rank))
            for path, rank in ranks.items():
                claims[path].append((rank, image))
    found: dict[str, list[str]] = defaultdict(list)
    for path, claimed in sorted(claims.items()):
        best = min(rank for rank, _ in claimed)
        images = [image for rank, image in claimed if rank == best]
        other = next((image for image in images if posixpath.dirname(image) != posixpath.dirname(images[0])), None)
        if other:
            raise ManifestError(
                f"{printable(tree.root / path)}: can belong to {printable(images[0])} or {printable(other)}; put "
                "labels beside their images, or into labels/ if the images are in images/"
            )
        for image in images:
            found[image].append(path)
    return found


def _candidates(stem: str) -> Iterator[tuple[int, str]]:
    """Yield (rank, path without suffix) where the labels of an image can be; lower ranks are more reliable.

    `stem`: path of the image without its suffix.
    """
    parts = stem.split("/")
    yield 0, stem
    for place, part in enumerate(parts[:-1]):
        yield (1 if part.casefold() == "images" else 3), "/".join([*parts[:place], "labels", *parts[place + 1 :]])
    for place in range(len(parts)):
        yield 2, "/".join([*parts[:place], "labels", *parts[place:]])


def read_all(tree: Tree) -> tuple[dict[str, Labels], list[str]]:
    """Return (image -> its labels, warnings). Raises ManifestError for labels that are not understood."""
    files = find_labels(tree)
    read = {
        path: read_labels(tree.root / path, printable(tree.root / path)) for paths in files.values() for path in paths
    }
    with_labels = {posixpath.dirname(path) for path, labels in read.items() if labels.boxes}
    for path, labels in read.items():
        expected = is_in_labels(path) or posixpath.dirname(path) in with_labels
        if labels.problem and (expected or not labels.may_be_other):
            raise ManifestError(labels.problem)
    found: dict[str, Labels] = {}
    used: set[str] = set()
    for image, paths in files.items():
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
    classes = {path: read[path].classes for path in used}
    return found, [*_class_warnings(tree, classes), *_unmatched_warnings(tree, read)]


def is_in_labels(path: str) -> bool:
    """Whether a file lies below a folder `labels`."""
    return "labels" in path.casefold().split("/")[:-1]


def _unmatched_warnings(tree: Tree, known: dict[str, Labels]) -> list[str]:
    unmatched = [
        path
        for path in tree.files
        if path.lower().endswith(SUFFIX)
        and path not in known
        and is_in_labels(path)
        and posixpath.splitext(posixpath.basename(path))[0].casefold() not in _NO_LABELS
    ]
    if not unmatched:
        return []
    return [
        f"{printable(tree.root)}: {len(unmatched)} labels match no image ({printable(unmatched[0])}); put them beside "
        "their images, or into labels/ if the images are in images/"
    ]


def _class_warnings(tree: Tree, classes: dict[str, list[str]]) -> list[str]:
    """Return a warning per file of class names (one for all labels without it) whose labels are of several classes.

    `classes`: file of labels -> its classes.
    """
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
        found = ", ".join(f"{count} {printable(names.get(name, name))}" for name, count in counted.most_common(5))
        where = printable(tree.root / (posixpath.dirname(path) if path else ""))
        warnings.append(
            f"{where}: YOLO labels of {len(counted)} classes are all read as ears ({found}); remove those that are not "
            "ears"
        )
    return warnings


def _names_file(folder: str, files: dict[str, str]) -> str:
    """Return the nearest file of class names in a folder or above it; "" if there is none."""
    while True:
        for name in _NAMES:
            if path := files.get(posixpath.join(folder, name).casefold()):
                return path
        if not folder:
            return ""
        folder = posixpath.dirname(folder)


def _class_names(path: Path) -> dict[str, str]:
    """Return number -> name from `classes.txt` (one name per line) or simple `names:` in a YAML file; else an empty
    dict."""
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

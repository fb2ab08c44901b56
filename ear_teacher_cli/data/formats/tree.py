"""List the files below a folder, and find the images that a list means. Paths start from the folder and have
slashes."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ...errors import ManifestError
from ...files import printable
from .. import image_suffixes


@dataclass
class Tree:
    """The files below a folder that are not hidden, sorted. Links to folders are not followed."""

    root: Path
    images: list[str] = field(default_factory=list)  # that this installation reads
    heic: list[str] = field(default_factory=list)  # images that it does not read
    files: list[str] = field(default_factory=list)  # all others
    warnings: list[str] = field(default_factory=list)  # about folders that were left out

    def suffix_counts(self) -> str:
        """Return the number of images that cannot be read, by suffix: `3 .heic`."""
        counts = Counter(posixpath.splitext(path)[1].lower() for path in self.heic)
        return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))

    def by_stem(self, suffix: str) -> Callable[[str], str | None]:
        """Return a function from a path without suffix to the file with that name and `suffix`; case is ignored."""
        stems: dict[str, list[str]] = {}
        for path in self.files:
            stem, own = posixpath.splitext(path)
            if own.lower() == suffix:
                stems.setdefault(stem.casefold(), []).append(path)

        def find(stem: str) -> str | None:
            paths = stems.get(stem.casefold(), ())
            return next((path for path in paths if path.startswith(stem)), paths[0] if paths else None)

        return find

    def image(self, path: str) -> str | None:
        """Return the image of a path, or the only one that differs in case; None if there is none."""
        if path in self._known:
            return path
        same = self._folded.get(path.casefold(), ())
        return same[0] if len(same) == 1 else None

    def images_named(self, name: str) -> list[str]:
        """Return the images whose file name is that of `name`; case is ignored."""
        return self._by_name.get(posixpath.basename(name).casefold(), [])

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.images)

    @cached_property
    def _folded(self) -> dict[str, list[str]]:
        return _grouped(self.images, str.casefold)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _grouped(self.images, lambda path: posixpath.basename(path).casefold())


def _grouped(paths: Collection[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return groups


def walk(root: Path) -> Tree:
    """Find the files. Folders that cannot be read are warned of, the root itself raises OSError."""
    os.listdir(root)  # os.walk says nothing of a folder that it may not read
    tree = Tree(root)

    def unreadable(error: OSError) -> None:
        tree.warnings.append(f"{printable(error.filename)}: cannot be read ({error.strerror}), and is left out")

    for directory, names, files in os.walk(root, onerror=unreadable):
        names[:] = sorted(name for name in names if not name.startswith("."))  # errors come in order
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        for name in names:
            if os.path.islink(os.path.join(directory, name)):
                link = printable(os.path.join(directory, name))
                tree.warnings.append(f"{link}: a symbolic link to a folder, which is not followed")
        for name in files:
            if not name.startswith("."):
                _put(tree, name if below == "." else f"{below}/{name}")
    for paths in (tree.images, tree.heic, tree.files):
        paths.sort()
    return tree


def _put(tree: Tree, path: str) -> None:
    suffix = posixpath.splitext(path)[1].lower()
    if suffix in image_suffixes.readable():
        tree.images.append(path)
    elif suffix in image_suffixes.HEIC:
        tree.heic.append(path)
    else:
        tree.files.append(path)


def locate(tree: Tree, listing: str, names: Collection[str]) -> dict[str, str]:
    """Return name -> image for the names in the list at `listing`; names without an image are left out.

    Names start from the list's folder, from a folder above it, or from the working directory; else they are the ends of
    paths below the nearest of these folders. All names of a list start from the same folder: the first from which at
    least half of them lead to images, else the one from which most do. Raises ManifestError if a name means several
    images.
    """
    best: dict[str, list[str]] = {}
    for attempt in _attempts(tree, posixpath.dirname(listing)):
        found = {name: images for name in names if (images := attempt(name))}
        if len(found) > len(best):
            best = found
        if found and 2 * len(found) >= len(names):
            break
    where, owner = printable(tree.root / listing), dict[str, str]()
    for name, images in best.items():
        if len(images) > 1:
            raise ManifestError(
                f"{where}: {printable(name)} can be {printable(images[0])} or {printable(images[1])}; let its paths "
                "start from the folder that it is in"
            )
        other = owner.setdefault(images[0], name)
        if posixpath.normpath(other) != posixpath.normpath(name):
            raise ManifestError(
                f"{where}: {printable(other)} and {printable(name)} both lead to {printable(images[0])}; let its paths "
                "start from the folder that it is in"
            )
    return {name: images[0] for name, images in best.items()}


def _attempts(tree: Tree, below: str) -> Iterator[Callable[[str], list[str]]]:
    """Yield functions from a name to the images that it can mean, the most reliable first. `below`: folder of the
    list."""
    folders = [below]
    while folders[-1]:
        folders.append(posixpath.dirname(folders[-1]))
    # the root as typed and with links resolved: no name needs access to the disk
    roots = {os.path.join(root, "") for root in (os.path.abspath(tree.root), os.path.realpath(tree.root))}

    def from_folder(folder: str) -> Callable[[str], list[str]]:
        return lambda name: _one(tree.image(posixpath.normpath(posixpath.join(folder, name))))

    def from_here(name: str) -> list[str]:
        path = os.path.abspath(name)
        inside = (path.removeprefix(root).replace(os.sep, "/") for root in roots if path.startswith(root))
        return _one(next(filter(None, map(tree.image, inside)), None))

    def ending(folder: str) -> Callable[[str], list[str]]:
        return lambda name: _ending(tree, folder, name)

    for folder in folders:
        yield from_folder(folder)
        if folder == below:
            yield from_here
        yield ending(folder)


def _one(image: str | None) -> list[str]:
    return [] if image is None else [image]


def _ending(tree: Tree, folder: str, name: str) -> list[str]:
    """Return the images below a folder whose paths end with `name`; for an absolute path (of another machine), the
    longest image path with which it ends."""
    prefix = f"{folder}/" if folder else ""
    images = [path for path in tree.images_named(name) if path.startswith(prefix)]
    wanted = f"/{posixpath.normpath(name).casefold()}"
    if not (name.startswith("/") or re.match(r"[A-Za-z]:/", name)):
        return [path for path in images if f"/{path.casefold()}".endswith(wanted)]
    images = [path for path in images if wanted.endswith(f"/{path.removeprefix(prefix).casefold()}")]
    return sorted(images, key=len)[-1:]

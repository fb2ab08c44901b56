"""The data card of lists of ears: what is in them, what is wrong with them, and what their owners agreed to."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import __version__
from ..files import printable
from .manifest import Manifest


def data_card(
    manifests: Sequence[Manifest],
    sizes: Mapping[tuple[int, int], float],
    problems: Mapping[str, tuple[int, str]],
    consent: str,
    license: str,
) -> str:
    """Markdown. `sizes`: of (number of the list, ear) the shorter side of its box in pixels, where it could be read.
    `problems`: reason -> (how many, what it means). No name of a person and no folder of the machine is in it."""
    columns = [_column(number, manifest, sizes) for number, manifest in enumerate(manifests)]
    heads = [_text(Path(manifest.source).name) for manifest in manifests]
    rows = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]] if columns else []
    wrong = [f"| {reason} | {count} | {_text(meaning)} |" for reason, (count, meaning) in problems.items()]
    return f"""# Photographs of ears: {", ".join(heads)}

| | {" | ".join(heads)} |
|---|{"---|" * len(heads)}
{chr(10).join(rows)}

{_shared(manifests)}

## Consent and licence

| | |
|---|---|
| consent of those photographed | {_text(consent)} |
| licence | {_text(license)} |

## What is wrong with it

{chr(10).join(["| | ears | |", "|---|---|---|", *wrong]) if wrong else "Nothing that `earteach validate-data` looks for."}

## Limits

- Ears are biometric data: use the photographs for what their owners agreed to, and for nothing else.
- Who is photographed, where, by which camera, and how they were chosen, no program can tell: write it here.

Written by `earteach validate-data --card` (earteach {__version__}).
"""


def _column(number: int, manifest: Manifest, sizes: Mapping[tuple[int, int], float]) -> dict[str, str]:
    sides = [manifest.side(i) for i in range(len(manifest))]
    people = {identity for identity in manifest.identities or () if identity}
    own = np.array([size for (which, _), size in sizes.items() if which == number])
    low, middle, high = np.percentile(own, [5, 50, 95]) if len(own) else (np.nan,) * 3
    boxed = sum(manifest.boxes[i] is not None for i in range(len(manifest)))
    return {
        "ears": str(len(manifest)),
        "pictures": str(len(set(manifest.paths))),
        "ears with a box (the others are crops)": str(boxed),
        "people, where named": str(len(people)) if people else "not named",
        "left, right, side not known": ", ".join(str(sides.count(side)) for side in ("left", "right", None)),
        "shorter side of an ear, px: median (5 to 95 %)": f"{middle:.0f} ({low:.0f} to {high:.0f})" if len(own) else "",
        "sha256 of the list": _digest(Path(manifest.source)),
    }


def _shared(manifests: Sequence[Manifest]) -> str:
    """How many people are in more than one list, which no figure of a run forgives."""
    named = [{identity for identity in m.identities or () if identity} for m in manifests]
    if len(manifests) < 2:
        return ""
    if not all(named):
        return "Whether the same people are in several of the lists is not known: not all name them."
    shared = {person for i, people in enumerate(named) for others in named[i + 1 :] for person in people & others}
    return f"{len(shared)} people are in more than one of the lists."


def _digest(source: Path) -> str:
    return f"`{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}`" if source.is_file() else "a folder"


def _text(value: str) -> str:
    """On one line of a table."""
    return printable(" ".join(value.split())).replace("|", "\\|")


def stated(given: str | None, name: str) -> str:
    """What a card says of `name` (consent, license): what was given, else the environment's EARTEACH_NAME."""
    return given or os.environ.get(f"EARTEACH_{name.upper()}") or "not stated"

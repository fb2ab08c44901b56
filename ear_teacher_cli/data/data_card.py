"""The data card of manifests: their content, their problems, consent and licence."""

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
    """Return the card as Markdown. It contains no names of people and no folders of the machine.

    `sizes`: (position of the manifest, ear) -> shorter side of its box in pixels, for ears that could be cut out.
    `problems`: reason -> (number of ears, meaning).
    """
    columns = [_column(number, manifest, sizes) for number, manifest in enumerate(manifests)]
    heads = [_cell(Path(manifest.source).name) for manifest in manifests]
    rows = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]] if columns else []
    found = [f"| {reason} | {count} | {_cell(meaning)} |" for reason, (count, meaning) in problems.items()]
    return f"""# Photographs of ears: {", ".join(heads)}

| | {" | ".join(heads)} |
|---|{"---|" * len(heads)}
{chr(10).join(rows)}

{_shared_people(manifests)}

## Consent and licence

| | |
|---|---|
| consent of the people photographed | {_cell(consent)} |
| licence | {_cell(license)} |

## Problems

{chr(10).join(["| | ears | |", "|---|---|---|", *found]) if found else "`earteach validate-data` found none."}

## Limits

- Ears are biometric data: use the photographs only for what the people in them agreed to.
- No program can find out who was photographed, where, with which camera, and how they were selected: describe it here.

Written by `earteach validate-data --card` (earteach {__version__}).
"""


def _column(number: int, manifest: Manifest, sizes: Mapping[tuple[int, int], float]) -> dict[str, str]:
    """Return the column of one manifest: name of the row -> value."""
    sides = [manifest.side(i) for i in range(len(manifest))]
    people = {identity for identity in manifest.identities or () if identity}
    own = np.array([size for (which, _), size in sizes.items() if which == number])
    low, middle, high = np.percentile(own, [5, 50, 95]) if len(own) else (np.nan,) * 3
    boxed = sum(manifest.boxes[i] is not None for i in range(len(manifest)))
    return {
        "ears": str(len(manifest)),
        "images": str(len(set(manifest.paths))),
        "ears with a box (the others are crops)": str(boxed),
        "people": str(len(people)) if people else "not named",
        "left, right, unknown side": ", ".join(str(sides.count(side)) for side in ("left", "right", None)),
        "shorter side of an ear, px: median (5 to 95 %)": f"{middle:.0f} ({low:.0f} to {high:.0f})" if len(own) else "",
        "sha256 of the list": _digest(Path(manifest.source)),
    }


def _shared_people(manifests: Sequence[Manifest]) -> str:
    """Return a sentence on how many people are in more than one list: they invalidate metrics of a run."""
    people = [{identity for identity in m.identities or () if identity} for m in manifests]
    if len(manifests) < 2:
        return ""
    if not all(people):
        return "It is unknown whether the same people are in several of the lists: not all have identities."
    shared = {person for i, own in enumerate(people) for others in people[i + 1 :] for person in own & others}
    return f"{len(shared)} people are in more than one of the lists."


def _digest(source: Path) -> str:
    return f"`{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}`" if source.is_file() else "a folder"


def _cell(value: str) -> str:
    """Escape a text for a cell of a table."""
    return printable(" ".join(value.split())).replace("|", "\\|")


def stated(given: str | None, name: str) -> str:
    """Return the text of a card about `name` (consent, license): `given`, else that of the variable EARTEACH_NAME."""
    return given or os.environ.get(f"EARTEACH_{name.upper()}") or "not stated"

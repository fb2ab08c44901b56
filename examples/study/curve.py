"""Plot recognition against reconstruction for rows of a study.

    python curve.py OUT curve.png --rows recommended,recommended_reconstruction_weight_4

A row is a name of a folder OUT/ROW-SEED, of --rows or --try of study.py. Along x is the PSNR of the reconstruction, along y
the whitened rank-1 and EER on each evaluation manifest. A large marker is the mean over seeds, small dots are the seeds.
Rows without a decoder are dashed lines, the references of the PSNR dotted ones.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from study import psnr_references
from tables import PSNR_REFERENCES

from ear_teacher_cli.errors import EarTeachError, UsageError

MARKERS = "osD^vP*X"
TITLES = {"rank1": "rank-1, % (whitened)", "eer": "EER, % (whitened, lower is better)"}


def read_results(out: Path, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each row, one for each seed; without names those of all rows. Raises UsageError."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(out.glob("*/result.json")):
        name = re.sub(r"-\d+$", "", path.parent.name)
        result = json.loads(path.read_text(encoding="utf-8"))
        if "lists" in result and (not names or name in names):
            references = psnr_references(path.parent / "run" / "metrics.csv")
            found[name].append(result | {"psnr_references": references})
    if missing := [name for name in names if name not in found]:
        raise UsageError(f"--rows {missing[0]}: has no result in {out}; give names of folders there, without the seed")
    if not names:
        found = {name: runs for name, runs in found.items() if name == "baseline" or "psnr" in runs[0]}
    if not any("psnr" in runs[0] for runs in found.values()):
        raise UsageError(f"{out}: has no row with a reconstruction; give the output folder of study.py")
    return {name: found[name] for name in names or found}


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw a panel for each evaluation manifest and metric, and write them to one image."""
    manifests = list(next(iter(results.values()))[0]["lists"])
    figure, panels = plt.subplots(
        len(manifests), len(TITLES), figsize=(11, 4.5 * len(manifests)), squeeze=False, layout="constrained"
    )
    for row, which in zip(panels, manifests, strict=True):
        for panel, metric in zip(row, TITLES, strict=True):
            _draw_panel(panel, results, which, metric)
            panel.set(title=which, xlabel="PSNR of the reconstruction, dB", ylabel=TITLES[metric])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_panel(panel, results: dict[str, list[dict[str, Any]]], which: str, metric: str) -> None:
    panel.margins(0.15)
    references = {}
    for number, (name, runs) in enumerate(results.items()):
        colour = f"C{number % 10}"
        y = [100 * run["lists"][which]["whitened"][metric] for run in runs]
        references |= runs[0]["psnr_references"]
        if "psnr" not in runs[0]:
            panel.axhline(np.mean(y), color=colour, linestyle="--", linewidth=1, label=name)
            continue
        x = [run["psnr"] for run in runs]
        if len(runs) > 1:
            panel.plot(x, y, ".", color=colour, markersize=4)
        marker = MARKERS[number % len(MARKERS)]
        panel.plot(np.mean(x), np.mean(y), marker, color=colour, markersize=8, linestyle="none", label=name)
    for key, value in references.items():
        panel.axvline(value, color="grey", linestyle=":", linewidth=1)
        place = (value, 0.02), (2, 0)
        panel.annotate(
            PSNR_REFERENCES[key],
            *place,
            xycoords=panel.get_xaxis_transform(),
            textcoords="offset points",
            rotation=90,
            color="grey",
            fontsize=7,
        )


def main(argv: list[str] | None = None) -> int:
    """Write the plot and return the exit code."""
    parser = argparse.ArgumentParser(description="Plot recognition against reconstruction for rows of a study.")
    parser.add_argument("out", type=Path, help="output folder of study.py")
    parser.add_argument("file", type=Path, help="image to write (.png, .svg, .pdf)")
    parser.add_argument("--rows", help="names separated by commas (default: the baseline and all rows with a PSNR)")
    options = parser.parse_args(argv)
    try:
        plot(read_results(options.out, options.rows.split(",") if options.rows else []), options.file)
    except EarTeachError as error:
        print(f"curve: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw the curves of an evaluation as PNG files, one line per compared file; the style of all plots.

No torch; matplotlib is loaded when a plot is drawn. Figures are made without pyplot, which keeps state of the process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import whole_file
from .identity_metrics import Measured, eer, roc
from .pairs import bin_similarities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = ("roc.png", "cmc.png", "scores.png")
# Okabe and Ito's blue, vermilion and green: distinguishable with colour blindness; the first two also in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73")
INK, FAINT = "#20242c", "#8a909c"


@dataclass(frozen=True)
class Curve:
    """The scores of one file, and its name in the legend."""

    name: str
    measured: Measured


def draw_plots(folder: Path, curves: Sequence[Curve], smallest_far: float) -> None:
    """Write PLOTS into `folder`. Left of `smallest_far` the ROC has too few impostor pairs, and is grey."""
    for name, draw in zip(PLOTS, (_roc, _cmc, _scores), strict=True):
        # drawn in memory: an OSError below is then of the file
        content = BytesIO()
        draw(curves, smallest_far).savefig(content, format="png")
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content.getvalue())


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """Return (figure, its axes) of `panels` panels above each other, styled; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(color=FAINT, labelcolor=INK)
        axis.set_axisbelow(True)
        axis.grid(color="#e6e8ec", linewidth=0.7)
    return figure, axes


def _roc(curves: Sequence[Curve], smallest_far: float) -> Any:
    """Draw TAR over FAR, on a logarithmic axis."""
    figure, (axis,) = new_figure(5.6, 4.6)
    left = 10 ** np.floor(np.log10(min(0.01, smallest_far)))
    for curve, colour in zip(curves, COLOURS[: len(curves)], strict=True):
        far, tar = roc(curve.measured.tally.genuine, curve.measured.tally.impostor)
        turns = np.flatnonzero(np.diff(far, prepend=-1) + np.diff(tar, prepend=-1))  # most bins are empty
        grid = np.geomspace(left, 1, 400)  # a straight line is curved on a logarithmic axis
        x, y = np.concatenate([far[turns], grid]), np.concatenate([tar[turns], np.interp(grid, far, tar)])
        line = np.lexsort((y, x))
        even = curve.measured.figure("EER")
        area = curve.measured.figure("AUC").value
        label = f"{curve.name}\nAUC {100 * area:.1f} %, EER {100 * even.value:.1f} %"
        axis.plot(np.maximum(x[line], left / 10), 100 * y[line], color=colour, linewidth=1.8, label=label)
        point = float(eer(far, tar))
        axis.plot(point, 100 * (1 - point), "o", color=colour, markeredgecolor="white", markersize=7)
    chance = np.geomspace(left, 1, 200)
    axis.plot(chance, 100 * chance, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    if smallest_far > left:
        axis.axvspan(left, smallest_far, color="#f0f1f3", linewidth=0)
        axis.text(left * 1.12, 99, "too few\npairs", color=FAINT, fontsize=8, va="top")
    axis.set(
        xscale="log", xlim=(left, 1), ylim=(0, 101), xlabel="false accept rate (FAR)", ylabel="true accept rate, %"
    )
    _legend(figure, axis)
    return figure


def _cmc(curves: Sequence[Curve], smallest_far: float) -> Any:
    """Draw the share of queries with a match among the k nearest, with its interval."""
    figure, (axis,) = new_figure(5.6, 4.2)
    shown = 20
    lowest = 100.0
    for curve, colour in zip(curves, COLOURS[: len(curves)], strict=True):
        ranks = np.arange(1, shown + 1)
        value, low, high = 100 * curve.measured.cmc[:shown].T
        if np.isfinite(low).all():
            axis.fill_between(ranks, low, high, color=colour, alpha=0.14, linewidth=0)
        first = f"rank-1 {value[0]:.1f} %, rank-5 {value[4]:.1f} %"
        axis.plot(ranks, value, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=f"{curve.name}\n{first}")
        lowest = min(lowest, np.nanmin([value, low]))
    axis.set(xlim=(0.6, shown + 0.4), xlabel="rank k", ylabel="queries with a match among the k nearest, %")
    axis.set(ylim=(max(0, 10 * np.floor(lowest / 10 - 0.2)), 101), xticks=[1, 5, 10, 15, 20])
    _legend(figure, axis)
    return figure


def _scores(curves: Sequence[Curve], smallest_far: float) -> Any:
    """Draw the similarities of genuine and impostor pairs, a panel per file."""
    figure, axes = new_figure(5.6, 1.2 + 2.6 * len(curves), len(curves))
    middles = bin_similarities()
    filled = [np.flatnonzero(c.measured.tally.genuine + c.measured.tally.impostor) for c in curves]
    low, high = min(middles[f[-1]] for f in filled), max(middles[f[0]] for f in filled)
    fewest = min(c.measured.tally.genuine.sum() for c in curves)
    edges = np.linspace(low, max(high, low + 1e-6), 1 + int(np.clip(3 * np.cbrt(fewest), 15, 70)))
    for axis, curve in zip(axes, curves, strict=True):
        parts = (("impostor pairs", curve.measured.tally.impostor), ("genuine pairs", curve.measured.tally.genuine))
        for (name, counts), colour in zip(parts, (COLOURS[1], COLOURS[0]), strict=True):
            share = 100 * np.histogram(middles, edges, weights=counts)[0] / counts.sum()
            axis.stairs(share, edges, fill=True, color=colour, alpha=0.28)
            axis.stairs(share, edges, color=colour, linewidth=1.3, label=name)
        axis.set(ylabel="share of pairs, %", ylim=(0, None), xlim=(edges[0], edges[-1]))
        axis.set_title(curve.name, fontsize=10, color=INK, loc="left")
    _legend(figure, axes[0])
    axes[-1].set_xlabel("cosine similarity")
    return figure


def _legend(figure: Any, axis: "Axes") -> None:
    """Put the legend above the axes: no corner within them is certain to be empty."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)

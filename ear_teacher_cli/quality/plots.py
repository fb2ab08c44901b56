"""The curves of an evaluation as PNG files, one line per compared file, and those of a run as SVG. No torch; matplotlib
is loaded when drawn.

Figures are made without pyplot: it keeps state of the whole process.
"""

from collections.abc import Mapping, Sequence
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
# Okabe and Ito's blue and vermilion: told apart by the colour-blind and in grey.
_COLOURS = ("#0072B2", "#D55E00")
_INK, _FAINT = "#20242c", "#8a909c"


@dataclass(frozen=True)
class Curve:
    name: str
    measured: Measured


def draw_plots(folder: Path, curves: Sequence[Curve], smallest_far: float) -> None:
    """Write PLOTS into `folder`. `smallest_far`: what lies left of it on the ROC rests on too few pairs, and is grey."""
    for name, draw in zip(PLOTS, (_roc, _cmc, _scores), strict=True):
        # drawn in memory: what goes wrong there is not a file that cannot be written
        content = BytesIO()
        draw(curves, smallest_far).savefig(content, format="png")
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content.getvalue())


# (title, {figure of metrics.csv: its name in the legend}) of each panel of a run's curves
_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Quality of held-out embeddings, %", {"val/retrieval": "retrieval", "val/rank1": "rank-1", "val/eer": "EER"}),
    ("Loss", {"train/loss": "training", "val/loss": "validation"}),
    ("Reconstruction loss (MSE)", {"train/recon_loss": "training", "val/recon_loss": "validation"}),
    ("Metric loss", {"train/metric_loss": "training", "val/metric_loss": "validation"}),
    ("Contrastive loss", {"train/contrastive_loss": "training", "val/contrastive_loss": "validation"}),
    ("Consistency loss", {"train/consistency_loss": "training", "val/consistency_loss": "validation"}),
    ("PSNR of reconstructions, dB", {"val/psnr": "validation"}),
    ("Learning rate", {"train/lr": "learning rate"}),
)
_HEALTH_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Spread (1: all over the sphere)", {"val/spread": "spread"}),
    ("Effective rank", {"val/effective_rank": "effective rank"}),
    ("Mean absolute cosine", {"val/abs_cosine": "mean absolute cosine"}),
    ("Gradient of the other terms / reconstruction's", {"train/grad_ratio": "ratio"}),
)
_CLASS_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "Pseudo-classes",
        {"classes/in_use": "share in use", "classes/entropy": "entropy", "classes/nmi": "NMI of rounds"},
    ),
)


def draw_run(rows: Sequence[Mapping[str, str]], best: int) -> tuple[list[str], list[str], list[str]]:
    """SVG panels of the rows of a metrics.csv, a line on the `best` epoch: losses and quality, health, classes."""
    found = []
    for panels in (_PANELS, _HEALTH_PANELS, _CLASS_PANELS):
        drawn = (_panel(title, lines, rows, best) for title, lines in panels)
        found.append([svg for svg in drawn if svg])
    return found[0], found[1], found[2]


def draw_class_sizes(counts: np.ndarray) -> str:
    """SVG of how many pseudo-classes have how many images; `counts` [K]."""
    figure, (axis,) = _figure(4.6, 2.7)
    most = int(counts.max(initial=1))
    edges = np.arange(-0.5, most + 1.5) if most < 40 else np.linspace(-0.5, most + 0.5, 40)
    axis.hist(counts, bins=edges, color=_COLOURS[0], alpha=0.8)
    axis.set_title("Images per pseudo-class", fontsize=10, color=_INK, loc="left")
    axis.set(xlabel="pictures", ylabel="classes", xlim=(-0.5, most + 0.5))
    axis.locator_params(integer=True)
    return _svg(figure, "Images per pseudo-class")


def _panel(title: str, lines: Mapping[str, str], rows: Sequence[Mapping[str, str]], best: int) -> str:
    """'' where no row has any of the figures."""
    figure, (axis,) = _figure(4.6, 2.7)
    shown = 0
    colours = (*_COLOURS, "#009E73")[: len(lines)]
    for (column, name), colour in zip(lines.items(), colours, strict=True):
        points = [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column)]
        points = [point for point in points if np.isfinite(point[1])]
        after = [point for point in points if point[0] > 0]
        if not after:
            continue
        shown += 1
        marker = "o" if len(after) < 12 else None
        axis.plot(*zip(*after, strict=True), color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=name)
        if points[0][0] == 0:
            axis.axhline(
                points[0][1], color=colour, linewidth=1, linestyle=(0, (4, 3)), label=f"{name} before training"
            )
    if not shown:
        return ""
    axis.axvline(best, color=_FAINT, linewidth=0.8, linestyle=":")
    axis.set_title(title, fontsize=10, color=_INK, loc="left")
    axis.set_xlabel("epoch", color=_INK, fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if axis.get_xlim()[1] - axis.get_xlim()[0] < 1:  # one epoch
        axis.set_xlim(best - 0.5, best + 0.5)
        axis.set_xticks([best])
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor=_INK)
    return _svg(figure, title)


def _svg(figure: Any, title: str) -> str:
    from matplotlib import rc_context

    content = BytesIO()
    with rc_context({"svg.hashsalt": title}):  # the same names inside for the same figure
        figure.savefig(content, format="svg", metadata={"Date": None, "Title": title})
    text = content.getvalue().decode()
    return text[text.index("<svg") :]


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_FAINT)
        axis.tick_params(color=_FAINT, labelcolor=_INK)
        axis.set_axisbelow(True)
        axis.grid(color="#e6e8ec", linewidth=0.7)
    return figure, axes


def _roc(curves: Sequence[Curve], smallest_far: float) -> Any:
    figure, (axis,) = _figure(5.6, 4.6)
    left = 10 ** np.floor(np.log10(min(0.01, smallest_far)))
    for curve, colour in zip(curves, _COLOURS[: len(curves)], strict=True):
        far, tar = roc(curve.measured.tally.genuine, curve.measured.tally.impostor)
        turns = np.flatnonzero(np.diff(far, prepend=-1) + np.diff(tar, prepend=-1))  # most bins are empty
        grid = np.geomspace(left, 1, 400)  # a line between two points is bent by the logarithm
        x, y = np.concatenate([far[turns], grid]), np.concatenate([tar[turns], np.interp(grid, far, tar)])
        line = np.lexsort((y, x))
        even = curve.measured.figure("EER")
        area = curve.measured.figure("AUC").value
        label = f"{curve.name}\nAUC {area:.3f}, EER {100 * even.value:.1f} %"
        axis.plot(np.maximum(x[line], left / 10), 100 * y[line], color=colour, linewidth=1.8, label=label)
        point = float(eer(far, tar))
        axis.plot(point, 100 * (1 - point), "o", color=colour, markeredgecolor="white", markersize=7)
    chance = np.geomspace(left, 1, 200)
    axis.plot(chance, 100 * chance, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    if smallest_far > left:
        axis.axvspan(left, smallest_far, color="#f0f1f3", linewidth=0)
        axis.text(left * 1.12, 99, "too few\npairs", color=_FAINT, fontsize=8, va="top")
    axis.set(
        xscale="log", xlim=(left, 1), ylim=(0, 101), xlabel="false accept rate (FAR)", ylabel="true accept rate, %"
    )
    _legend(figure, axis)
    return figure


def _cmc(curves: Sequence[Curve], smallest_far: float) -> Any:
    figure, (axis,) = _figure(5.6, 4.2)
    shown = 20
    lowest = 100.0
    for curve, colour in zip(curves, _COLOURS[: len(curves)], strict=True):
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
    figure, axes = _figure(5.6, 1.2 + 2.6 * len(curves), len(curves))
    middles = bin_similarities()
    filled = [np.flatnonzero(c.measured.tally.genuine + c.measured.tally.impostor) for c in curves]
    low, high = min(middles[f[-1]] for f in filled), max(middles[f[0]] for f in filled)
    fewest = min(c.measured.tally.genuine.sum() for c in curves)
    edges = np.linspace(low, max(high, low + 1e-6), 1 + int(np.clip(3 * np.cbrt(fewest), 15, 70)))
    for axis, curve in zip(axes, curves, strict=True):
        parts = (("impostor pairs", curve.measured.tally.impostor), ("genuine pairs", curve.measured.tally.genuine))
        for (name, counts), colour in zip(parts, (_COLOURS[1], _COLOURS[0]), strict=True):
            share = 100 * np.histogram(middles, edges, weights=counts)[0] / counts.sum()
            axis.stairs(share, edges, fill=True, color=colour, alpha=0.28)
            axis.stairs(share, edges, color=colour, linewidth=1.3, label=name)
        axis.set(ylabel="share of pairs, %", ylim=(0, None), xlim=(edges[0], edges[-1]))
        axis.set_title(curve.name, fontsize=10, color=_INK, loc="left")
    _legend(figure, axes[0])
    axes[-1].set_xlabel("cosine similarity")
    return figure


def _legend(figure: Any, axis: "Axes") -> None:
    """Above the axes: no corner of a curve is empty for sure."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, labelcolor=_INK)

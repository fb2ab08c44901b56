"""Draw the curves of a run as SVG: the panels of the metrics catalogue, and the sizes of pseudo-classes."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from ..metrics_catalogue import Metric, panels
from ..quality.plots import COLOURS, FAINT, INK, new_figure

_SIZE = 4.6, 2.7  # inches


def draw_panels(section: str, rows: Sequence[Mapping[str, str]], best: int) -> list[str]:
    """Return the SVG panels of a section (metrics_catalogue.PANELS) that have values in `rows` of a metrics.csv; a line
    marks the epoch `best`."""
    drawn = (_draw_panel(title, metrics, rows, best) for title, metrics in panels(section))
    return [svg for svg in drawn if svg]


def draw_class_sizes(counts: np.ndarray) -> str:
    """Return SVG of how many pseudo-classes have how many images; `counts` int [K]."""
    figure, (axis,) = new_figure(*_SIZE)
    most = int(counts.max(initial=1))
    edges = np.arange(-0.5, most + 1.5) if most < 40 else np.linspace(-0.5, most + 0.5, 40)
    axis.hist(counts, bins=edges, color=COLOURS[0], alpha=0.8)
    axis.set_title("Images per pseudo-class", fontsize=10, color=INK, loc="left")
    axis.set(xlabel="images", ylabel="classes", xlim=(-0.5, most + 0.5))
    axis.locator_params(integer=True)
    return _svg(figure, "Images per pseudo-class")


def _draw_panel(title: str, metrics: Sequence[Metric], rows: Sequence[Mapping[str, str]], best: int) -> str:
    """Return SVG of a panel; '' where no row after training began has any of the metrics."""
    figure, (axis,) = new_figure(*_SIZE)
    drawn = [_draw_line(axis, metric, rows, COLOURS[i % len(COLOURS)]) for i, metric in enumerate(metrics)]
    if not any(drawn):
        return ""
    axis.axvline(best, color=FAINT, linewidth=0.8, linestyle=":")
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel("epoch", color=INK, fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if axis.get_xlim()[1] - axis.get_xlim()[0] < 1:  # one epoch
        axis.set_xlim(best - 0.5, best + 0.5)
        axis.set_xticks([best])
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    return _svg(figure, title)


def _draw_line(axis: Any, metric: Metric, rows: Sequence[Mapping[str, str]], colour: str) -> bool:
    """Draw a metric over epochs, and its value before training (epoch 0) dashed; a reference as a dashed and dotted line.

    Return whether there was anything.
    """
    points = [(int(row["epoch"]), float(row[metric.key])) for row in rows if row.get(metric.key)]
    points = [point for point in points if np.isfinite(point[1])]
    after = [point for point in points if point[0] > 0]
    if not after:
        return False
    if metric.reference:
        axis.axhline(after[-1][1], color=colour, linewidth=1, linestyle="-.", label=metric.legend or metric.label)
        return True
    name, marker = metric.legend or metric.label, "o" if len(after) < 12 else None
    axis.plot(*zip(*after, strict=True), color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=name)
    if points[0][0] == 0:
        label = f"{name} before training"
        axis.axhline(points[0][1], color=colour, linewidth=1, linestyle=(0, (4, 3)), label=label)
    return True


def _svg(figure: Any, title: str) -> str:
    """Return the figure as an <svg> element, the same for the same figure."""
    from matplotlib import rc_context

    content = BytesIO()
    with rc_context({"svg.hashsalt": title}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Title": title})
    text = content.getvalue().decode()
    return text[text.index("<svg") :]

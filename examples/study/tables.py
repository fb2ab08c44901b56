"""The tables of the study as Markdown: metrics of each evaluation manifest, other metrics, cost of training."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ear_teacher_cli.quality.identity_metrics import interval

TRAINED = ("earteach", "lightly")  # kinds of rows that are trained
TREATMENTS = ("raw", "whitened")
METRICS = ("rank1", "eer")
# Rows that "recommended" is compared with.
COMPARED = ("v010", "original", "original-batch", "fixed", "kmeans", "simclr", "simsiam", "dino")


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    `kind`: what makes the weights (earteach, lightly, initial), or the name of a check. `options`: TrainConfig fields.
    """

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


# row -> one result per seed: result.json, with "health", "verdict" and the bootstrap "draws" of study.run_row
Results = dict[str, list[dict[str, Any]]]


def metrics_table(results: Results, rows: dict[str, Row]) -> str:
    """Return the tables of each evaluation manifest, values raw / whitened, then the other metrics and notes."""
    manifests = next((runs[0]["lists"] for runs in results.values() if "lists" in runs[0]), {})
    parts = []
    for which, about in manifests.items():
        parts += [
            f"**{which}**: {about['pictures']} images, {about['people']} people, {about['ears']} ears; rank-1 at chance "
            f"{100 * about['chance']:.1f} %.",
            _markdown(_identity_table(results, rows, which)),
        ]
        compared = [name for name in COMPARED if name in results]
        if "recommended" in results and compared:
            lines = [["recommended preset minus ...", "rank-1", "EER"]]
            for name in compared:
                pair = (difference(results["recommended"], results[name], which, metric) for metric in METRICS)
                lines.append([rows[name].label, *pair])
            parts.append(_markdown(lines))
    return "\n\n".join([*parts, _markdown(_other_metrics(results, rows)), "\n".join(_notes(results, rows))]) + "\n"


def _identity_table(results: Results, rows: dict[str, Row], which: str) -> list[list[str]]:
    lines = [["", "seeds", "rank-1, %", "EER, %", "rank-1 minus baseline", "EER minus baseline"]]
    for name, runs in results.items():
        if rows[name].kind == "step0":
            continue
        cells = [rows[name].label, str(len(runs)) if rows[name].kind in TRAINED else "–"]
        for metric in METRICS:
            values = [[100 * run["lists"][which][treatment][metric] for run in runs] for treatment in TREATMENTS]
            cells.append(" / ".join(mean_and_deviation(each, 1) for each in values))
        comparable = name != "baseline" and "baseline" in results and rows[name].kind != "shuffled"
        for metric in METRICS:
            cells.append(difference(runs, results["baseline"], which, metric) if comparable else "–")
        lines.append(cells)
    return lines


def _other_metrics(results: Results, rows: dict[str, Row]) -> list[list[str]]:
    lines = [["", "landmark NME, %", "PSNR, dB", "spread", "effective rank", "verdict"]]
    for name, runs in results.items():
        cells = [
            mean_and_deviation([100 * run["nme"] for run in runs if "nme" in run], 2),
            mean_and_deviation([run["psnr"] for run in runs if "psnr" in run], 1),
            *_health_cells([run for run in runs if "health" in run]),
        ]
        if set(cells) != {"–"}:
            lines.append([rows[name].label, *cells])
    return lines


def _health_cells(runs: list[dict[str, Any]]) -> list[str]:
    """Return spread and effective rank, before → after training (means over seeds), and the verdicts."""
    if not runs:
        return ["–"] * 3
    means = [
        [np.mean([getattr(run["health"][when], metric) for run in runs]) for when in (0, 1)]
        for metric in ("spread", "effective_rank")
    ]
    verdicts = ", ".join(dict.fromkeys(run["verdict"] for run in runs))
    return [f"{means[0][0]:.2f} → {means[0][1]:.2f}", f"{means[1][0]:.0f} → {means[1][1]:.0f}", verdicts]


def difference(first: list[dict[str, Any]], second: list[dict[str, Any]], which: str, metric: str) -> str:
    """Return the mean of `first` over seeds minus that of `second`, in points with a 95 % interval, raw / whitened.

    The interval is a bootstrap over people that draws the same people for all runs. A dash if the runs could not read
    the same images.
    """
    images = [run["draws"][which]["rows"].tolist() for run in [*first, *second]]
    if any(rows != images[0] for rows in images):
        return "–"
    cells = []
    for treatment in TREATMENTS:
        a, b = ([run["lists"][which][treatment][metric] for run in runs] for runs in (first, second))
        drawn_a, drawn_b = (
            np.mean([run["draws"][which][f"{treatment}_{metric}"] for run in runs], axis=0) for runs in (first, second)
        )
        low, high = interval(drawn_a - drawn_b)
        cells.append(f"{100 * (np.mean(a) - np.mean(b)):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    return " / ".join(cells)


def mean_and_deviation(values: list[float], digits: int) -> str:
    """Return the mean, with the standard deviation over seeds if there are several; a dash without values."""
    if not values:
        return "–"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def _notes(results: Results, rows: dict[str, Row]) -> list[str]:
    notes = ["Identity metrics are raw cosine / centred and whitened on unlabelled training images."]
    constant = next((runs[0]["constant_nme"] for runs in results.values() if "constant_nme" in runs[0]), None)
    if constant is not None:
        notes.append(
            f"Landmarks: the mean points of the ear's side, independent of the image, give {100 * constant:.2f} %."
        )
    for name, runs in results.items():
        if rows[name].kind == "step0":
            largest = runs[0]["difference"]
            notes.append(f"Step 0 compared with the pretrained baseline: largest difference {largest:.1e}.")
    return [f"- {note}" for note in notes]


def cost_table(results: Results, rows: dict[str, Row]) -> str:
    """Return time and memory of training, means over seeds."""
    lines = [["", "wall-clock seconds", "CPU seconds", "peak memory, MB"]]
    for name, runs in results.items():
        if rows[name].kind in TRAINED:
            means = (np.mean([run[key] for run in runs]) for key in ("seconds", "cpu_seconds", "peak_memory_mb"))
            lines.append([rows[name].label, *(f"{mean:.0f}" for mean in means)])
    return _markdown(lines) + "\n"


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))

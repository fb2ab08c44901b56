"""The tables of the study as Markdown: metrics of each evaluation manifest, other metrics, cost of training."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ear_teacher_cli.quality.identity_metrics import interval, resamples

TRAINED = ("earteach", "lightly")  # kinds of rows that are trained
TREATMENTS = ("raw", "whitened")
EAR_ONLY = "ear_only_"  # before a treatment: of images with all but the ear painted over
METRICS = ("rank1", "eer")
# Rows that "recommended" is compared with.
COMPARED = ("v010", "original", "original-batch", "fixed", "kmeans", "simclr", "simsiam", "dino")
MAIN_STRIDES = "8+16"  # of the feature maps that the mask probe is trained on
MASK_WINDOWS = "mask-windows.npz"  # in the folder of a run: IoU of each test window of the mask probe, and its photo
RESAMPLES = 2000
# Metrics of metrics.csv that do not depend on the weights -> what they are the PSNR of.
PSNR_REFERENCES = {"val/psnr_mean_image": "the mean training image", "val/psnr_pca64": "PCA with 64 components"}


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    `kind`: what makes the weights (earteach, lightly, initial), or the name of a check. `options`: TrainConfig fields.
    """

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


# row -> one result per seed: result.json, with "health", "verdict", "psnr_references", "mask_windows" and the bootstrap
# "draws" of study.run_row
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
        ears = {
            name: runs for name, runs in results.items() if f"{EAR_ONLY}raw" in runs[0].get("lists", {}).get(which, {})
        }
        if ears:
            parts.append(_markdown(_ear_only_table(ears, rows, which)))
    return "\n\n".join([*parts, _markdown(_other_metrics(results, rows)), "\n".join(_notes(results, rows))]) + "\n"


def _identity_table(results: Results, rows: dict[str, Row], which: str) -> list[list[str]]:
    lines = [["", "seeds", "rank-1, %", "EER, %", "rank-1 minus baseline", "EER minus baseline"]]
    for name, runs in results.items():
        if rows[name].kind == "step0":
            continue
        seeds = str(len(runs)) if rows[name].kind in TRAINED else "–"
        baseline = results.get("baseline") if name != "baseline" and rows[name].kind != "shuffled" else None
        lines.append([rows[name].label, seeds, *_identity_cells(runs, baseline, which)])
    return lines


def _ear_only_table(results: Results, rows: dict[str, Row], which: str) -> list[list[str]]:
    lines = [["ear only", "rank-1, %", "EER, %", "rank-1 minus baseline", "EER minus baseline"]]
    for name, runs in results.items():
        baseline = results.get("baseline") if name != "baseline" else None
        lines.append([rows[name].label, *_identity_cells(runs, baseline, which, EAR_ONLY)])
    return lines


def _identity_cells(
    runs: list[dict[str, Any]], baseline: list[dict[str, Any]] | None, which: str, prefix: str = ""
) -> list[str]:
    """Return each of METRICS and its difference from the baseline, raw / whitened."""
    cells = []
    for metric in METRICS:
        values = [[100 * run["lists"][which][prefix + each][metric] for run in runs] for each in TREATMENTS]
        cells.append(" / ".join(mean_and_deviation(each, 1) for each in values))
    return [*cells, *(difference(runs, baseline, which, metric, prefix) if baseline else "–" for metric in METRICS)]


def _other_metrics(results: Results, rows: dict[str, Row]) -> list[list[str]]:
    """Return the table of all other metrics, without rows and columns that are empty."""
    head = ["", "landmark NME, %", "NME relative to baseline", "mask IoU, %", "mask IoU minus baseline", "PSNR, dB"]
    lines = []
    for name, runs in results.items():
        masks = [run for run in runs if "masks" in run]
        cells = [
            mean_and_deviation([100 * run["nme"] for run in runs if "nme" in run], 2),
            relative_nme(runs, results["baseline"]) if name != "baseline" and "baseline" in results else "–",
            mean_and_deviation([100 * run["masks"][MAIN_STRIDES]["mean"] for run in masks], 1),
            mask_difference(masks, results["baseline"]) if name != "baseline" and "baseline" in results else "–",
            mean_and_deviation([run["psnr"] for run in runs if "psnr" in run], 1),
            *_health_cells([run for run in runs if "health" in run]),
        ]
        if set(cells) != {"–"}:
            lines.append([rows[name].label, *cells])
    columns = list(zip([*head, "spread", "effective rank", "verdict"], *lines, strict=True))
    return [list(line) for line in zip(*(each for each in columns if set(each[1:]) != {"–"}), strict=True)]


def relative_nme(runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    """Return the landmark error, mean over seeds, as a change from the baseline's in percent of it; or a dash."""
    errors = [[run["nme"] for run in each if "nme" in run] for each in (runs, baseline)]
    if not all(errors):
        return "–"
    return f"{100 * (np.mean(errors[0]) / np.mean(errors[1]) - 1):+.1f} %"


def mask_difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    """Return the mean IoU of `first` minus that of `second`, in points with a 95 % interval: a bootstrap over photos.

    Both are means over seeds, window by window. A dash if the runs were not tested on the same windows.
    """
    windows = [[run["mask_windows"] for run in runs if "mask_windows" in run] for runs in (first, second)]
    photos = [each["photos"].tolist() for runs in windows for each in runs]
    if not all(windows) or any(each != photos[0] for each in photos):
        return "–"
    gain = np.subtract(*(np.mean([each["iou"] for each in runs], axis=0) for runs in windows))  # of each window
    group = np.unique(photos[0], return_inverse=True)[1]
    drawn = resamples(group.max() + 1, RESAMPLES, 0)
    low, high = interval((drawn @ np.bincount(group, gain)) / (drawn @ np.bincount(group)))
    return f"{100 * gain.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


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


def difference(
    first: list[dict[str, Any]], second: list[dict[str, Any]], which: str, metric: str, prefix: str = ""
) -> str:
    """Return the mean of `first` over seeds minus that of `second`, in points with a 95 % interval, raw / whitened.

    `prefix`: EAR_ONLY, or nothing for images as they are. The interval is a bootstrap over people that draws the same people for all runs. A dash if the runs could not read
    the same images.
    """
    images = [run["draws"][which]["rows"].tolist() for run in [*first, *second]]
    if any(rows != images[0] for rows in images):
        return "–"
    cells = []
    for treatment in (prefix + each for each in TREATMENTS):
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
    runs = [run for each in results.values() for run in each]
    if any(f"{EAR_ONLY}raw" in manifest for run in runs for manifest in run.get("lists", {}).values()):
        notes.append("Ear only: all but the ear is painted over, also in the training images of that whitening.")
    constant = next((run["constant_nme"] for run in runs if "constant_nme" in run), None)
    if constant is not None:
        notes.append(
            f"Landmarks: the mean points of the ear's side, independent of the image, give {100 * constant:.2f} %."
        )
    for run in results.get("baseline", ())[:1]:
        if "masks" in run:
            notes.append(_mask_note(run["masks"], run["mask_windows"]["photos"]))
    if references := _psnr_note(runs):
        notes.append(references)
    for name, each in results.items():
        if rows[name].kind == "step0":
            largest = each[0]["difference"]
            notes.append(f"Step 0 compared with the pretrained baseline: largest difference {largest:.1e}.")
    return [f"- {note}" for note in notes]


def _mask_note(masks: dict[str, dict[str, float]], photos: np.ndarray) -> str:
    alone = ", ".join(
        f"of stride {name} alone {100 * masks[name]['mean']:.1f} %" for name in masks if name != MAIN_STRIDES
    )
    return (
        f"Mask IoU: mean of {len(photos)} test windows of {len(set(photos.tolist()))} photos, from the maps of strides 8 and "
        f"16. The pretrained baseline's is {100 * masks[MAIN_STRIDES]['pooled']:.1f} % over the pixels of all of them; "
        f"with the maps {alone}."
    )


def _psnr_note(runs: list[dict[str, Any]]) -> str:
    """Return the references of the PSNR; several values if rows differ in their crops. Empty without any."""
    values = {
        what: dict.fromkeys(
            f"{run['psnr_references'][name]:.1f}" for run in runs if name in run.get("psnr_references", {})
        )
        for name, what in PSNR_REFERENCES.items()
    }
    found = [f"{what} gives {' or '.join(each)} dB" for what, each in values.items() if each]
    return f"PSNR: {'; '.join(found)}." if found else ""


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

"""The study: what does learning from unlabelled ears bring, and which way of learning brings it?

    python study.py OUT --train train.npy --val val.npy --eval same=eval.csv --eval other=other/eval.csv \\
        --landmarks drawn/ears.jsonl --weights start.safetensors --backbone tf_efficientnet_lite0 \\
        --image-size 128 --epochs 2 --batch-size 64 --seeds 0 1 2

Every row of the table is trained from the same start for the same steps, and measured the same way; README.md has the
protocol. Each (row, seed) is a folder OUT/ROW-SEED with its job, weights, embeddings and `result.json`; finished ones
are skipped, so an interrupted study goes on. OUT/table.md has the figures (seeded: the same command gives the same
file), OUT/cost.md time and memory.
"""

import argparse
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.errors import EarTeachError, ImageError, ManifestError, UsageError
from ear_teacher_cli.quality.collapse import JUDGED_ON, Health, degraded, verdict
from ear_teacher_cli.quality.identity_metrics import interval
from ear_teacher_cli.run_folder import read_metrics


@dataclass(frozen=True)
class Row:
    """`kind`: who makes the weights (earteach, lightly, start) or which check it is. `options`: TrainConfig fields."""

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


# How one fine-tunes is that of the recommended preset in every row but that of the original package: two strongly varied
# views, early stages and batch-norm statistics kept. Rows differ in what is asked. The rivals take it too. The labels of
# the original package are those of its code, the image's place in the batch.
ALONE = {"contrastive_weight": 0.0}
# Margin and scale of unsupervised speaker verification (see the README), and no ramp: the runs are short.
CLASSES = {**ALONE, "metric_weight": 1.0, "arcface_margin": 0.2, "arcface_scale": 30.0, "margin_warmup_epochs": 0}

ROWS = {
    "random": Row("Random weights", "start", {"pretrained": False}),
    "untouched": Row("Untouched backbone", "start"),
    "seed": Row("Seed recipe, made runnable", "earteach", {"preset": "original", "pseudo_classes": "batch"}),
    "reconstruction": Row("Reconstruction only", "earteach", {**ALONE, "pseudo_classes": "none"}),
    "fixed": Row("Fixed random classes (control)", "earteach", {**CLASSES, "pseudo_classes": "fixed"}),
    "instance": Row("Each image a class", "earteach", {**CLASSES, "pseudo_classes": "instance"}),
    "kmeans": Row("k-means classes", "earteach", {**CLASSES, "pseudo_classes": "kmeans"}),
    "recommended": Row("Recommended preset", "earteach", {"preset": "recommended"}),
    "simclr": Row("SimCLR (lightly)", "lightly"),
    "simsiam": Row("SimSiam (lightly)", "lightly"),
    "dino": Row("DINO (lightly)", "lightly"),
    # Against self-deception, all with the untouched backbone.
    "shuffled": Row("Check: identities shuffled", "shuffled"),
    "grey": Row("Check: 32 x 32 grey pixels", "grey"),
    "masked": Row("Check: ear painted over", "masked"),
    "step0": Row("Check: step 0 of a run", "step0"),
}
LEARN = ("earteach", "lightly")
WAYS = ("raw", "whitened")
COSTS = ("seconds", "cpu_seconds", "peak_memory_mb")


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    # Told to stop, it stops the run under way, too: a signal reaches this process alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_study(options)
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except EarTeachError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and measure every row of the study.")
    add = parser.add_argument
    add("out", type=Path, help="folder of the study; a started one is continued")
    add("--train", required=True, help="manifest to learn from (no identities needed)")
    add("--val", required=True, help="manifest to validate on")
    add("--root-dir", help="folder the paths of --train and --val start from (default: as earteach train)")
    lists = parser.add_mutually_exclusive_group(required=True)
    lists.add_argument(
        "--eval", action="append", metavar="NAME=LIST", help="list with identities to measure on; repeat"
    )
    lists.add_argument(
        "--choose-on",
        metavar="LIST",
        help="measure on this list only, of people kept out of --train: to choose options",
    )
    add("--landmarks", help="ears.jsonl of make_sample_ears.py for the landmark probe (default: no probe)")
    add("--weights", help="pretrained weights to start from (default: as earteach train)")
    add("--backbone", default="convnext_tiny", help="timm name (default: %(default)s)")
    add("--image-size", type=int, default=224, help="side of the input in pixels (default: %(default)s)")
    add("--epochs", type=int, default=2, help="epochs of every row that learns (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    add("--num-workers", type=int, default=8, help="processes that load images (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="first: all rows; others: the best rows (default: 0)")
    add("--best", type=int, default=4, help="how many rows that learn get all seeds (default: %(default)s)")
    add("--rows", default="all", help=f"all, or names with commas: {', '.join(ROWS)}")
    add(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="ROW:option=value[,...]",
        help="one more row: ROW with other options of earteach train, as in kmeans:learning_rate=3e-4; repeat",
    )
    add("--whiten-on", type=int, default=2048, help="training images to fit the whitening on (default: %(default)s)")
    return parser.parse_args(argv)


def run_study(options: argparse.Namespace) -> int:
    """Run what is not there yet, write the tables; 1 if a row could not be run."""
    lists = {"choose": options.choose_on} if options.choose_on else dict(_named(text) for text in options.eval)
    for path in lists.values():
        refuse_overlap(options.train, options.root_dir, path)
    rows = chosen_rows(options.rows, options.tries)
    options.out.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    first, others = options.seeds[0], options.seeds[1:]
    for name in rows:
        run_row(name, rows[name], first, options, lists, results, failures)
    for name in best_rows(results, rows, options.best) if others else ():
        for seed in others:
            run_row(name, rows[name], seed, options, lists, results, failures)
    results = {name: results[name] for name in rows if name in results}
    for file, text in (("table.md", table(results, rows)), ("cost.md", cost(results, rows))):
        (options.out / file).write_text(text, encoding="utf-8")
        print(text)
    for name, reason in failures.items():
        print(f"study: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        raise UsageError(f"--eval {text}: is not NAME=LIST; write it as in same=eval.csv")
    return name, path


def refuse_overlap(train: str, root_dir: str | None, path: str) -> None:
    """Raise ManifestError if an image of the list `path` is in the training manifest, too."""

    def files(manifest):
        for index in range(len(manifest)):
            try:
                yield index, manifest.file(index)
            except ImageError:  # leaves the root folder: it will be skipped
                continue

    learned = {file for _, file in files(read_manifest(train, root_dir))}
    tested = read_manifest(path)
    for index, file in files(tested):
        if file in learned:
            raise ManifestError(f"{tested.where(index)}: is in {train}, too; measure on people that training never saw")


def chosen_rows(names: str, tries: list[str]) -> dict[str, Row]:
    """The rows to run, by name; those of --try beside them."""
    wanted = list(ROWS) if names == "all" else names.split(",")
    for name in wanted:
        if name not in ROWS:
            raise UsageError(f"--rows {name}: no such row; choose all, or of {', '.join(ROWS)}")
    rows = {name: ROWS[name] for name in ROWS if name in wanted}
    for text in tries:
        name, _, changes = text.partition(":")
        pairs = [change.split("=", 1) for change in changes.split(",")]
        if name not in ROWS or ROWS[name].kind != "earteach" or any(len(pair) < 2 for pair in pairs):
            raise UsageError(f"--try {text}: is not ROW:option=value; write it as in kmeans:learning_rate=3e-4")
        options = {option.replace("-", "_"): _typed(option.replace("-", "_"), value) for option, value in pairs}
        rows[re.sub(r"[^\w.]+", "_", text)] = Row(
            f"{ROWS[name].label}, {changes}", "earteach", {**ROWS[name].options, **options}
        )
    return rows


def _typed(option: str, word: str) -> Any:
    """A word of --try as the value of a TrainConfig field. Raises UsageError."""
    if option not in {spec.name for spec in fields(TrainConfig)}:
        raise UsageError(f"--try {option}: is no option of earteach train; see its --help")
    kinds = get_type_hints(TrainConfig)[option]
    if bool in (kinds, *get_args(kinds)):
        if word not in ("true", "false"):
            raise UsageError(f"--try {option}={word}: is on or off; write true or false")
        return word == "true"
    return word


def run_row(
    name: str,
    row: Row,
    seed: int,
    options: argparse.Namespace,
    lists: dict[str, str],
    results: dict[str, list[dict[str, Any]]],
    failures: dict[str, str],
) -> None:
    """Add the result of a row to `results`, from its folder or by running it; or why there is none to `failures`."""
    if row.kind == "lightly" and importlib.util.find_spec("lightly") is None:
        failures[name] = "lightly is not installed: pip install 'ear-teacher-cli[study]'"
        return
    folder, job = options.out / f"{name}-{seed}", job_of(name, row, seed, options, lists)
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if result["job"] != job:
            raise UsageError(f"{folder}: was run with other options; give another folder, or remove this one")
    else:
        print(f"study: {name}, seed {seed}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job, indent=2), encoding="utf-8")
        if code := in_process(folder):
            failures[f"{name}, seed {seed}"] = f"ended with {code}: {_last_line(folder / 'log.txt')}"
            return
        result = {"job": job, **_read(folder / "figures.json"), **_read(folder / "cost.json"), "versions": _versions()}
        (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        for part in ("figures.json", "cost.json"):
            (folder / part).unlink()
    result |= health_of(folder / "run" / "metrics.csv", options.val, options.root_dir)
    result["draws"] = {which: dict(np.load(folder / f"{which}.npz")) for which in result.get("lists", {})}
    results.setdefault(name, []).append(result)


def health_of(metrics: Path, val: str, root_dir: str | None) -> dict[str, Any]:
    """Spread and effective rank of our own runs before training and after it, and the verdict."""
    if not metrics.exists():
        return {}
    rows = read_metrics(metrics)
    start, end = (Health(*(float(row[f"val/{spec.name}"]) for spec in fields(Health))) for row in (rows[0], rows[-1]))
    images = min(len(read_manifest(val, root_dir)), JUDGED_ON)
    lost = degraded(*(float(row["val/retrieval"]) for row in (rows[-1], rows[0])), images)
    said = "collapsed" if verdict(end, start) else "degraded" if lost else "in order"
    return {"health": (start, end), "verdict": said}


def job_of(name: str, row: Row, seed: int, options: argparse.Namespace, lists: dict[str, str]) -> dict[str, Any]:
    """All that a run depends on, as plain values."""
    common = {
        "train_metadata": options.train,
        "val_metadata": options.val,
        "root_dir": options.root_dir,
        "backbone": options.backbone,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "max_epochs": options.epochs,
        "precision": "32-true",
        "whiten": False,  # measuring fits its own, the same for every row
        "seed": seed,
    }
    if options.weights:
        common["pretrained_path"] = options.weights
    return {
        "row": name,
        "kind": row.kind,
        "seed": seed,
        "options": {**common, **row.options},
        "train": options.train,
        "root_dir": options.root_dir,
        "lists": lists,
        "landmarks": options.landmarks,
        "whiten_on": options.whiten_on,
    }


def in_process(folder: Path) -> int:
    """Do a job in a process of its own, for honest seconds and memory; its exit code, its words in log.txt."""
    words = [sys.executable, str(Path(__file__).parent / "measure.py"), str(folder)]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            return process.wait()
        finally:
            process.terminate()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _last_line(log: Path) -> str:
    """The last line with a word in it, without the frame that Typer draws around errors."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    said = next((line.strip("│ ") for line in reversed(lines) if re.search(r"\w", line)), "nothing was said")
    return f"{said} (see {log})"


def _versions() -> dict[str, str]:
    names = ("ear-teacher-cli", "torch", "timm", "pytorch-lightning", "lightly", "numpy", "pillow")
    return {name: version(name) for name in names if importlib.util.find_spec(_module(name))}


def _module(package: str) -> str:
    return {"ear-teacher-cli": "ear_teacher_cli", "pillow": "PIL"}.get(package, package.replace("-", "_"))


def best_rows(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row], count: int) -> list[str]:
    """The `count` rows that learn with the highest whitened rank-1, mean over the lists. Which rows are repeated is all
    that this decides."""
    learned = [name for name in results if rows[name].kind in LEARN]
    score = {
        name: np.mean([figures["whitened"]["rank1"] for figures in results[name][0]["lists"].values()])
        for name in learned
    }
    # the recommended preset always: it is the claim
    return sorted(learned, key=lambda name: (name != "recommended", -score[name]))[:count]


def table(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row]) -> str:
    """The figures as Markdown, raw / whitened: of each list a table, then the other figures."""
    parts = []
    measured = next((runs[0]["lists"] for runs in results.values() if "lists" in runs[0]), {})
    for which in measured:
        lines = [["", "seeds", "rank-1, %", "EER, %", "rank-1 against untouched", "EER against untouched"]]
        for name, runs in results.items():
            if rows[name].kind == "step0":
                continue
            cells = [rows[name].label, str(len(runs)) if rows[name].kind in LEARN else "–"]
            for figure in ("rank1", "eer"):
                ways = [[100 * run["lists"][which][way][figure] for run in runs] for way in WAYS]
                cells.append(" / ".join(spread(values, 1) for values in ways))
            cells += [_against(results, rows, name, which, figure) for figure in ("rank1", "eer")]
            lines.append(cells)
        about = measured[which]
        rivals = [name for name in ("seed", "fixed", "kmeans", "simclr", "simsiam", "dino") if name in results]
        duel = [["recommended against", *("rank-1", "EER")]] if "recommended" in results and rivals else []
        for name in rivals if duel else ():
            pair = (_difference(results["recommended"], results[name], which, figure) for figure in ("rank1", "eer"))
            duel.append([rows[name].label, *pair])
        parts += [
            f"**{which}**: {about['pictures']} images, {about['people']} people, {about['ears']} ears; rank-1 by chance "
            f"{100 * about['chance']:.1f} %.",
            _markdown(lines),
            *([_markdown(duel)] if duel else []),
        ]
    lines = [["", "landmark NME, %", "PSNR, dB", "spread", "effective rank", "verdict"]]
    for name, runs in results.items():
        cells = [
            spread([100 * run["nme"] for run in runs if "nme" in run], 2),
            spread([run["psnr"] for run in runs if "psnr" in run], 1),
            *_health_cells([run for run in runs if "health" in run]),
        ]
        if set(cells) != {"–"}:
            lines.append([rows[name].label, *cells])
    return "\n\n".join([*parts, _markdown(lines), "\n".join(_notes(results, rows))]) + "\n"


def _health_cells(runs: list[dict[str, Any]]) -> list[str]:
    """Before training -> after it, means over seeds."""
    if not runs:
        return ["–"] * 3
    means = [
        [np.mean([getattr(run["health"][when], figure) for run in runs]) for when in (0, 1)]
        for figure in ("spread", "effective_rank")
    ]
    said = ", ".join(dict.fromkeys(run["verdict"] for run in runs))
    return [f"{means[0][0]:.2f} → {means[0][1]:.2f}", f"{means[1][0]:.0f} → {means[1][1]:.0f}", said]


def _against(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row], name: str, which: str, figure: str) -> str:
    if name == "untouched" or "untouched" not in results or rows[name].kind == "shuffled":
        return "–"
    return _difference(results[name], results["untouched"], which, figure)


def _difference(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], which: str, figure: str) -> str:
    """Mean over seeds of `mine` less that of `theirs`, both treated alike, in points; in brackets its 95 % interval
    under a bootstrap over people that draws the same people for all."""
    images = [run["draws"][which]["rows"].tolist() for run in [*mine, *theirs]]
    if any(rows != images[0] for rows in images):
        return "–"  # not the same images could be read
    cells = []
    for way in WAYS:
        value, drawn = (
            np.mean([run["lists"][which][way][figure] for run in mine])
            - np.mean([run["lists"][which][way][figure] for run in theirs]),
            np.mean([run["draws"][which][f"{way}_{figure}"] for run in mine], axis=0)
            - np.mean([run["draws"][which][f"{way}_{figure}"] for run in theirs], axis=0),
        )
        low, high = interval(drawn)
        cells.append(f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    return " / ".join(cells)


def spread(values: list[float], digits: int) -> str:
    """Mean, with the standard deviation over seeds where there are several; a dash where there is nothing."""
    if not values:
        return "–"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def _notes(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row]) -> list[str]:
    notes = ["Identity figures are raw cosine / centred and whitened on unlabelled training images."]
    constant = next((runs[0]["constant_nme"] for runs in results.values() if "constant_nme" in runs[0]), None)
    if constant is not None:
        notes.append(f"Landmarks: the mean points of the ear's side, whatever the image, give {100 * constant:.2f} %.")
    for name, runs in results.items():
        if rows[name].kind == "step0":
            notes.append(f"Step 0 against the untouched backbone: largest difference {runs[0]['difference']:.1e}.")
    return [f"- {note}" for note in notes]


def cost(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row]) -> str:
    """Time and memory of training as Markdown, means over seeds."""
    lines = [["", "seconds a run", "CPU seconds", "peak memory, MB"]]
    for name, runs in results.items():
        if rows[name].kind in LEARN:
            means = (np.mean([run[figure] for run in runs]) for figure in COSTS)
            lines.append([rows[name].label, *(f"{mean:.0f}" for mean in means)])
    return _markdown(lines) + "\n"


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


if __name__ == "__main__":
    sys.exit(main())

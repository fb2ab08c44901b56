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
import csv
import importlib.util
import json
import multiprocessing
import re
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ear_teacher_cli.data.manifest import read_manifest
from ear_teacher_cli.errors import EarTeachError, ManifestError, PictureError, WordsError


@dataclass(frozen=True)
class Row:
    """`kind`: who makes the weights (earteach, lightly, start) or which check it is. `options`: TrainConfig fields."""

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


# How one fine-tunes, the same for every row that learns and has no preset of its own. The rivals take it too.
RECIPE = {"augment": True, "learning_rate": 1e-4, "warmup_epochs": 1}
# What of the rivals' backbones stays as it was; the same as in RECIPE.
FROZEN = {"freeze_stages": 0, "freeze_batchnorm": False}

ROWS = {
    "random": Row("Random weights", "start", {"pretrained": False}),
    "untouched": Row("Untouched backbone", "start"),
    "seed": Row("Seed recipe, made runnable", "earteach", {"preset": "seed"}),
    "reconstruction": Row("Reconstruction only", "earteach", {**RECIPE, "metric_loss": "none"}),
    "fixed": Row("Fixed random classes (control)", "earteach", {**RECIPE, "pseudo_classes": "fixed"}),
    "instance": Row("Each picture a class", "earteach", {**RECIPE, "pseudo_classes": "instance"}),
    "kmeans": Row("k-means classes", "earteach", {**RECIPE, "pseudo_classes": "kmeans"}),
    "recommended": Row("Recommended preset", "earteach", {"preset": "recommended"}),
    "simclr": Row("SimCLR (lightly)", "lightly", RECIPE),
    "simsiam": Row("SimSiam (lightly)", "lightly", RECIPE),
    "dino": Row("DINO (lightly)", "lightly", RECIPE),
    # Against self-deception, all with the untouched backbone.
    "shuffled": Row("Check: identities shuffled", "shuffled"),
    "grey": Row("Check: 32 x 32 grey pixels", "grey"),
    "masked": Row("Check: ear painted over", "masked"),
    "step0": Row("Check: step 0 of a run", "step0"),
}
LEARN = ("earteach", "lightly")
RESAMPLES = 2000


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    try:
        return run_study(options)
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
    add("--batch-size", type=int, default=64, help="pictures a step (default: %(default)s)")
    add("--num-workers", type=int, default=8, help="processes that load pictures (default: %(default)s)")
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
    add("--whiten-on", type=int, default=4000, help="training pictures to fit the whitening on (default: %(default)s)")
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
    for file, text in (("table.md", table(results, rows, lists)), ("cost.md", cost(results, rows))):
        (options.out / file).write_text(text, encoding="utf-8")
        print(text)
    for name, reason in failures.items():
        print(f"study: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        raise WordsError(f"--eval {text}: is not NAME=LIST; write it as in same=eval.csv")
    return name, path


def refuse_overlap(train: str, root_dir: str | None, path: str) -> None:
    """Raise ManifestError if a picture of the list `path` is in the training manifest, too."""

    def files(manifest):
        for index in range(len(manifest)):
            try:
                yield index, manifest.file(index)
            except PictureError:  # leaves the root folder: it will be skipped
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
            raise WordsError(f"--rows {name}: no such row; choose all, or of {', '.join(ROWS)}")
    rows = {name: ROWS[name] for name in ROWS if name in wanted}
    for text in tries:
        name, _, changes = text.partition(":")
        pairs = [change.split("=", 1) for change in changes.split(",")]
        if name not in ROWS or ROWS[name].kind != "earteach" or any(len(pair) < 2 for pair in pairs):
            raise WordsError(f"--try {text}: is not ROW:option=value; write it as in kmeans:learning_rate=3e-4")
        options = {option.replace("-", "_"): value for option, value in pairs}
        rows[re.sub(r"[^\w.]+", "_", text)] = Row(
            f"{ROWS[name].label}, {changes}", "earteach", {**ROWS[name].options, **options}
        )
    return rows


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
            raise WordsError(f"{folder}: was run with other options; give another folder, or remove this one")
    else:
        print(f"study: {name}, seed {seed}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job, indent=2), encoding="utf-8")
        for step in ("train", "measure"):
            if code := in_process(step, folder):
                failures[f"{name}, seed {seed}"] = f"{step} ended with {code}: {_last_line(folder / 'log.txt')}"
                return
        result = {"job": job, **_read(folder / "figures.json"), **_read(folder / "cost.json"), "versions": _versions()}
        (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        for part in ("figures.json", "cost.json"):
            (folder / part).unlink()
    result["hits"] = {which: _hits(folder / f"{which}.csv") for which in result.get("lists", {})}
    results.setdefault(name, []).append(result)


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
        "seed": seed,
    }
    if options.weights:
        common["pretrained_path"] = options.weights
    return {
        "row": name,
        "kind": row.kind,
        "seed": seed,
        "options": {**common, **row.options},
        "frozen": FROZEN,
        "train": options.train,
        "root_dir": options.root_dir,
        "lists": lists,
        "landmarks": options.landmarks,
        "whiten_on": options.whiten_on,
    }


def in_process(step: str, folder: Path) -> int:
    """`train` or `measure` in a process of its own, for honest seconds and memory; its exit code.

    Where there is a fork server, torch is imported there once, and not once in every process.
    """
    from measure import run_in_process

    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:
        context.set_forkserver_preload(["torch", "timm", "pytorch_lightning"])
    process = context.Process(target=run_in_process, args=(step, str(folder)))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        raise
    return process.exitcode


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


def _hits(path: Path) -> dict[str, Any]:
    """Per picture: its ear, and whether it was found at rank 1, raw and whitened."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return {
        "ears": [line["identity"] for line in lines],
        "raw": np.array([int(line["raw_hit"]) for line in lines]),
        "whitened": np.array([int(line["whitened_hit"]) for line in lines]),
    }


def best_rows(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row], count: int) -> list[str]:
    """The `count` rows that learn with the highest whitened rank-1, mean over the lists. Which rows are repeated is all
    that this decides."""
    learned = [name for name in results if rows[name].kind in LEARN]
    score = {
        name: np.mean([figures["whitened"]["rank1"] for figures in results[name][0]["lists"].values()])
        for name in learned
    }
    return sorted(learned, key=lambda name: -score[name])[:count]


def table(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row], lists: dict[str, str]) -> str:
    """The figures as Markdown: raw / whitened."""
    header = ["", "seeds"]
    for name in lists:
        header += [f"{name}: rank-1, %", f"{name}: EER, %", f"{name}: rank-1 against untouched, points [95 %]"]
    lines = [[*header, "landmark NME, %", "PSNR, dB"]]
    for name, runs in results.items():
        if rows[name].kind == "step0":
            continue
        cells = [rows[name].label, str(len(runs)) if rows[name].kind in LEARN else "–"]
        for which in lists:
            for figure in ("rank1", "eer"):
                cells.append(
                    " / ".join(
                        spread([100 * run["lists"][which][way][figure] for run in runs], 1)
                        for way in ("raw", "whitened")
                    )
                )
            cells.append(_against(results, rows, name, which))
        cells.append(spread([100 * run["nme"] for run in runs if "nme" in run], 2))
        cells.append(spread([run["psnr"] for run in runs if "psnr" in run], 1))
        lines.append(cells)
    return "\n".join([_markdown(lines), "", *_notes(results, rows)]) + "\n"


def _against(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row], name: str, which: str) -> str:
    if name == "untouched" or "untouched" not in results or rows[name].kind == "shuffled":
        return "–"
    base, cells = results["untouched"][0]["hits"][which], []
    for way in ("raw", "whitened"):
        if any(run["hits"][which]["ears"] != base["ears"] for run in results[name]):
            return "–"  # not the same pictures could be read
        mine = np.mean([run["hits"][which][way] for run in results[name]], axis=0)
        difference, low, high = paired_difference(mine, base[way], base["ears"])
        cells.append(f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    return " / ".join(cells)


def paired_difference(mine: np.ndarray, theirs: np.ndarray, ears: list[str]) -> tuple[float, float, float]:
    """(mean difference of two rank-1 hits per picture, 2.5 % and 97.5 % of a bootstrap over identities)."""
    _, group = np.unique(ears, return_inverse=True)
    sums, counts = np.bincount(group, mine - theirs), np.bincount(group)
    drawn = np.random.default_rng(0).integers(0, len(counts), (RESAMPLES, len(counts)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def spread(values: list[float], digits: int) -> str:
    """Mean, with the standard deviation over seeds where there are several; a dash where there is nothing."""
    if not values:
        return "–"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def _notes(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row]) -> list[str]:
    notes = ["Identity figures are raw cosine / centred and whitened on unlabelled training pictures."]
    measured = next((runs[0]["lists"] for runs in results.values() if "lists" in runs[0]), {})
    for name, figures in measured.items():
        notes.append(
            f"{name}: {figures['pictures']} pictures of {figures['ears']} ears; rank-1 by chance "
            f"{100 * figures['chance']:.1f} %."
        )
    constant = next((runs[0]["constant_nme"] for runs in results.values() if "constant_nme" in runs[0]), None)
    if constant is not None:
        notes.append(
            f"Landmarks: the mean points of the ear's side, whatever the picture, give {100 * constant:.2f} %."
        )
    for name, runs in results.items():
        if rows[name].kind == "step0":
            notes.append(f"Step 0 against the untouched backbone: largest difference {runs[0]['difference']:.1e}.")
    return [f"- {note}" for note in notes]


def cost(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row]) -> str:
    """Time and memory of training as Markdown, means over seeds."""
    lines = [["", "seconds a run", "peak memory, MB"]]
    for name, runs in results.items():
        if rows[name].kind in LEARN:
            means = (np.mean([run[figure] for run in runs]) for figure in ("seconds", "peak_memory_mb"))
            lines.append([rows[name].label, *(f"{mean:.0f}" for mean in means)])
    return _markdown(lines) + "\n"


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


if __name__ == "__main__":
    sys.exit(main())

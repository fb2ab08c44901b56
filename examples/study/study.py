"""Compare training objectives: train every row from the same initial weights, measure it, and write the tables.

    python study.py OUT --train train.npy --val val.npy --eval same=eval.csv --eval other=other/eval.csv \\
        --landmarks drawn/ears.jsonl --weights start.safetensors --backbone tf_efficientnet_lite0 \\
        --image-size 128 --epochs 2 --batch-size 64 --seeds 0 1 2

All rows are trained for the same number of steps and measured in the same way; README.md describes the protocol. Each
(row, seed) has a folder OUT/ROW-SEED with its job, weights and `result.json`. Finished rows are skipped, so an
interrupted study continues where it stopped. OUT/table.md has the metrics (the same command gives the same file),
OUT/cost.md time and memory.
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
from typing import Any

import numpy as np
from recipes import ROWS, select_rows
from tables import MASK_WINDOWS, PSNR_REFERENCES, TRAINED, Results, Row, cost_table, metrics_table

from ear_teacher_cli.data.manifest import Manifest, read_manifest
from ear_teacher_cli.errors import EarTeachError, ImageError, ManifestError, UsageError
from ear_teacher_cli.quality.collapse import JUDGED_ON, Health, degraded, verdict
from ear_teacher_cli.run_folder import read_metrics

PACKAGES = {  # distribution -> module, of the versions that result.json records
    "ear-teacher-cli": "ear_teacher_cli",
    "torch": "torch",
    "timm": "timm",
    "pytorch-lightning": "pytorch_lightning",
    "lightly": "lightly",
    "numpy": "numpy",
    "pillow": "PIL",
}


@dataclass
class Study:
    """What the runs of a study share. `manifests`: evaluation manifests by name. `failures`: run -> reason."""

    options: argparse.Namespace
    manifests: dict[str, str]
    results: Results = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Run the study and return the exit code."""
    options = parse_options(argv)
    # SIGTERM reaches this process only; as KeyboardInterrupt it also ends the run in the child process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_study(options)
    except KeyboardInterrupt:
        print("study: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except EarTeachError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train and measure every row of the study.")
    add = parser.add_argument
    add("out", type=Path, help="output folder; an interrupted study in it is continued")
    add("--train", required=True, help="training manifest (identities are not needed)")
    add("--val", required=True, help="validation manifest")
    add("--root-dir", help="folder of relative paths in --train and --val (default: as earteach train)")
    manifests = parser.add_mutually_exclusive_group(required=True)
    manifests.add_argument(
        "--eval", action="append", metavar="NAME=LIST", help="evaluation manifest with identities; repeat for more"
    )
    manifests.add_argument(
        "--choose-on",
        metavar="LIST",
        help="evaluate on this manifest only, of people who are not in --train, to choose options",
    )
    add("--landmarks", help="ears.jsonl of make_sample_ears.py for the landmark probe (default: no probe)")
    add("--masks", help="list of ears on whole photos with masks for the mask probe (default: no probe)")
    add("--weights", help="pretrained weights (default: as earteach train)")
    add("--backbone", default="convnext_tiny", help="timm model (default: %(default)s)")
    add("--image-size", type=int, default=224, help="input side in pixels (default: %(default)s)")
    add("--epochs", type=int, default=2, help="epochs of every trained row (default: %(default)s)")
    add(
        "--rival-epochs",
        type=int,
        metavar="N",
        help="epochs of the methods of lightly, for example as many as cost the same time (default: --epochs)",
    )
    add("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    add("--num-workers", type=int, default=8, help="processes that load images (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="the first for all rows, others for --best (default: 0)")
    add("--best", type=int, default=4, help="number of trained rows that run with all seeds (default: %(default)s)")
    add("--rows", default="all", help=f"all, or names separated by commas: {', '.join(ROWS)}")
    add(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="ROW:option=value[,...]",
        help="add a row: ROW with other options of earteach train, e.g. kmeans:learning_rate=3e-4; repeat for more",
    )
    add("--whiten-on", type=int, default=2048, help="training images to fit the whitening on (default: %(default)s)")
    return parser.parse_args(argv)


def run_study(options: argparse.Namespace) -> int:
    """Run what has no result yet and write the tables. Return 1 if a row could not be run."""
    manifests = {"choose": options.choose_on} if options.choose_on else dict(_name_and_path(t) for t in options.eval)
    for path in manifests.values():
        reject_overlap(options.train, options.root_dir, path)
    rows = select_rows(options.rows, options.tries)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options, manifests)
    first, others = options.seeds[0], options.seeds[1:]
    for name in rows:
        run_row(study, name, rows[name], first)
    for name in best_rows(study.results, rows, options.best) if others else ():
        for seed in others:
            run_row(study, name, rows[name], seed)
    results = {name: study.results[name] for name in rows if name in study.results}
    for file, text in (("table.md", metrics_table(results, rows)), ("cost.md", cost_table(results, rows))):
        (options.out / file).write_text(text, encoding="utf-8")
        print(text)
    for name, reason in study.failures.items():
        print(f"study: {name}: {reason}", file=sys.stderr)
    return 1 if study.failures else 0


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        raise UsageError(f"--eval {text}: is not NAME=LIST; write, for example, same=eval.csv")
    return name, path


def reject_overlap(train: str, root_dir: str | None, path: str) -> None:
    """Raise ManifestError if the manifest `path` has an image of the training manifest."""
    training_files = set(_files(read_manifest(train, root_dir)).values())
    evaluation = read_manifest(path)
    for index, file in _files(evaluation).items():
        if file in training_files:
            raise ManifestError(
                f"{evaluation.where(index)}: is also in {train}; evaluate on people who are not in the training manifest"
            )


def _files(manifest: Manifest) -> dict[int, Path]:
    """Return the file of each row, without rows whose path leaves the root folder (they are skipped later)."""
    files = {}
    for index in range(len(manifest)):
        try:
            files[index] = manifest.file(index)
        except ImageError:
            continue
    return files


def run_row(study: Study, name: str, row: Row, seed: int) -> None:
    """Add the result of a row to `study.results`, read from its folder or computed, or the reason to `study.failures`."""
    options = study.options
    if row.kind == "lightly" and importlib.util.find_spec("lightly") is None:
        study.failures[name] = "lightly is not installed: pip install 'ear-teacher-cli[study]'"
        return
    folder, job = options.out / f"{name}-{seed}", job_of(study, name, row, seed)
    if (folder / "result.json").exists():
        result = _read(folder / "result.json")
        if result["job"] != job:
            raise UsageError(f"{folder}: has a result of other options; give another output folder, or remove this one")
    else:
        print(f"study: {name}, seed {seed}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job, indent=2), encoding="utf-8")
        if code := run_in_subprocess(folder):
            study.failures[f"{name}, seed {seed}"] = f"exit code {code}: {_last_line(folder / 'log.txt')}"
            return
        parts = [folder / "metrics.json", folder / "cost.json"]
        result = {"job": job, **_read(parts[0]), **_read(parts[1]), "versions": _versions()}
        (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        for part in parts:
            part.unlink()
    metrics = folder / "run" / "metrics.csv"
    result |= health_of(metrics, options.val, options.root_dir) | {"psnr_references": psnr_references(metrics)}
    result["draws"] = {which: dict(np.load(folder / f"{which}.npz")) for which in result.get("lists", {})}
    if "masks" in result:
        result["mask_windows"] = dict(np.load(folder / MASK_WINDOWS))
    study.results.setdefault(name, []).append(result)


def health_of(metrics: Path, val: str, root_dir: str | None) -> dict[str, Any]:
    """Return Health before and after training and the verdict, of rows that `earteach train` trained; else {}."""
    if not metrics.exists():
        return {}
    rows = read_metrics(metrics)
    before, after = (
        Health(*(float(row[f"val/{spec.name}"]) for spec in fields(Health))) for row in (rows[0], rows[-1])
    )
    images = min(len(read_manifest(val, root_dir)), JUDGED_ON)
    lost = degraded(*(float(row["val/retrieval"]) for row in (rows[-1], rows[0])), images)
    state = "collapsed" if verdict(after, before) else "degraded" if lost else "in order"
    return {"health": (before, after), "verdict": state}


def psnr_references(metrics: Path) -> dict[str, float]:
    """Return the PSNR in dB of references that do not depend on the weights, as far as the run has measured them."""
    rows = read_metrics(metrics)
    found = {name: [row[name] for row in rows if row.get(name)] for name in PSNR_REFERENCES}
    return {name: float(values[-1]) for name, values in found.items() if values}


def job_of(study: Study, name: str, row: Row, seed: int) -> dict[str, Any]:
    """Return everything that a run depends on, as plain values."""
    options = study.options
    common = {
        "train_metadata": options.train,
        "val_metadata": options.val,
        "root_dir": options.root_dir,
        "backbone": options.backbone,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "max_epochs": options.rival_epochs or options.epochs if row.kind == "lightly" else options.epochs,
        "precision": "32-true",
        "whiten": False,  # measure.py fits a whitening for every row in the same way
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
        "lists": study.manifests,
        "landmarks": options.landmarks,
        "masks": options.masks,
        "choosing": options.choose_on is not None,
        "whiten_on": options.whiten_on,
    }


def run_in_subprocess(folder: Path) -> int:
    """Run a job in a process of its own, so that its time and memory can be measured. Return its exit code.

    Its output is written to log.txt.
    """
    command = [sys.executable, str(Path(__file__).parent / "measure.py"), str(folder)]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            return process.wait()
        finally:
            process.terminate()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _last_line(log: Path) -> str:
    """Return the last line that contains a letter or digit, without the frame that Typer draws around errors."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = next((line.strip("│ ") for line in reversed(lines) if re.search(r"\w", line)), "the log is empty")
    return f"{last} (see {log})"


def _versions() -> dict[str, str]:
    return {name: version(name) for name, module in PACKAGES.items() if importlib.util.find_spec(module)}


def best_rows(results: Results, rows: dict[str, Row], count: int) -> list[str]:
    """Return the `count` trained rows with the highest whitened rank-1 (mean over manifests), "recommended" always first.

    Only the choice of rows that run with further seeds depends on this.
    """
    trained = [name for name in results if rows[name].kind in TRAINED]
    score = {
        name: np.mean([metrics["whitened"]["rank1"] for metrics in results[name][0]["lists"].values()])
        for name in trained
    }
    return sorted(trained, key=lambda name: (name != "recommended", -score[name]))[:count]


if __name__ == "__main__":
    sys.exit(main())

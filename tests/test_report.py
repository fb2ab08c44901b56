"""report.html and TensorBoard: what they contain, and what they must not contain."""

import csv
import html
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, apart, read_table, small_config, trained
from pytorch_lightning.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ear_teacher_cli.console import Console
from ear_teacher_cli.data.datamodule import read_val_manifest
from ear_teacher_cli.data.dataset import EarDataset
from ear_teacher_cli.errors import EarTeachError, Stopped
from ear_teacher_cli.model.checkpoint import read_checkpoint
from ear_teacher_cli.quality import collapse
from ear_teacher_cli.quality.collapse import health
from ear_teacher_cli.report import principal_axes, validation_embeddings
from ear_teacher_cli.report import write as verb
from ear_teacher_cli.report.validation_embeddings import embed_validation_set, validation_embeddings_of
from ear_teacher_cli.run_folder import best_checkpoint
from ear_teacher_cli.training import loggers
from ear_teacher_cli.training.describe import why_best
from ear_teacher_cli.training.module import EarTeacherLightningModule
from ear_teacher_cli.training.run import RESUMABLE, resume, train

QUIET = Console(quiet=True)
NEEDS_NOTHING = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.fixture(scope="module")
def named(ears, tmp_path_factory) -> Path:
    """A run whose validation images have identities and sides, with the recipe's whitening and a projector."""
    config = small_config(
        ["", str(ears / "train_teacher.npy"), "", str(ears / "eval.csv")],
        output_dir=str(tmp_path_factory.mktemp("named")),
        max_epochs=2,
        whiten=True,
        projector=True,
        report=True,
    )
    return trained(config)


def test_the_page_has_every_section_and_loads_nothing(run):
    text = (run / "report.html").read_text()
    for heading in (
        "Is it better than the baseline?",
        "How it learned",
        "Reconstructions, from first to last",
        "Health of embeddings and pseudo-classes",
        "Principal axes of the embedding",
        "Nearest neighbours",
        "What to do next",
        "Configuration",
    ):
        assert f"<h2>{heading}</h2>" in text, heading
    assert NEEDS_NOTHING in text and "<script" not in text and "<link" not in text and "@import" not in text
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)', text))
    assert not re.findall(r'(?:href|url)\s*[=(]\s*"?(?!#)[a-z]', text)  # SVG's own #names are all there is
    assert text.count("<svg") >= 8 and text.count("<img") >= 10
    assert f"earteach resume {shlex.quote(str(run))}" in html.unescape(text) and "earteach export-backbone" in text
    assert "<td>train_metadata</td>" in text and "<td>learning_rate</td><td>0.001</td>" in text


def test_principal_axes_are_shown_where_reconstructions_are_good_enough(run, tmp_path, monkeypatch, earteach):
    heading, image = "<h2>Principal axes of the embedding</h2>", 'alt="decoded images: axis 1: '
    text = (run / "report.html").read_text()
    row = next(
        row
        for row in read_table(run / "metrics.csv")
        if row["epoch"] == str(read_checkpoint(best_checkpoint(run)).epoch)
    )
    above = round(float(row["val/psnr"]) - float(row["val/psnr_mean_image"]), 1)
    assert above < principal_axes.SHOWN_FROM and heading in text and image not in text
    assert f"<p>Left out: reconstructions are {abs(above):.1f} dB {'above' if above >= 0 else 'below'} the mean" in text
    monkeypatch.setattr(principal_axes, "SHOWN_FROM", -100.0)
    assert earteach("report", run, "-o", tmp_path / "axes.html").code == 0
    text = (tmp_path / "axes.html").read_text()
    assert heading in text and image in text and "holds anatomy" in text and "Left out" not in text
    assert earteach("report", run, "-o", tmp_path / "none.html", "--no-images").code == 0
    text = (tmp_path / "none.html").read_text()
    assert heading not in text and image not in text and "Left out" not in text


def test_the_axes_are_of_the_embeddings_that_the_decoder_of_the_checkpoint_reconstructs(run):
    checkpoint = read_checkpoint(best_checkpoint(run))
    found = embed_validation_set(checkpoint, QUIET)
    module = EarTeacherLightningModule(checkpoint.config)
    module.model.load_state_dict(checkpoint.model_state)
    dataset = EarDataset(read_val_manifest(checkpoint.config), checkpoint.preprocessing)
    pixels = torch.stack([torch.as_tensor(dataset[row]["pixels"]) for row in range(len(found.unscaled))])
    decoded = principal_axes._decode(module.model.eval().decoder, torch.from_numpy(found.unscaled[:, None]))[:, 0]
    assert (decoded.int() - module.reconstruct(pixels).int()).abs().max() <= 1  # batches differ
    assert not np.allclose(np.linalg.norm(found.unscaled, axis=1), 1, atol=0.1)
    assert apart(found.unscaled / np.linalg.norm(found.unscaled, axis=1, keepdims=True), found.raw.rows) < 1e-6


def test_the_metrics_of_the_page_are_those_of_the_run(run):
    text = (run / "report.html").read_text()
    start = read_table(run / "metrics.csv")[0]
    best = read_checkpoint(best_checkpoint(run)).epoch
    there = next(row for row in read_table(run / "metrics.csv") if row["epoch"] == str(best))
    cells = re.search(r"<td>retrieval, %</td>(.*?)</tr>", text)[1]
    assert re.findall(r">([\d.]+)<", cells)[:2] == [f"{float(row['val/retrieval']):.1f}" for row in (start, there)]


def test_the_baseline_is_what_training_started_with(run):
    found = embed_validation_set(read_checkpoint(best_checkpoint(run)), QUIET)
    start = read_table(run / "metrics.csv")[0]
    assert health(torch.from_numpy(found.baseline.rows)).spread == pytest.approx(float(start["val/spread"]), rel=1e-4)
    assert not np.allclose(found.baseline.rows, found.raw.rows)


def text_of(page: Path) -> str:
    """The page without its images."""
    return re.sub(r'src="data:[^"]*"', "", page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_report_at_the_end_of_a_run_embeds_nothing_and_equals_a_later_one(ears, tmp_path, monkeypatch, earteach):
    config = small_config(
        ["", str(ears / "train_teacher.npy"), "", str(ears / "eval.csv")],
        output_dir=str(tmp_path), max_epochs=2, whiten=True, projector=True, report=True,
    )  # fmt: skip
    outcome = train(config, QUIET)
    calls: list[str] = []
    with monkeypatch.context() as patched:
        for name in ("embed_manifest", "embedder_of", "read_val_manifest", "EarTeacherLightningModule"):
            patched.setattr(validation_embeddings, name, lambda *words, name=name, **options: calls.append(name))
        assert verb.write_final_outputs(outcome, Console(quiet=True)) == outcome.experiment / "report.html"
    assert calls == [] and "<h2>Look-alikes</h2>" in (outcome.experiment / "report.html").read_text()
    assert earteach("report", outcome.experiment, "-o", tmp_path / "later.html").code == 0
    assert text_of(tmp_path / "later.html") == text_of(outcome.experiment / "report.html")
    checkpoint = read_checkpoint(outcome.best)
    manifest = outcome.data.val_set.manifest
    kept = validation_embeddings_of(manifest, outcome.best_embeddings, outcome.module.baseline_embeddings, checkpoint)
    later = embed_validation_set(checkpoint, QUIET)
    assert apart(kept.unscaled, later.unscaled) < 1e-5
    for name in ("teacher", "raw", "baseline"):
        assert apart(getattr(kept, name).rows, getattr(later, name).rows) < 1e-5
        assert getattr(kept, name).paths == getattr(later, name).paths
    assert kept.teacher.whitened and not kept.raw.whitened


@pytest.mark.slow
def test_a_resumed_run_reads_a_best_epoch_that_it_has_not_trained_itself(manifests, tmp_path, monkeypatch, earteach):
    words = ["--output-dir", tmp_path, "--max-epochs", "1", *SMALL]
    assert earteach("train", *manifests, *words).code == 0
    calls: list[int] = []
    embed = validation_embeddings.embed_validation_set
    monkeypatch.setattr(
        "ear_teacher_cli.report.summary.embed_validation_set", lambda *words: calls.append(1) or embed(*words)
    )
    run = tmp_path / "ear_teacher"
    monkeypatch.setattr("ear_teacher_cli.training.run.RESUMABLE", (*RESUMABLE, "report"))
    outcome = resume(run, QUIET, max_epochs=2, report=True)
    assert verb.write_final_outputs(outcome, QUIET) == run / "report.html"
    assert calls == [1]  # the initial weights are known to the first process only


def test_identities_give_a_comparison_with_intervals_and_look_alikes(named):
    text = (named / "report.html").read_text()
    assert "<h2>Look-alikes</h2>" in text and "teacher, whitened" in text
    row = re.search(r"<tr><td>rank-1</td>(.*?)</tr>", text)[1]
    assert len(re.findall(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", row)) == 2
    assert "With fewer than 20 people intervals are rough" in text and "optimistic" in text and "] *" not in text


def people_of(run: Path) -> set[str]:
    return {row["identity"] for row in read_table(Path(read_checkpoint(best_checkpoint(run)).config.val_metadata))}


@pytest.mark.slow
def test_without_images_there_is_none_and_nobody_is_named(named, tmp_path, earteach):
    said = earteach("report", named, "-o", tmp_path / "r.html", "--no-images")
    text = (tmp_path / "r.html").read_text()
    assert said.code == 0 and "<img" not in text and "Look-alikes" not in text and "rank-1" in text
    assert not any(person in text for person in people_of(named))


@pytest.mark.slow
def test_a_run_without_images_keeps_none_and_no_name(ears, tmp_path, earteach):
    lists = ["--train-metadata", ears / "train_teacher.npy", "--val-metadata", ears / "eval.csv"]
    words = ["--output-dir", tmp_path, "--max-epochs", "1", *SMALL, "--no-images", "--report", "--projector"]
    assert earteach("train", *lists, *words).code == 0
    run = tmp_path / "ear_teacher"
    assert "<img" not in (run / "report.html").read_text() and not list(run.rglob("*.png"))
    assert len(next(run.rglob("tensors.tsv")).read_text().splitlines()) == 12
    assert next(run.rglob("metadata.tsv")).read_text().split() == [str(row) for row in range(12)]
    assert earteach("report", run, "--images").code == 0
    for path in (path for path in run.rglob("*") if path.is_file() and path.suffix not in (".ckpt", ".lock")):
        content = path.read_bytes()
        assert not any(person.encode() in content for person in people_of(run)), path


@pytest.mark.slow
def test_the_environment_keeps_images_out_of_a_report(run, tmp_path, monkeypatch, earteach):
    monkeypatch.setenv("EARTEACH_IMAGES", "0")
    assert earteach("report", run, "-o", tmp_path / "r.html").code == 0
    assert "<img" not in (tmp_path / "r.html").read_text()


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "copy")
    return folder / "copy"


@pytest.mark.slow
def test_the_report_says_why_where_it_cannot_look(ears, manifests, tmp_path, monkeypatch, earteach):
    shutil.copytree(ears, tmp_path / "ears")
    monkeypatch.chdir(tmp_path)
    lists = ["--train-metadata", "ears/train_teacher.npy", "--val-metadata", "ears/val_teacher.npy"]
    assert earteach("train", *lists, "--output-dir", "o", "--max-epochs", "2", *SMALL, "--report").code == 0
    before = (tmp_path / "o" / "ear_teacher" / "report.html").read_text()
    (tmp_path / "ears").rename(tmp_path / "away")
    said = earteach("report", "o/ear_teacher")
    text = html.unescape((tmp_path / "o" / "ear_teacher" / "report.html").read_text())
    assert said.code == 0 and "ears/val_teacher.npy: no such file" in said.err
    assert "Not measured: ears/val_teacher.npy: no such file" in text and "Nearest neighbours" not in text
    verdict = re.search(r'<b class="(good|bad)">(.*?)</b>', before)
    assert verdict and verdict[0] in text  # of the images that training judged on, not of those that are left


@pytest.mark.parametrize(
    "damage, where",
    [
        (b"garbage\n", "metrics.csv line 9"),
        (b"8,18,abc\n", "metrics.csv line 9"),
        (b"\xff\xfe\n", "metrics.csv: is not what earteach wrote"),
    ],
)
def test_damaged_metrics_are_one_line_before_anything_is_trained(damage, where, run, tmp_path, earteach):
    copy = copied(run, tmp_path)
    with open(copy / "metrics.csv", "ab") as file:
        file.write(damage)
    for words in (["report", copy], ["resume", copy, "--max-epochs", "7"]):
        said = earteach(*words)
        assert said.code == 1 and where in said.err.splitlines()[-1] and "epoch 7/7" not in said.err


@pytest.mark.slow
def test_what_a_damaged_run_still_has_is_reported(run, tmp_path, earteach):
    copy = copied(run, tmp_path)
    best = best_checkpoint(copy)
    best.write_bytes(best.read_bytes()[:1000])
    next(copy.rglob("epoch_0001.png")).write_bytes(b"x")
    (copy / "bad_images.csv").write_bytes(b"\xff")
    said = earteach("report", copy)
    assert said.code == 0 and best.name in said.err and "Trying another" in said.err
    for path in (copy / "checkpoints").glob("best-*"):
        path.unlink()
    assert earteach("report", copy).code == 0
    text = (copy / "report.html").read_text()
    assert (
        "epoch of the newest intact checkpoint: no best is left" in text
        and "<th>newest intact (epoch 6)</th>" in text.replace(' class="number"', "")
    )


@pytest.mark.slow
def test_the_report_tells_a_run_that_is_not_over(manifests, tmp_path, earteach):
    words = ["--output-dir", tmp_path, "--max-epochs", "1", *SMALL]
    assert earteach("train", *manifests, *words).code == 0
    run = tmp_path / "ear_teacher"
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("max_epochs = 1\n", "max_epochs = 40\n"))
    assert earteach("report", run).code == 0
    text = (run / "report.html").read_text()
    assert (
        "1 of 1" in text
        and "; of 40, not finished" in text
        and f"earteach resume {shlex.quote(str(run))}\n" in html.unescape(text)
    )
    holder = f"import time; from pathlib import Path; from ear_teacher_cli.files import only_writer\nwith only_writer(Path({str(run)!r})): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert earteach("report", run).code == 0
        other.kill()
    text = (run / "report.html").read_text()
    assert "; of 40, still running" in text and "earteach resume" not in text


def test_the_best_is_what_is_said_to_be_the_best(run, tmp_path):
    copy = copied(run, tmp_path)
    rows = read_table(copy / "metrics.csv")
    for path in (copy / "checkpoints").glob("best-*"):
        path.unlink()
    for epoch, value in ((2, 0.01234), (5, 0.01231)):  # alike to the digits of a name
        rows[epoch]["val/recon_loss"] = str(value)
        (copy / "checkpoints" / f"best-epoch_{epoch:04d}-val_recon_loss_0.0123.ckpt").touch()
    with open(copy / "metrics.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    best = best_checkpoint(copy)
    assert best.name.startswith("best-epoch_0005")
    assert why_best(copy, best, "val/recon_loss").startswith("val/recon_loss 0.01231, the lowest so far (epoch 5 of 6")
    other = best.with_name("best-epoch_0002-val_recon_loss_0.0123.ckpt")
    assert "the lowest of those that are kept (epoch 2 of 6" in why_best(copy, other, "val/recon_loss")


def test_a_collapse_is_said_even_when_quiet(manifests, tmp_path, monkeypatch, earteach):

    monkeypatch.setattr(collapse, "FALLEN_RANK", 1e9)
    said = earteach("train", "-q", *manifests, *SMALL, "--max-epochs", 1, "--output-dir", tmp_path)
    assert said.code == 0 and said.err.startswith("warning: embeddings COLLAPSED: effective rank")


def test_what_report_refuses(run, tmp_path, monkeypatch, earteach):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "empty").mkdir()
    for words, code, named in (
        (["report", run, "-o", "x.pdf"], 2, "x.pdf: the report is HTML; name a .html file"),
        (["report", run, "-o", "there.html"], 2, "there.html: exists already"),
        (["report", "empty"], 1, "empty: holds no config.toml"),
        (["report", "there.html"], 1, "there.html: is a file; give the folder of a run"),
    ):
        said = earteach(*words)
        assert said.code == code and named in said.err and len(said.err.splitlines()) == 1
    assert (tmp_path / "there.html").read_text() == "mine"


@pytest.mark.slow
def test_strange_names_stay_names(manifests, tmp_path):
    name = "<script>alert(1)<" + "b>&amp;"
    config = small_config(manifests, output_dir=str(tmp_path), experiment_name=name, max_epochs=1, report=True)
    text = (trained(config) / "report.html").read_text()
    assert "<script" not in text and html.escape(name.split("<b")[0]) in text


@pytest.mark.slow
@pytest.mark.parametrize("error", [EarTeachError("no room"), OSError(28, "no room"), Stopped(15)])
def test_a_report_that_fails_does_not_fail_the_run(error, manifests, tmp_path, monkeypatch, earteach):
    def fail(*words):
        raise error

    monkeypatch.setattr(verb, "write_page", fail)
    said = earteach("train", *manifests, "--output-dir", tmp_path, "--max-epochs", "1", *SMALL, "--report")
    assert said.code == 0 and ". The run is complete; `earteach report" in said.err and "done: 1 epoch in" in said.err


def test_tensorboard_has_its_panels(named):
    events = EventAccumulator(str(named / "version_0"), size_guidance={"images": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    seed = {"train/loss", "train/recon_loss", "train/metric_loss", "val/loss", "val/recon_loss", "val/metric_loss", "train/lr"}  # fmt: skip
    assert seed | {"train/grad_ratio", "val/spread", "val/effective_rank", "val/rank1", "classes/in_use"} <= set(
        tags["scalars"]
    )
    assert len(events.Images("reconstruction_collage")) == 3 and len(events.Histograms("classes/pictures")) == 2
    plugins = events.summary_metadata
    assert "_hparams_/experiment" in plugins and "custom_scalars__config__" in plugins
    told = plugins["_hparams_/session_start_info"].plugin_data.content
    assert b"metric_loss" in told and b"output_dir" not in told
    assert not [tag for tag in tags["scalars"] if tag.startswith(("hp", "best"))]


def test_the_projector_has_a_row_a_label_and_a_thumbnail_of_every_image(named):
    folder = next(named.glob("version_0/*/validation"))
    rows = (folder / "tensors.tsv").read_text().splitlines()
    labels = (folder / "metadata.tsv").read_text().splitlines()
    images = len(read_table(Path(read_checkpoint(best_checkpoint(named)).config.val_metadata)))
    assert len(rows) == images and labels[0].split("\t") == ["identity", "side", "path"] and len(labels) == images + 1
    assert (folder / "sprite.png").stat().st_size > 1000
    assert "validation" in (named / "version_0" / "projector_config.pbtxt").read_text()


@pytest.mark.slow
def test_the_start_command_that_we_name_shows_every_collage(run):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    options = re.search(r"tensorboard --logdir \S+ (--samples_per_plugin \S+?)`", readme)[1].split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    asked = f"http://127.0.0.1:{port}/data/plugin/images/images?tag=reconstruction_collage&run=version_0&sample=0"
    found: list = []
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(asked, timeout=5) as answer:
                    found = json.load(answer)
            except OSError:
                pass
            if len(found) == 7:
                break
            time.sleep(0.5)
    finally:
        server.terminate()
        server.wait()
    assert [image["step"] for image in found] == list(range(7))


def test_a_logger_that_is_not_there_is_one_line(manifests, tmp_path, earteach):
    if find_spec("wandb"):
        pytest.skip("wandb is installed here")
    said = earteach("train", *manifests, "--output-dir", tmp_path / "o", *SMALL, "--logger", "wandb")
    assert said.code == 2 and "--logger: wandb is not installed; pip install wandb" in said.err
    assert not (tmp_path / "o").exists()


class Told(Logger):
    """Keeps what it is told."""

    name, version = "told", 0

    def __init__(self):
        super().__init__()
        self.options: dict = {}
        self.figures: set[str] = set()

    def log_hyperparams(self, params, *args, **kwargs):
        self.options |= dict(params)

    def log_metrics(self, metrics, step=None):
        self.figures |= set(metrics)


@pytest.mark.slow
def test_other_loggers_are_told_figures_and_the_recipe_but_no_path(manifests, tmp_path, monkeypatch, earteach):
    told = Told()
    monkeypatch.setattr(loggers, "require", lambda config: None)
    monkeypatch.setattr(loggers, "_by_name", lambda config, known: (told, "id-1"))
    words = ["--output-dir", tmp_path, *SMALL, "--max-epochs", "1", "--logger", "wandb"]
    assert earteach("train", *manifests, *words).code == 0
    assert {"train/loss", "val/loss", "val/retrieval"} <= told.figures
    assert told.options["metric_loss"] == "arcface" and told.options["batch_size"] == 8
    assert not any("/" in str(value) for name, value in told.options.items() if name != "monitor"), told.options
    assert (tmp_path / "ear_teacher" / "version_0" / "wandb.txt").read_text() == "id-1\n"
    told.options.clear()
    assert earteach("resume", tmp_path / "ear_teacher", "--max-epochs", "2").code == 0
    assert told.options == {}  # MLflow lets none change


def test_a_folder_that_is_called_like_a_logger_is_none(manifests, tmp_path, monkeypatch, earteach):
    if find_spec("wandb"):
        pytest.skip("wandb is installed here")
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    said = earteach("train", *manifests, *SMALL, "--logger", "wandb")
    assert said.code == 2 and "--logger: wandb is not installed" in said.err


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_by_name_get_the_figures_and_a_resumed_run_goes_on_in_them(
    name, manifests, tmp_path, monkeypatch, earteach
):
    pytest.importorskip(name, reason=f"{name} is not installed: it is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["--output-dir", tmp_path, *SMALL, "--max-epochs", "1", "--logger", name]
    assert earteach("train", *manifests, *words).code == 0
    mark = (tmp_path / "ear_teacher" / "version_0" / f"{name}.txt").read_text()
    assert earteach("resume", tmp_path / "ear_teacher", "--max-epochs", "2").code == 0
    assert (tmp_path / "ear_teacher" / "version_0" / f"{name}.txt").read_text() == mark
    assert not list((tmp_path / "ear_teacher" / name).rglob("*.png")) if name == "wandb" else True


def test_metrics_csv_has_a_header_that_pandas_and_csv_read(run):
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        assert next(csv.reader(file))[:2] == ["epoch", "step"]

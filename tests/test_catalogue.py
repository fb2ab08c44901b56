"""The catalogue of metrics: what it has is logged, documented, and shown wherever it says."""

import csv
import re
import shutil
from pathlib import Path

import pytest
from conftest import read_table

from ear_teacher_cli import metrics_catalogue
from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.metrics_catalogue import METRICS, PANELS, Metric
from ear_teacher_cli.training.progress import cells, sentence

PAGE = Path(__file__).parent.parent / "examples" / "docs" / "metrics.md"
NEW = Metric(
    "val/new", "newness", "A metric of this test.", "%", ".1f", "max", rank=0, report=True, panel="Loss", card="newness"
)


def test_every_metric_of_a_run_is_in_the_catalogue(run):
    keys = {metric.key for metric in METRICS}
    assert len(keys) == len(METRICS) and set(read_table(run / "metrics.csv")[-1]) - {"epoch", "step"} <= keys


def test_metrics_have_a_panel_that_exists_and_monitors_a_direction():
    assert {metric.panel for metric in METRICS if metric.panel} == set(PANELS)
    assert all(metric.direction in ("max", "min") for metric in METRICS if metric.monitor)
    assert all(metric.description.endswith(".") for metric in METRICS)


def documented() -> set[str]:
    """The metrics in the first column of the page's tables; of a loss, both train/ and val/."""
    found = set()
    for row in re.findall(r"^\| ([^|]*) \|", PAGE.read_text(), re.MULTILINE):
        for name in re.findall(r"`([a-z0-9_/]+)`", row):
            found |= {name} if "/" in name else {f"train/{name}", f"val/{name}"} if name.endswith("loss") else set()
    return found


def test_the_page_defines_every_metric_of_the_catalogue_and_no_other():
    keys = {metric.key for metric in METRICS}
    assert documented() - keys == set()
    assert keys - documented() == {"val/agreement"} - documented()  # defined in a sentence
    assert "`val/agreement`" in PAGE.read_text()


def test_a_new_metric_is_in_the_terminal_and_in_a_log(monkeypatch):
    monkeypatch.setattr(metrics_catalogue, "METRICS", (*METRICS, NEW))
    found = {cell.head: cell.text for cell in cells(TrainConfig(), "1/10", {"val/new": 12.34})}
    assert found["newness %"] == "12.3"
    assert "newness 12.3 %" in sentence({"val/new": 12.34}, "", "1.0", "")


@pytest.mark.slow
def test_a_new_metric_is_in_the_report_and_in_the_model_card(run, tmp_path, monkeypatch, earteach):
    monkeypatch.setattr(metrics_catalogue, "METRICS", (*METRICS, NEW))
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = [row | {"val/new": "12.34"} for row in read_table(run / "metrics.csv")]
    with open(copy / "metrics.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert earteach("report", copy).code == 0
    page = (copy / "report.html").read_text()
    assert "<td>newness, %</td>" in page and "<!-- newness -->" in page  # matplotlib's comment on the legend
    assert earteach("export-backbone", copy, tmp_path / "card").code == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| newness, % | 12.34 | 12.34 |" in card and "name: newness, %" in card


def test_the_catalogue_names_every_loss_term():
    from ear_teacher_cli.training.objectives import TERMS

    for term in TERMS:
        for split in ("train", "val"):
            metrics_catalogue.metric_of(f"{split}/{term.name}_loss")

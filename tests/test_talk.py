"""What is said: tables that fit the terminal, plain lines elsewhere."""

from io import StringIO

import pytest
from rich.console import Console

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.console import Silence, Talk
from ear_teacher_cli.training.progress import Reporter

FIGURES = {
    "train/loss": 11.4412, "train/recon_loss": 0.1338, "train/metric_loss": 12.04, "train/contrastive_loss": 5.283,
    "val/loss": 8.395, "val/recon_loss": 0.2461, "val/metric_loss": 6.792, "val/contrastive_loss": 4.753,
    "val/psnr": 15.04, "val/retrieval": 14.58, "val/rank1": 22.9, "val/eer": 34.0, "val/spread": 0.52,
    "val/effective_rank": 201.4,
}  # fmt: skip


def talk_in(width: int | None, color: str | None = None) -> Talk:
    """In a terminal of that width, or with None in a pipe."""
    talk = Talk()
    terminal = width is not None
    talk.console = Console(
        file=StringIO(), force_terminal=terminal, width=width or 80, color_system=color, highlight=False, soft_wrap=True
    )
    return talk


def said(talk: Talk) -> list[str]:
    return talk.console.file.getvalue().splitlines()


def rows(talk: Talk) -> None:
    reporter = Reporter(TrainConfig(max_epochs=100), talk)
    start = {name: value for name, value in FIGURES.items() if name in ("val/retrieval", "val/spread")}
    talk.row(reporter._cells("start", start, FIGURES), "before training: retrieval 6.2 %")
    for epoch, scale in ((1, 1), (10, 1e-3), (100, 1e-6)):
        figures = {name: value * scale if "loss" in name else value for name, value in FIGURES.items()}
        cells = reporter._cells(f"{epoch}/100", figures, FIGURES, "COLLAPSED", "1234.5", "10 h 05 min")
        talk.row(cells, f"epoch {epoch}/100: train 11.44")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_row_fits_the_terminal_and_its_heads_are_said_once(width):
    talk = talk_in(width)
    rows(talk)
    lines = said(talk)
    assert len(lines) == 5 and max(map(len, lines)) <= width
    assert lines[0].split()[0] == "epoch" and lines[-1].split()[0] == "100/100"
    assert len({len(line.rstrip()) for line in lines if "COLLAPSED" in line}) == 1


def test_what_matters_most_is_in_80_columns_and_everything_in_200():
    narrow, wide = talk_in(80), talk_in(200)
    rows(narrow)
    rows(wide)
    assert {"train", "val", "PSNR", "retrieval", "embeddings", "left"} <= set(said(narrow)[0].split())
    assert {"recon", "metric", "contrastive", "rank-1", "EER", "spread"} <= set(said(wide)[0].split())


def test_a_log_has_sentences_and_no_table():
    talk = talk_in(None)
    rows(talk)
    talk.facts([("teacher", "convnext_tiny, " * 20 + "end"), ("", "and more")])
    assert said(talk)[0] == "before training: retrieval 6.2 %"
    assert said(talk)[1:4] == [f"epoch {epoch}/100: train 11.44" for epoch in (1, 10, 100)]
    assert said(talk)[4] == f"teacher: {'convnext_tiny, ' * 20}end"
    assert said(talk)[5] == "    and more"


def test_facts_are_aligned_and_wrapped_in_a_terminal():
    talk = talk_in(60)
    talk.facts([("teacher", "convnext_tiny " * 12), ("data", "x")])
    lines = said(talk)
    assert max(map(len, lines)) <= 60 and lines[0].startswith("teacher     convnext_tiny")
    assert lines[1].startswith(" " * 12 + "convnext_tiny") and lines[-1] == "data        x"


def test_names_cannot_paint_the_terminal():
    talk = talk_in(80, "truecolor")
    talk.facts([("data", "[red]a\x1b[31mb")])
    assert "[red]a" in said(talk)[0] and "\x1b[31mb" not in said(talk)[0]


def test_quiet_says_warnings_and_silence_nothing(capsys):
    quiet = Talk(quiet=True)
    quiet.facts([("a", "b")])
    quiet.row([], "c")
    quiet.warn("d")
    Silence().warn("e")
    assert capsys.readouterr().err == "warning: d\n"

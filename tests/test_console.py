"""What is said: tables that fit the terminal, plain lines elsewhere."""

from io import StringIO

import pytest
from rich.console import Console as Terminal

from ear_teacher_cli.config import TrainConfig
from ear_teacher_cli.console import Console, SilentConsole
from ear_teacher_cli.training.progress import cells

METRICS = {
    "train/loss": 11.4412, "train/recon_loss": 0.1338, "train/metric_loss": 12.04, "train/contrastive_loss": 5.283,
    "val/loss": 8.395, "val/recon_loss": 0.2461, "val/metric_loss": 6.792, "val/contrastive_loss": 4.753,
    "val/psnr": 15.04, "val/retrieval": 14.58, "val/rank1": 22.9, "val/eer": 34.0, "val/spread": 0.52,
    "val/effective_rank": 201.4,
}  # fmt: skip


def console_in(width: int | None, color: str | None = None) -> Console:
    """In a terminal of that width, or with None in a pipe."""
    console = Console()
    terminal = width is not None
    console.terminal = Terminal(
        file=StringIO(), force_terminal=terminal, width=width or 80, color_system=color, highlight=False, soft_wrap=True
    )
    return console


def said(console: Console) -> list[str]:
    return console.terminal.file.getvalue().splitlines()


def rows(console: Console) -> None:
    config = TrainConfig(max_epochs=100)
    start = {name: value for name, value in METRICS.items() if name in ("val/retrieval", "val/spread")}
    console.row(cells(config, "start", start, METRICS), "before training: retrieval 6.2 %")
    for epoch, scale in ((1, 1), (10, 1e-3), (100, 1e-6)):
        metrics = {name: value * scale if "loss" in name else value for name, value in METRICS.items()}
        row = cells(config, f"{epoch}/100", metrics, METRICS, "COLLAPSED", "1234.5", "10 h 05 min")
        console.row(row, f"epoch {epoch}/100: train 11.44")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_row_fits_the_terminal_and_its_heads_are_said_once(width):
    console = console_in(width)
    rows(console)
    lines = said(console)
    assert len(lines) == 5 and max(map(len, lines)) <= width
    assert lines[0].split()[0] == "epoch" and lines[-1].split()[0] == "100/100"
    assert len({len(line.rstrip()) for line in lines if "COLLAPSED" in line}) == 1


def test_what_matters_most_is_in_80_columns_and_everything_in_200():
    narrow, wide = console_in(80), console_in(200)
    rows(narrow)
    rows(wide)
    assert {"train", "val", "PSNR", "retrieval", "embeddings", "left"} <= set(said(narrow)[0].split())
    assert {"recon", "metric", "contrastive", "rank-1", "EER", "spread"} <= set(said(wide)[0].split())


def test_a_log_has_sentences_and_no_table():
    console = console_in(None)
    rows(console)
    console.summary([("teacher", "convnext_tiny, " * 20 + "end"), ("", "and more")])
    assert said(console)[0] == "before training: retrieval 6.2 %"
    assert said(console)[1:4] == [f"epoch {epoch}/100: train 11.44" for epoch in (1, 10, 100)]
    assert said(console)[4] == f"teacher: {'convnext_tiny, ' * 20}end"
    assert said(console)[5] == "    and more"


def test_facts_are_aligned_and_wrapped_in_a_terminal():
    console = console_in(60)
    console.summary([("teacher", "convnext_tiny " * 12), ("data", "x")])
    lines = said(console)
    assert max(map(len, lines)) <= 60 and lines[0].startswith("teacher     convnext_tiny")
    assert lines[1].startswith(" " * 12 + "convnext_tiny") and lines[-1] == "data        x"


def test_names_cannot_paint_the_terminal():
    console = console_in(80, "truecolor")
    console.summary([("data", "[red]a\x1b[31mb")])
    assert "[red]a" in said(console)[0] and "\x1b[31mb" not in said(console)[0]


def test_quiet_says_warnings_and_silence_nothing(capsys):
    quiet = Console(quiet=True)
    quiet.summary([("a", "b")])
    quiet.row([], "c")
    quiet.warn("d")
    SilentConsole().warn("e")
    assert capsys.readouterr().err == "warning: d\n"

"""The help: readable in any terminal and in a pipe, with no name, variable or default cut."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ear_teacher_cli.cli import help_format
from ear_teacher_cli.config import PRESETS, TrainConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "docs"))
import make

COMMON = {spec.name for spec in dataclasses.fields(TrainConfig) if spec.metadata.get("common")}
PAGES = [([], None), *(([name], name) for name in make.commands())]
PAGES = [*((words, name, "--help") for words, name in PAGES), (["train"], "train", "--help-all")]
NAMES = [" ".join(["earteach", *words, flag]) for words, _, flag in PAGES]


def command_of(name: str | None):
    return make.commands()[name] if name else make.get_command(make.app)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("words", "name", "flag"), PAGES, ids=NAMES)
def test_nothing_is_cut(words, name, flag, width, earteach, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    said = earteach(*words, flag)
    text, command = said.out.decode(), command_of(name)
    assert said.code == 0 and said.err == "" and text.isascii() and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= min(width, 100)
    whole = set(re.findall(r"[^\s,;\[\]]+", text))
    for each in make.shown(command):
        if each.param_type_name == "argument":
            assert help_format.value_name(each) in whole
        elif flag == "--help-all" or not help_format.is_rare(command, each):
            default = help_format.default_of(each)
            wanted = [*each.opts, *each.secondary_opts, *help_format.choices_of(each)]
            wanted += [] if isinstance(default, bool) else re.findall(r"[^\s,]+", default)
            assert {*wanted, *([each.envvar] if each.envvar else [])} <= whole, each.name
    assert all(word in whole for word in ("--help", "-h"))


def test_the_common_options_of_train_are_few_and_the_rest_is_named(earteach):
    common, everything = (earteach("train", flag).out.decode() for flag in ("--help", "--help-all"))
    specs = {spec.name: f"  --{spec.name.replace('_', '-')} " for spec in dataclasses.fields(TrainConfig)}
    assert COMMON < set(specs) and 25 <= len(COMMON) <= 30
    assert {name for name, flag in specs.items() if flag in common} == COMMON
    assert all(flag in everything for flag in specs.values())
    assert f"{len(specs) - len(COMMON)} more options: earteach train --help-all" in common
    assert "more options" not in everything and len(common.splitlines()) < 130


def test_the_whole_help_and_the_page_have_what_each_preset_sets(earteach):
    text, page = earteach("train", "--help-all").out.decode(), (make.PAGES / "train.md").read_text()
    for option, recommended, original in help_format.preset_rows()[1:]:
        assert re.search(rf"^  {option} +{re.escape(recommended)} +{re.escape(original)}$", text, re.MULTILINE)
        assert f"| `{option}` | {recommended} | {original} |" in page
    assert len(help_format.preset_rows()) == len(PRESETS["original"]) + 1


def test_an_example_of_several_lines_can_be_pasted(earteach, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = earteach("train", "--help").out.decode().split("Example:\n")[1]
    assert " ".join(text.replace("\\\n", " ").split()) == help_format.example(make.commands()["train"])


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "bold"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_in_a_terminal_headings_are_bold_and_nothing_else(variables, bold):
    pty = pytest.importorskip("pty")  # which Windows lacks
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **variables}
    words = [sys.executable, "-m", "ear_teacher_cli", "embed", "--help"]
    with subprocess.Popen(words, env=environment, stdout=theirs, cwd=Path(__file__).parent.parent) as process:
        os.close(theirs)
        text = b""
        try:
            while part := os.read(ours, 65536):
                text += part
        except OSError:  # the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0 and text.count(b"--overwrite") == 1
    headings = re.findall(rb"\x1b\[1m([^\x1b]*)\x1b\[0m", text)
    assert headings == ([b"Usage: ", b"Arguments:", b"Options:", b"Lists of ears:", b"Example:"] if bold else [])
    assert text.count(b"\x1b") == 2 * len(headings)

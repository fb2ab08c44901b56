"""Write the help of the commands: plain text that fits the terminal, with no name, variable or default cut.

examples/docs/make.py writes the pages of the commands from the same functions.
"""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..config import PRESETS
from ..config_fields import OPTIONS, PANELS, flag, scalar_of

SPECS = "specs"  # attribute of a command's function: of every option's name its metadata, `default` and `kind`
WHOLE = "ear_teacher_cli.whole_help"  # in a context's meta: rare options are asked for, too
_SPEC = "spec"  # attribute of a parameter: what SPECS has of it
_WIDEST, _NARROWEST = 100, 40  # lines that are longer are hard to read
_INDENT = "  "


def print_whole(context: Any, asked: bool) -> bool:
    """Print the help with all options, and exit: the callback of --help-all."""
    if asked:
        context.meta[WHOLE] = True
        typer.echo(context.get_help())
        raise typer.Exit()
    return asked


class Command(TyperCommand):
    """A command whose help is written here, from the metadata of its options."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        specs = getattr(self.callback, SPECS, {})
        for each in self.params:
            setattr(each, _SPEC, specs.get(each.name, {}))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of a command."""
        formatter.write(page(self, ctx))


class Group(TyperGroup):
    """The program, whose help is written here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the program."""
        formatter.write(page(self, ctx))


def spec_of(parameter: Any) -> dict[str, Any]:
    """Return an option's metadata with `default` and `kind`; nothing of an argument, --help and --version."""
    return getattr(parameter, _SPEC, {})


def page(command: Any, context: Any) -> str:
    """Return the help of a command as wide as the terminal, without its rare options unless WHOLE is set."""
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
    column = min(30, width * 2 // 5)
    whole = context.meta.get(WHOLE, False)
    shown = [each for each in command.get_params(context) if not getattr(each, "hidden", False)]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    options = [each for each in shown if each.param_type_name == "option"]
    kept = [each for each in options if whole or not is_rare(command, each)]
    lines = [*_wrap(usage(command, context.command_path), width, _heading("Usage: ")), ""]
    for paragraph in paragraphs(command.help):
        lines += [*_wrap(paragraph, width), ""]
    groups = {"Arguments": [(value_name(each), each.help or "") for each in arguments]}
    for name, each in grouped(kept).items():
        groups[name] = [(_names(option), _explained(option)) for option in each]
    if commands := getattr(command, "commands", None):
        groups["Commands"] = [(n, paragraphs(each.help)[0]) for n, each in commands.items() if not each.hidden]
    for name, rows in groups.items():
        if rows:
            short = name in ("Arguments", "Commands")
            beside = min(column, max(len(left) for left, _ in rows) + 2 * len(_INDENT)) if short else column
            lines += [_heading(f"{name}:"), *_table(rows, width, beside), ""]
    if whole and command.name == "train":
        lines += [_heading("Presets:"), *_aligned(preset_rows()), ""]
    if len(kept) < len(options):
        lines += [f"{len(options) - len(kept)} more options: {context.command_path} --help-all", ""]
    lines += [_heading("Example:"), *_shell(example(command), width)]
    return "\n".join(lines) + "\n"


def usage(command: Any, path: str) -> str:
    """Return `earteach evaluate [OPTIONS] [EMBEDDINGS] [LABELS]`."""
    if hasattr(command, "commands"):
        return f"{path} COMMAND [OPTIONS] ..."
    arguments = (each for each in command.params if each.param_type_name == "argument")
    return " ".join([path, "[OPTIONS]", *map(_argument, arguments)])


def _argument(argument: Any) -> str:
    name = value_name(argument).strip("[].")
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def grouped(options: list[Any]) -> dict[str, list[Any]]:
    """Return options by their panel, panels in the order of PANELS."""
    groups: dict[str, list[Any]] = {panel: [] for panel in PANELS}
    for option in options:
        groups[spec_of(option).get("panel", OPTIONS)].append(option)
    return {name: each for name, each in groups.items() if each}


def is_rare(command: Any, option: Any) -> bool:
    """Return whether only --help-all shows an option: of the commands that have it."""
    spec, has_help_all = spec_of(option), any(each.name == "help_all" for each in command.params)
    return has_help_all and bool(spec) and not spec.get("common")


def _names(option: Any) -> str:
    """Return `--quiet, -q`, `--pad / --no-pad`, `--far FAR ...`."""
    names = [", ".join(sorted(option.opts, key=len, reverse=True)), *option.secondary_opts]
    value = "" if is_flag(option) else f" {value_name(option)}{' ...' if option.multiple else ''}"
    return " / ".join(names) + value


def _explained(option: Any) -> str:
    """Return the help of an option, and in brackets choices, bounds, default and variable."""
    notes = ["required"] if option.required else []
    if choices := choices_of(option):
        notes.append(f"one of {', '.join(choices)}")
    if limits := bounds(option):
        notes.append(limits)
    default = default_of(option)
    if isinstance(default, bool):
        notes += [f"default: {(option.opts if default else option.secondary_opts)[0]}"] if option.secondary_opts else []
    elif default:
        notes.append(f"default: {default}")
    if option.envvar:
        notes.append(f"environment: {option.envvar}")
    text = " ".join((option.help or "").split())
    return f"{text} [{'; '.join(notes)}]".strip() if notes else text


def is_flag(option: Any) -> bool:
    """Return whether an option takes no value."""
    return bool(getattr(option, "is_flag", False))


def value_name(parameter: Any) -> str:
    """Return what stands for a value: `N`, `X`, `TEXT`, `FILE`; `NAME` where there are choices."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    if choices_of(parameter):
        return "NAME"
    return parameter.metavar or {int: "N", float: "X"}.get(type_of(parameter), "TEXT")


def choices_of(option: Any) -> tuple[str, ...]:
    """Return the values that an option takes, if they are few; else nothing."""
    return spec_of(option).get("choices", ())


def type_of(parameter: Any) -> type:
    """Return the Python type of one value."""
    return scalar_of(spec_of(parameter).get("kind", bool if is_flag(parameter) else str))


def bounds(option: Any) -> str:
    """Return `at least 2`, `from 0 to 1`, `above 0`; nothing if there are none."""
    spec = spec_of(option)
    low, high = spec.get("low"), spec.get("high")
    if "above" in spec:
        return f"above {spec['above']:g}" + (f", at most {high:g}" if high is not None else "")
    if high is not None:
        return f"from {low or 0:.10g} to {high:.10g}"
    return f"at least {low:g}" if low else ""


def default_of(option: Any) -> bool | str:
    """Return whether a flag is on; else the default as it would be typed, nothing if there is none to show."""
    value = spec_of(option).get("default")
    if is_flag(option):
        return bool(value)
    return str(value) if isinstance(value, int | float | str) else ""


def preset_rows() -> list[tuple[str, ...]]:
    """Return a head, and for every option that a preset sets its value in each preset."""
    names = next(iter(PRESETS.values()))
    rows = ((flag(name), *(_word(values[name]) for values in PRESETS.values())) for name in names)
    return [("option", *PRESETS), *rows]


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def example(command: Any) -> str:
    """Return the command of the epilog, "Example: `earteach ...`"."""
    return (command.epilog or "").removeprefix("Example: ").strip("`")


def paragraphs(text: str | None) -> list[str]:
    """Return the paragraphs of a text, each on one line; one empty paragraph of no text."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", (text or "").strip())]


def _wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(rows: list[tuple[str, str]], width: int, column: int) -> Iterator[str]:
    """Yield the lines of two columns; a name that leaves no room beside it gets a line of its own."""
    for name, text in rows:
        lines = _wrap(text, width, " " * column, " " * column)
        if len(_INDENT + name) + len(_INDENT) <= column and lines:
            yield (_INDENT + name).ljust(column) + lines.pop(0).strip()
        else:
            yield _INDENT + name
        yield from lines


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        yield _INDENT + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _shell(line: str, width: int) -> list[str]:
    """Return the lines of a command that can be pasted, also where it takes several."""
    lines = _wrap(line, width - len(" \\"), _INDENT, _INDENT * 2)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _heading(text: str) -> str:
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"

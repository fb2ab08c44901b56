"""Write the help of the commands: plain text that fits the terminal, with no name, variable or default cut.

What it says of an option is also what examples/docs/make.py writes into the pages of the commands.
"""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperCommand, TyperGroup

from ..config import COMMON, PRESETS, TrainConfig

OPTIONS = "Options"  # the group of options that name none
WHOLE = "ear_teacher_cli.whole_help"  # in a context's meta: rare options are asked for, too
_WIDEST, _NARROWEST = 100, 40  # lines that are longer are hard to read
_INDENT = "  "


class Command(TyperCommand):
    """A command whose help is written here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


class Group(TyperGroup):
    """The program, whose help is written here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


def page(command: Any, context: Any) -> str:
    """The help of a command as wide as the terminal, without its rare options unless WHOLE is set."""
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
        groups[name] = [(_names(option), _said(command, option)) for option in each]
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
    """`earteach evaluate [OPTIONS] [EMBEDDINGS] [LABELS]`."""
    if hasattr(command, "commands"):
        return f"{path} COMMAND [OPTIONS] ..."
    arguments = (each for each in command.params if each.param_type_name == "argument")
    return " ".join([path, "[OPTIONS]", *map(_argument, arguments)])


def _argument(argument: Any) -> str:
    name = value_name(argument).strip("[].")
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def grouped(options: list[Any]) -> dict[str, list[Any]]:
    """Options by the group that they name, those that name none first."""
    groups: dict[str, list[Any]] = {OPTIONS: []}
    for option in options:
        groups.setdefault(getattr(option, "rich_help_panel", None) or OPTIONS, []).append(option)
    return {name: each for name, each in groups.items() if each}


def is_rare(command: Any, option: Any) -> bool:
    """Whether only --help-all shows it."""
    return command.name == "train" and option.name in _checks(command) and option.name not in COMMON


def _checks(command: Any) -> dict[str, Any]:
    """Of an option's name what config.py checks."""
    return {spec.name: dict(spec.metadata) for spec in fields(TrainConfig)} if command.name == "train" else {}


def _names(option: Any) -> str:
    """`--quiet, -q`, `--pad / --no-pad`, `--far FAR ...`."""
    names = [", ".join(sorted(option.opts, key=len, reverse=True)), *option.secondary_opts]
    value = "" if is_flag(option) else f" {value_name(option)}{' ...' if option.multiple else ''}"
    return " / ".join(names) + value


def _said(command: Any, option: Any) -> str:
    """The help of an option, and in brackets the rest that is known of it."""
    notes = []
    if option.required:
        notes.append("required")
    if choices := choices_of(option):
        notes.append(f"one of {', '.join(choices)}")
    if limits := bounds(command, option):
        notes.append(limits)
    default = default_of(option)
    if isinstance(default, bool):
        notes += [f"default: {(option.opts if default else option.secondary_opts)[0]}"] if option.secondary_opts else []
    elif default:
        notes.append(f"default: {' '.join(default)}")
    if option.envvar:
        notes.append(f"environment: {option.envvar}")
    text = " ".join((option.help or "").split())
    return f"{text} [{'; '.join(notes)}]".strip() if notes else text


def is_flag(option: Any) -> bool:
    return bool(getattr(option, "is_flag", False))


def value_name(parameter: Any) -> str:
    """What stands for a value: `N`, `X`, `TEXT`, `FILE`; `NAME` where there are choices."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    if choices_of(parameter):
        return "NAME"
    return parameter.metavar or {int: "N", float: "X", str: "TEXT"}.get(type_of(parameter), "VALUE")


def choices_of(option: Any) -> list[str]:
    """Of a metavar `a|b`, an Enum or a Literal."""
    kind = type_of(option)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    words = (option.metavar or "").split("|")
    return words if len(words) > 1 else []


def type_of(parameter: Any) -> Any:
    """The Python type of one value; None if there is no telling."""
    described = getattr(parameter, "type_descriptor", None)
    if described is None:  # Typer before it had them
        name = str(getattr(getattr(parameter, "type", None), "name", "")).removesuffix(" range")
        return {"integer": int, "float": float, "text": str, "boolean": bool}.get(name)
    kind = described.annotation
    return get_args(kind)[0] if get_origin(kind) is list else kind


def limits_of(option: Any, checks: dict[str, Any]) -> tuple[Any, Any]:
    """The least and the largest value."""
    kind = getattr(option, "type", None)  # Typer's older place for them
    least, largest = (getattr(option, name, getattr(kind, name, None)) for name in ("min", "max"))
    return checks.get("low", least), checks.get("high", largest)


def bounds(command: Any, option: Any) -> str:
    """`at least 2`, `from 0 to 1`, `above 0`."""
    checks = _checks(command).get(option.name, {})
    low, high = limits_of(option, checks)
    if "above" in checks:
        return f"above {checks['above']:g}" + (f", at most {high:g}" if high is not None else "")
    if high is not None:
        return f"from {low or 0:.10g} to {high:.10g}"
    return f"at least {low:g}" if low else ""


def default_of(option: Any) -> bool | list[str]:
    """Of a flag whether it is on; else the words of its value, none if it has none to show."""
    value = option.default() if callable(option.default) else option.default
    if is_flag(option) and isinstance(value, bool):
        return value
    if value is None or not option.show_default:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [str(each.value if isinstance(each, Enum) else each) for each in values]


def preset_rows() -> list[tuple[str, ...]]:
    """A head, and of every option that a preset sets its value in each preset."""
    names = next(iter(PRESETS.values()))
    rows = ((f"--{name.replace('_', '-')}", *(_word(values[name]) for values in PRESETS.values())) for name in names)
    return [("option", *PRESETS), *rows]


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def example(command: Any) -> str:
    """The command of its epilog, "Example: `earteach ...`"."""
    return (command.epilog or "").removeprefix("Example: ").strip("`")


def paragraphs(text: str | None) -> list[str]:
    """Lines of a paragraph joined; one empty one of no text."""
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
    """Two columns; a name that leaves no room beside it has a line of its own."""
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
    """A command that can be pasted, also where it takes several lines."""
    lines = _wrap(line, width - len(" \\"), _INDENT, _INDENT * 2)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _heading(text: str) -> str:
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"

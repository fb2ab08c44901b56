"""Write a page per command into examples/docs/commands/, from the program's own help.

    python examples/docs/make.py            writes the pages
    python examples/docs/make.py --check    writes nothing; exit 1 if a page is not what it would write

The pages depend on the commands alone: not on the terminal, the environment or the machine.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from ear_teacher_cli.cli import app
from ear_teacher_cli.config import TrainConfig

PAGES = Path(__file__).parent / "commands"
PICTURES = Path(__file__).parent / "pictures"
PROGRAM = "earteach"
GENERATED = "<!-- written by examples/docs/make.py from the program's help: change it there -->"


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    program = get_command(app)
    found = {f"{name}.md": page(name, command) for name, command in commands().items()}
    lines = [f"| [`{PROGRAM} {name}`]({name}.md) | {cell(first(each.help))} |" for name, each in commands().items()]
    options = [option for option in shown(program) if option.param_type_name == "option"]
    index = [
        GENERATED,
        "# Commands",
        paragraphs(program.help),
        "\n".join(["| command | what it does |", "|---|---|", *lines]),
        "## Options of all",
        f"`{PROGRAM} COMMAND --help` says what is on its page here, and options may be spelt with `_` for `-`.",
        table(options, {}),
        "`...` stands after what may be given more than once.",
    ]
    return found | {"README.md": "\n\n".join(index) + "\n"}


def commands() -> dict[str, Any]:
    """Name -> Typer's command object, of all that are not hidden."""
    return {name: each for name, each in get_command(app).commands.items() if not each.hidden}


def page(name: str, command: Any) -> str:
    """The Markdown of one command."""
    arguments = [each for each in shown(command) if each.param_type_name == "argument"]
    options = [each for each in shown(command) if each.param_type_name == "option"]
    usage = " ".join([PROGRAM, name, "[OPTIONS]", *map(usage_of, arguments)])
    parts = [GENERATED, f"# {PROGRAM} {name}", paragraphs(command.help), f"```\n{usage}\n```"]
    if arguments:
        rows = [f"| `{code(spelling(each))}` | {cell(each.help)} |" for each in arguments]
        parts += ["## Arguments", "\n".join(["| argument | what it is |", "|---|---|", *rows])]
    limits = {spec.name: spec.metadata for spec in fields(TrainConfig)} if name == "train" else {}
    panels = dict.fromkeys(panel_of(each) for each in options)
    for panel in panels:
        parts += [f"## {panel}", table([each for each in options if panel_of(each) == panel], limits)]
    if command.epilog:
        parts += ["## Example", paragraphs(command.epilog).removeprefix("Example: ")]
    return "\n\n".join(parts) + "\n"


def usage_of(argument: Any) -> str:
    """`RUN`, `[LABELS]`, `[MANIFEST]...`."""
    name = spelling(argument).strip("[].")
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def shown(command: Any) -> Iterator[Any]:
    """The parameters that the help shows."""
    return (each for each in command.params if not getattr(each, "hidden", False))


def panel_of(option: Any) -> str:
    return getattr(option, "rich_help_panel", None) or "Options"


def table(options: list[Any], limits: dict[str, Any]) -> str:
    """`limits`: of an option's name, bounds that config.py checks."""
    rows = []
    for each in options:
        names = ", ".join(f"`{code(spelling(each, name))}`" for name in each.opts)
        if each.secondary_opts:
            names += " / " + ", ".join(f"`{name}`" for name in each.secondary_opts)
        rows.append(f"| {names} | {default_of(each)} | {cell(' '.join(said(each, limits.get(each.name, {}))))} |")
    return "\n".join(["| option | default | what it does |", "|---|---|---|", *rows])


def said(option: Any, checks: dict[str, Any]) -> Iterator[str]:
    """The help, the choices, the bounds."""
    yield option.help or ""
    if choices := choices_of(option):
        yield f"One of {', '.join(f'`{choice}`' for choice in choices)}."
    low, high = (checks.get(key, getattr(option, name, None)) for key, name in (("low", "min"), ("high", "max")))
    if "above" in checks:
        yield f"Above {checks['above']:g}" + (f", at most {high:g}." if high is not None else ".")
    elif high is not None:
        yield f"From {low or 0:.10g} to {high:.10g}."
    elif low:
        yield f"At least {low:g}."
    if option.envvar:
        yield f"Environment: `{option.envvar}`."


def spelling(parameter: Any, name: str | None = None) -> str:
    """`--json FILE`; of an argument `FILE`."""
    if name is None:
        return parameter.metavar or parameter.name.upper()
    flag = getattr(parameter, "is_flag", False)
    return name if flag else f"{name} {metavar_of(parameter)}{' ...' if parameter.multiple else ''}"


def metavar_of(option: Any) -> str:
    if choices_of(option):
        return "NAME"
    if option.metavar:
        return option.metavar
    kind = type_of(option)
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "VALUE")


def choices_of(option: Any) -> list[str]:
    """Of a metavar `a|b`, an Enum or a Literal."""
    kind = type_of(option)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    words = (option.metavar or "").split("|")
    return words if len(words) > 1 else []


def type_of(option: Any) -> Any:
    """The Python type of one value."""
    return getattr(getattr(option, "type_descriptor", None), "annotation", None)


def default_of(option: Any) -> str:
    value = option.default() if callable(option.default) else option.default
    if option.required:
        return "required"
    if getattr(option, "is_flag", False) and isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == () or value == [] or not option.show_default:
        return ""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"`{code(str(each.value if isinstance(each, Enum) else each))}`" for each in values)


def first(text: str | None) -> str:
    """The first paragraph."""
    return paragraphs(text).split("\n\n")[0]


def paragraphs(text: str | None) -> str:
    """Lines of a paragraph joined, and nothing taken for HTML."""
    joined = [" ".join(part.split()) for part in re.split(r"\n\s*\n", (text or "").strip())]
    return outside_code("\n\n".join(joined))


def outside_code(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "\\<") for part in parts)


def cell(text: str | None) -> str:
    return code(outside_code(" ".join((text or "").split())))


def code(text: str) -> str:
    """For a cell of a table: `|` would end it, in code, too."""
    return text.replace("|", "\\|")


def different(wanted: dict[str, str]) -> list[str]:
    """Names of pages that are missing, other, or of no command."""
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def take_pictures(demo: Path) -> None:
    """The README's pictures, all of drawn ears, in 128 colours and no larger than they are shown."""
    from PIL import Image

    PICTURES.mkdir(exist_ok=True)
    for source, name, width in (
        ("collage.png", "collage.png", 1144),
        ("worst.png", "contact-sheet.png", 800),
        ("comparison/roc.png", "roc.png", 800),
    ):
        with Image.open(demo / source) as picture:
            small = picture.convert("RGB").resize((width, round(picture.height * width / picture.width)))
            small.quantize(128, dither=Image.Dither.FLOYDSTEINBERG).save(PICTURES / name, optimize=True)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", metavar="DEMO", help="take the README's pictures anew from what make demo left")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page would change")
    options = parser.parse_args(words)
    if options.pictures:
        take_pictures(Path(options.pictures))
    wanted = pages()
    names = different(wanted)
    if options.check:
        if names:
            print(f"{', '.join(names)}: not what the commands say; run python examples/docs/make.py", file=sys.stderr)
        return 1 if names else 0
    PAGES.mkdir(exist_ok=True)
    for name in names:
        if name in wanted:
            (PAGES / name).write_text(wanted[name], encoding="utf-8")
        else:
            (PAGES / name).unlink()
    print(f"{len(wanted)} pages in {PAGES.name}/, {len(names)} of them changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

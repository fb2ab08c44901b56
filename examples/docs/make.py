"""Write a page per command into examples/docs/commands/, from the program's own help.

    python examples/docs/make.py            writes the pages
    python examples/docs/make.py --check    writes nothing; exit 1 if a page is not what it would write

The pages depend on the commands alone: not on the terminal, the environment or the machine.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from ear_teacher_cli.cli import help_format
from ear_teacher_cli.cli.app import app

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
        f"`{PROGRAM} COMMAND --help` says what is on its page here (of `train`, `{PROGRAM} train --help-all`), and options may be spelt with `_` for `-`.",
        table(program, options),
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
    usage = help_format.usage(command, f"{PROGRAM} {name}")
    parts = [GENERATED, f"# {PROGRAM} {name}", paragraphs(command.help), f"```\n{usage}\n```"]
    if arguments:
        rows = [f"| `{code(spelling(each))}` | {cell(each.help)} |" for each in arguments]
        parts += ["## Arguments", "\n".join(["| argument | what it is |", "|---|---|", *rows])]
    for group, each in help_format.grouped(options).items():
        parts += [f"## {group}", table(command, each)]
    if name == "train":
        head, *rows = help_format.preset_rows()
        lines = [head, ["---"] * len(head), *((f"`{option}`", *values) for option, *values in rows)]
        parts += ["## Presets", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if command.epilog:
        parts += ["## Example", f"`{help_format.example(command)}`"]
    return "\n\n".join(parts) + "\n"


def shown(command: Any) -> Iterator[Any]:
    """The parameters that the help shows."""
    return (each for each in command.params if not getattr(each, "hidden", False))


def table(command: Any, options: list[Any]) -> str:
    rows = []
    for each in options:
        names = ", ".join(f"`{code(spelling(each, name))}`" for name in each.opts)
        if each.secondary_opts:
            names += " / " + ", ".join(f"`{name}`" for name in each.secondary_opts)
        rows.append(f"| {names} | {default_of(each)} | {cell(' '.join(said(each)))} |")
    return "\n".join(["| option | default | what it does |", "|---|---|---|", *rows])


def said(option: Any) -> Iterator[str]:
    """The help, the choices, the bounds."""
    yield option.help or ""
    if choices := help_format.choices_of(option):
        yield f"One of {', '.join(f'`{choice}`' for choice in choices)}."
    if limits := help_format.bounds(option):
        yield f"{limits[0].upper()}{limits[1:]}."
    if option.envvar:
        yield f"Environment: `{option.envvar}`."


def spelling(parameter: Any, name: str | None = None) -> str:
    """`--json FILE`; of an argument `FILE`."""
    value = help_format.value_name(parameter)
    if name is None:
        return value
    return name if help_format.is_flag(parameter) else f"{name} {value}{' ...' if parameter.multiple else ''}"


def default_of(option: Any) -> str:
    if option.required:
        return "required"
    default = help_format.default_of(option)
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{code(default)}`" if default else ""


def first(text: str | None) -> str:
    """The first paragraph."""
    return paragraphs(text).split("\n\n")[0]


def paragraphs(text: str | None) -> str:
    """Lines of a paragraph joined, and nothing taken for HTML."""
    return outside_code("\n\n".join(help_format.paragraphs(text)))


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


def take_images(demo: Path) -> None:
    """The README's images, all of drawn ears, in 128 colours and no larger than they are shown."""
    from PIL import Image

    PICTURES.mkdir(exist_ok=True)
    for source, name, width in (
        ("collage.png", "collage.png", 1144),
        ("worst.png", "contact-sheet.png", 800),
        ("comparison/roc.png", "roc.png", 800),
    ):
        with Image.open(demo / source) as image:
            small = image.convert("RGB").resize((width, round(image.height * width / image.width)))
            small.quantize(128, dither=Image.Dither.FLOYDSTEINBERG).save(PICTURES / name, optimize=True)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", metavar="DEMO", help="take the README's images anew from what make demo left")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page would change")
    options = parser.parse_args(words)
    if options.pictures:
        take_images(Path(options.pictures))
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

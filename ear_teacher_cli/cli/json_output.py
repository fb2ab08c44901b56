"""The result of a command as JSON: `--json FILE`, or `--json -` for stdout."""

import json
from typing import Any

import typer

from ..files import refuse_existing, whole_file


def require_free(target: str | None, overwrite: bool, *inputs: str | None) -> None:
    """Raise UsageError if the file exists and may not be replaced, or is one of the inputs."""
    if target not in (None, "-"):
        refuse_existing(target, overwrite, inputs)


def write(target: str | None, content: dict[str, Any]) -> None:
    """Write the content to a file or to stdout; nothing if there is no target."""
    if target is None:
        return
    text = json.dumps(content, indent=2)
    if target == "-":
        typer.echo(text)
        return
    with whole_file(target) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")

"""The Typer app `earteach`: its commands, and one line and an exit code for every error.

stdout is data, stderr is messages. Exit 0 done, 1 bad data or file, 2 bad command-line arguments, 130 interrupted. The
modules of the commands import what they need when they are called, so that `--help` loads neither torch nor numpy.
"""

import os
import sys
from dataclasses import fields
from typing import Annotated

import typer
from typer.main import get_command

from .. import __version__
from ..config import RENAMED, TrainConfig
from ..config_files import nearest
from ..console import Console
from ..distributed import is_first_process
from ..errors import ConfigError, EarTeachError
from ..files import printable
from ..system_errors import explain_system_error
from . import distill, embed, evaluate, export, help_format, prepare, process, report, train, usage, validate_data
from .options import variable

_EARLIER = {earlier.replace("_", "-"): name.replace("_", "-") for earlier, name in RENAMED.items()}


def _normalised(word: str) -> str:
    """Return the name of an option as it is here: with hyphens for underscores, and the new name of a renamed one."""
    word = word.replace("_", "-")
    return _EARLIER.get(word, word)


app = typer.Typer(
    name="earteach",
    cls=help_format.Group,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": _normalised, "help_option_names": ["-h", "--help"]},
)
for _command in (
    prepare.prepare,
    validate_data.validate_data,
    train.train,
    train.resume,
    report.report,
    report.collage,
    export.export_backbone,
    export.verify,
    distill.distill,
    embed.embed,
    evaluate.evaluate,
):
    _command.add_to(app)

_OVERVIEW = """\
From photos to an evaluated teacher (RUN: the folder that train wrote):

  earteach prepare photos/ data                     split into two lists
  earteach validate-data train.npy val.npy          check images and boxes
  earteach train                                    train, without labels
  earteach resume RUN                               after Ctrl-C or a crash
  earteach report RUN                               the run on one HTML page
  earteach collage RUN -o collage.png               originals, reconstructions
  earteach export-backbone RUN teacher.safetensors  then: earteach verify
  earteach distill RUN small.onnx --student NAME    a small model from a large
  earteach embed photos/ out.npy --weights RUN      one embedding per image
  earteach evaluate out.npy labels.csv              identification accuracy

COMMAND --help: options and an example. --install-completion: Tab in your shell.
"""
# Typer exports only subclasses of the class of its usage errors.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run `earteach`: an error that we raise, or that has a known cause, becomes one line and an exit code."""
    with process.lifetime() as life:
        try:
            sys.exit(app(prog_name="earteach", standalone_mode=False))
        except SystemExit as end:  # of Typer too, which turns every KeyboardInterrupt into 130
            sys.exit(life.exit_code(end.code))
        except KeyboardInterrupt:
            sys.exit(life.exit_code(process.INTERRUPTED))
        except BrokenPipeError:
            process.drop_stdout()
        except (_UsageError, EarTeachError, OSError, UnicodeEncodeError, RuntimeError, MemoryError) as error:
            if life.stopped and isinstance(error, RuntimeError | MemoryError):  # the signal reached a loader, too
                sys.exit(life.exit_code(1))
            message = _explain(error)
            if message is None:
                raise
            code = 2 if isinstance(error, _UsageError) else getattr(error, "exit_code", 1)
            if getattr(error, "raised_by_all_ranks", False) and not is_first_process():
                sys.exit(code)
            process.fail(message, code, error)


def _explain(error: Exception) -> str | None:
    """Return the one line that an error is printed as; None if it is a fault of ours, whose traceback is needed."""
    if isinstance(error, _UsageError):
        return usage.explain(error, get_command(app), sys.argv[1:])
    if isinstance(error, ConfigError):  # the config names the field, the user knows the flag
        return f"--{error.field.replace('_', '-')}{str(error).removeprefix(error.field)}"
    if isinstance(error, EarTeachError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):  # LC_ALL=C with Python's UTF-8 mode turned off
        return f"{error.object}: the name of a file has no form in this locale ({error.encoding}); set PYTHONUTF8=1"
    found = None if isinstance(error, OSError) and error.filename else explain_system_error(error)
    if found is None and isinstance(error, OSError):
        return f"{printable(error.filename or 'output')}: {error.strerror or error}; check the path"
    return None if found is None else str(found)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"earteach {__version__}")
        raise typer.Exit()


@app.callback(epilog="Example: `earteach train --metric-loss arcface`", invoke_without_command=True)
def earteach(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Learn features of ears from unlabelled photos, and export and evaluate them.

    prepare -> validate-data -> train (resume) -> report, collage -> export-backbone (verify) -> distill -> embed -> evaluate
    """
    if is_first_process():
        _warn_of_unknown_variables()
    if context.invoked_subcommand is None:
        typer.echo(_OVERVIEW, nl=False)


def _warn_of_unknown_variables() -> None:
    read_elsewhere = ("quiet", "weights", "consent", "license")  # by all commands, embedding and export
    known = [variable(name) for name in read_elsewhere]
    known += [variable(spec.name) for spec in fields(TrainConfig) if spec.metadata.get("environment")]
    for name in sorted(os.environ):
        if name.startswith("EARTEACH_") and name not in known:
            hint = nearest(name, known) or "`earteach --help` and the help of the commands list them"
            Console().warn(f"{name}: earteach knows no such environment variable; {hint.strip()}")

"""Make the options of a command from dataclasses, whose fields config_fields.py describes.

A command is a function; `command` reads its signature:

    @command("embed", example="earteach embed photos/ out.npy")
    def embed(input: Annotated[str, argument("INPUT", "...")], config: EmbedConfig, console: Console) -> None:

Every field of EmbedConfig becomes an option, and the function gets an EmbedConfig. `Given[TrainConfig]` makes the same
options and passes the values that were given, by their source. Every command has --quiet and --verbose.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer

from .. import library_messages
from ..config_fields import AUTO, Checked, flag, is_several, kinds_of, scalar_of, shared
from ..console import Console
from ..distributed import is_first_process
from ..errors import ConfigError, UsageError
from . import help_format, usage

Options = TypeVar("Options")


@dataclass(frozen=True)
class Given(Generic[Options]):
    """The values of a class's options that were given, by name: typed, or in variables of the environment."""

    typed: dict[str, Any]
    environment: dict[str, Any]

    def blame_variable(self, error: ConfigError) -> ConfigError | UsageError:
        """Return the error with the name of the variable that holds the wrong value, if it was one and not typed."""
        if error.field not in self.environment.keys() - self.typed.keys():
            return error
        return UsageError(f"{variable(error.field)}: {str(error).removeprefix(f'{error.field}: ')}")


@dataclass(frozen=True)
class ConsoleOptions(Checked):
    """Options of every command."""

    quiet: bool = shared("quiet")
    verbose: bool = shared("verbose")


class Command(help_format.Command):
    """A command that reports what Typer accepts silently: options that are given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, and print which value counts of an option that is given more than once."""
        repeated = [] if ctx.resilient_parsing else usage.look_over(self, ctx, args)
        rest = super().parse_args(ctx, args)
        for option in repeated if is_first_process() else []:
            Console(ctx.params.get("quiet", False)).info(usage.about_repeated(option, ctx.params.get(option.name)))
        return rest


def variable(name: str) -> str:
    """Return the variable of the environment with the default of an option."""
    return f"EARTEACH_{name.upper()}"


def argument(metavar: str, help: str) -> Any:
    """Return the annotation of a positional argument."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def completion(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the function with which the shell completes the value of an option."""
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


@dataclass(frozen=True)
class Registered:
    """A command that has not been added to an app yet."""

    name: str
    example: str
    run: Callable[..., Any]

    def add_to(self, app: typer.Typer) -> None:
        """Make it a command of the app."""
        app.command(self.name, cls=Command, epilog=f"Example: `{self.example}`", help=self.run.__doc__)(self.run)


def command(name: str, example: str) -> Callable[[Callable[..., None]], Registered]:
    """Return a decorator that makes a function a command, with its arguments and the options of its dataclasses."""

    def register(function: Callable[..., None]) -> Registered:
        hints = get_type_hints(function, include_extras=True)
        hints.pop("return", None)
        owners = {each: owner for each, hint in hints.items() if (owner := _owner(hint)) is not None}

        def run(**values: Any) -> None:
            context = values.pop("context")
            console = _console(context, values)
            words: dict[str, Any] = {}
            for each, hint in hints.items():
                if each in owners:
                    words[each] = _made(owners[each], hint, context, values)
                else:
                    words[each] = console if hint is Console else values[each]
            function(**words)

        specs: dict[str, dict[str, Any]] = {}
        parameters = [_keyword("context", typer.Context)]
        for each, given in inspect.signature(function).parameters.items():
            if each not in owners and hints[each] is not Console:
                parameters.append(_keyword(each, hints[each], given.default))
        for owner in (*owners.values(), ConsoleOptions):
            for spec in fields(owner):
                specs[spec.name] = {**spec.metadata, "default": spec.default, "kind": kinds_of(owner)[spec.name]}
        parameters += [_option(each, spec) for each, spec in specs.items()]
        run.__doc__ = function.__doc__
        run.__dict__.update({"__signature__": inspect.Signature(parameters), help_format.SPECS: specs})
        return Registered(name, example, run)

    return register


def _owner(hint: Any) -> Any:
    """Return the dataclass whose fields are to be options; None of a parameter that is none."""
    if get_origin(hint) is Given:
        return get_args(hint)[0]
    return hint if is_dataclass(hint) else None


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(name: str, spec: dict[str, Any]) -> inspect.Parameter:
    """Return the parameter of a function from which Typer makes the option of a field."""
    kind, default, choices = spec["kind"], spec["default"], spec.get("choices")
    spelling = flag(name)
    if scalar_of(kind) is bool and not spec.get("switch"):
        spelling += f"/--no-{spelling[2:]}"
    callback = spec.get("callback")
    made = typer.Option(
        *(each for each in (spelling, spec.get("short")) if each),
        help=spec["help"],
        show_default=default not in (None, ()),
        rich_help_panel=spec["panel"],
        metavar=spec.get("metavar"),
        parser=_number_or_auto if spec.get("auto") else None,
        autocompletion=completion(choices) if choices else None,
        envvar=variable(name) if spec.get("environment") else None,
        callback=callback,
        is_eager=callback is not None,
    )
    if is_several(kind) and Ellipsis in get_args(kind):  # may be given several times
        kind, default = list[scalar_of(kind)] | None, None  # type: ignore[misc]  # a type that is made at run time
    return _keyword(name, Annotated[kind, made], inspect.Parameter.empty if default is MISSING else default)


def _number_or_auto(text: Any) -> Any:
    """Parse the value of an option that is a number or `auto`; what is neither is left for the configuration to reject."""
    return AUTO if text == AUTO else int(text) if str(text).isdecimal() else text


def _made(owner: Any, hint: Any, context: typer.Context, values: dict[str, Any]) -> Any:
    """Return the dataclass with its part of the values of all options, or what was Given of it."""
    taken = {spec.name: values[spec.name] for spec in fields(owner)}
    given = Given[Any](_from(context, taken, "COMMANDLINE"), _from(context, taken, "ENVIRONMENT"))
    if get_origin(hint) is Given:
        return given
    try:
        return owner(
            **{name: () if value is None and _repeats(owner, name) else value for name, value in taken.items()}
        )
    except ConfigError as error:
        raise given.blame_variable(error) from error


def _repeats(owner: Any, name: str) -> bool:
    return Ellipsis in get_args(kinds_of(owner)[name])


def _from(context: typer.Context, values: dict[str, Any], source: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if _source(context, name) == source}


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def _console(context: typer.Context, values: dict[str, Any]) -> Console:
    """Return the console that --quiet asks for; with --verbose show the messages of the libraries."""
    quiet, verbose = values["quiet"], values["verbose"]
    if quiet and verbose:
        if _source(context, "quiet") == "COMMANDLINE":
            raise UsageError("--verbose: contradicts --quiet; give one of the two")
        quiet = False  # of the environment, and what is typed wins
    library_messages.show(verbose)
    return Console(quiet)

"""Explain in one line what is wrong with the arguments of a command: unknown, missing or extra ones, wrong values."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ..config import TrainConfig
from ..config_fields import KINDS
from ..config_files import nearest
from ..errors import ConfigError
from .help_format import choices_of, is_flag, type_of, usage, value_name

_TYPED = "ear_teacher_cli.typed"  # in a context's meta: the values that were typed, by parameter


def look_over(command: Any, context: Any, words: list[str]) -> list[Any]:
    """Parse the arguments of a command, keep them for `explain`, and return the options that were given twice.

    Raises ConfigError where an option's name stands in the place of another's value.
    """
    values, _, order = command.make_parser(context).parse_args(list(words))
    context.meta[_TYPED] = values
    names = set(_names(command, context))
    for option in order:
        if option.param_type_name == "option" and not is_flag(option):
            for value in _several(values.get(option.name)):
                if str(value).split("=")[0].replace("_", "-") in names:
                    raise ConfigError(option.name, f"no value is given before {value}", f"give {_wanted(option)}")
    return [each for each in dict.fromkeys(order) if order.count(each) > 1 and _holds_one(each)]


def _holds_one(parameter: Any) -> bool:
    """Return whether a parameter is an option with one value, so that the last one given counts."""
    same = is_flag(parameter) and not parameter.secondary_opts
    return parameter.param_type_name == "option" and not parameter.multiple and not same


def about_repeated(option: Any, value: Any) -> str:
    """Return a sentence on which of an option's values counts."""
    if is_flag(option):
        return f"{' and '.join([*option.opts, *option.secondary_opts])}: the last one counts ({_flag(option, value)})"
    return f"{_name(option)}: given more than once; the last one counts ({' '.join(map(str, _several(value)))})"


def _flag(option: Any, value: Any) -> str:
    return (option.opts if value else option.secondary_opts)[0]


def explain(error: Any, program: Any, words: list[str]) -> str:
    """Return the message for one of Typer's usage errors."""
    command = error.ctx.command if error.ctx else program.commands.get(words[0] if words else "", program)
    inside = command is not program and not hasattr(command, "commands")
    path = f"earteach {command.name}" if inside else "earteach"
    found = _found(error, command, program, path)
    return found if found.startswith(("-", "EARTEACH_")) else f"{command.name}: {found}" if inside else found


def _found(error: Any, command: Any, program: Any, path: str) -> str:
    message = error.format_message().strip()
    parameter = getattr(error, "param", None)
    if hasattr(error, "possibilities"):
        return _about_unknown_option(error.option_name, error.ctx, program, path)
    if hasattr(error, "param_type") and parameter is not None:
        if parameter.param_type_name == "argument":
            return f"{value_name(parameter)} is missing; usage: {usage(command, path)}"
        return f"{_name(parameter)} is missing; add {_name(parameter)} {value_name(parameter)}"
    if parameter is not None:
        return _about_value(error) or message
    if name := getattr(error, "option_name", None):
        return _about_count(_option(command, name), name) or message
    if extra := re.search(r"extra argument(?:\(s\)|s)? \((.*)\)", message, re.DOTALL):
        return f"too many arguments ({extra[1]}); usage: {usage(command, path)}"
    if unknown := re.match(r"No such command '(.*?)'\.", message, re.DOTALL):
        return f"no such command '{unknown[1]}'; {_see(nearest(unknown[1], program.commands), path)}"
    return f"{message[0].lower()}{message[1:].removesuffix('.')}; {_see('', path)}"


def _about_unknown_option(name: str, context: Any, program: Any, path: str) -> str:
    command = context.command
    if command.name == "resume" and _is_fixed(name, program.commands["train"]):
        free = [_name(each) for each in command.params if hasattr(TrainConfig, each.name)]
        return (
            f"{name}: is fixed by the run; leave it out, or start a new run with `earteach train` (resume may change "
            f"{', '.join(free[:-1])} and {free[-1]})"
        )
    if hasattr(command, "commands"):
        owners = [each.name for each in command.commands.values() if _option(each, name)]
        if owners:
            return f"no such option {name} before the command; give it after: `earteach {owners[0] if len(owners) == 1 else 'COMMAND'} {name}`"
    return f"no such option {name}; {_see(nearest(name, _names(command, context)), path)}"


def _is_fixed(name: str, train: Any) -> bool:
    option = _option(train, name)
    return option is not None and (hasattr(TrainConfig, option.name) or option.name in ("preset", "config"))


def _about_value(error: Any) -> str:
    """Return the message on a value of the wrong type; nothing if the type is right."""
    parameter, context = error.param, error.ctx
    values = context.meta.get(_TYPED, {}).get(parameter.name)
    name = _name(parameter)
    if context.get_parameter_source(parameter.name).name == "ENVIRONMENT":
        name, values = parameter.envvar, parameter.value_from_envvar(context)
    kind = type_of(parameter)
    for value in _several(values):
        if kind is bool:
            return f"{name}: {value!r} is not {KINDS[bool]}; give {KINDS[bool]}"
        try:
            kind(value)
        except (ValueError, TypeError):
            return f"{name}: {value!r} is not {KINDS[kind]}; give {KINDS[kind]}" if kind in KINDS else ""
    return ""


def _about_count(option: Any, name: str) -> str:
    """Return the message on an option with too few values, or with one where it takes none."""
    if option is None:
        return ""
    if is_flag(option):
        return f"{name}: takes no value; give {' or '.join([*option.opts, *option.secondary_opts])} alone"
    if option.nargs > 1:
        return f"{name}: needs {option.nargs} values; give {value_name(option)}"
    return f"{name}: no value is given; give {_wanted(option)}"


def _wanted(option: Any) -> str:
    """Return `a whole number`, `one of arcface, cosface, none`."""
    if choices := choices_of(option):
        return f"one of {', '.join(choices)}"
    return option.metavar or KINDS.get(type_of(option), "one")


def _name(parameter: Any) -> str:
    return max(parameter.opts, key=len) if parameter.param_type_name == "option" else value_name(parameter)


def _names(command: Any, context: Any) -> Iterator[str]:
    """Yield the names of all options of a command."""
    for each in command.get_params(context):
        if each.param_type_name == "option":
            yield from (*each.opts, *each.secondary_opts)


def _option(command: Any, name: str) -> Any:
    """Return the option of that name; None if there is none."""
    options: Iterable[Any] = (each for each in command.params if each.param_type_name == "option")
    return next((each for each in options if name in (*each.opts, *each.secondary_opts)), None)


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _see(hint: str, path: str) -> str:
    """Return `did you mean --batch-size? See ...`, or `see ...`."""
    return f"{hint}{'See' if hint else 'see'} `{path} --help`"

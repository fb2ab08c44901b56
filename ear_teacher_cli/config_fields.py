"""Declare an option once, as the field of a dataclass: default, help, panel and checks stand in the field's metadata.

config.py and the modules of cli/ declare options with `option` and `shared`; cli/options.py makes the options of the
command line from these fields. A class that inherits `Checked` converts and checks its values when it is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from math import isfinite
from typing import Any, get_args, get_origin, get_type_hints

from .errors import ConfigError

AUTO = "auto"
AUTO_NUMBER = -1  # the number that stands for `auto`
BOX_FORMATS = (AUTO, "xyxy", "xywh", "cxcywh")  # data/boxes.py has what they mean
BOX_UNITS = (AUTO, "pixels", "relative")
PRECISIONS = ("16-mixed", "bf16-mixed", "32-true")  # of computing: autocast to float16 or bfloat16, or none
OPTIONS, LISTS = "Options", "Lists of ears"
# The groups of options in the help, in their order.
PANELS = (OPTIONS, "Distillation", "Data", LISTS, "Model", "Training", "Machine", "Output")
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def option(default: Any, panel: str, help: str, **more: Any) -> Any:
    """Return a dataclass field that is an option (MISSING as its default: it is required).

    `more` holds its checks: `low`, `high` (inclusive), `above` (exclusive), `choices`, `multiple`; and what it is:
    `private` (holds a path or a name, which no logger receives), `environment` (EARTEACH_NAME is its default),
    `common` (in `train --help`, not only in --help-all), `resumable` (`resume` can change it), `earlier` and
    `earlier_choices` (its name and values in earlier versions, still accepted), `switch` (a flag without a --no- form),
    `short` (-o), `metavar`, `loss_term` (the weight of a loss that is enough to learn from), `compares_views` (the weight
    of a loss that needs two views), `auto` (a number that may also be the word auto) and `callback` (called with the value before all others are read).
    """
    return field(default=default, metadata={"panel": panel, "help": help, **more})


# Options that several commands have, each written once.
_SHARED: dict[str, dict[str, Any]] = {
    "root_dir": {
        "default": None,
        "panel": LISTS,
        "help": "Folder that the paths in a list start from, and must not leave. Default: the working directory, or "
        "the list's own folder if the images are only there.",
        "private": True,
        "environment": True,
        "common": True,
    },
    "box_format": {
        "default": AUTO,
        "panel": LISTS,
        "help": "Order of a box's numbers in lists that do not name it (.npy, a bbox column): xyxy (two corners), xywh "
        "(x, y, width, height) or cxcywh (centre, width, height); auto: found from all boxes and the sizes of their "
        "images, with an error if that leaves two orders possible.",
        "choices": BOX_FORMATS,
        "common": True,
    },
    "box_units": {
        "default": AUTO,
        "panel": LISTS,
        "help": "Units of boxes in lists that do not name them: pixels, or relative (shares of the image's width and "
        "height); auto: relative if no number is above 1.1.",
        "choices": BOX_UNITS,
    },
    "identity_column": {
        "default": None,
        "panel": LISTS,
        "help": "Column with the person on each image. Default: identity, if there is one.",
        "private": True,
        "common": True,
    },
    "weights": {
        "default": None,
        "panel": OPTIONS,
        "help": "A run, a checkpoint, an export, timm:NAME, or with --backbone a plain state dict.",
        "private": True,
    },
    "backbone": {"default": None, "panel": OPTIONS, "help": "timm model that a plain state dict belongs to."},
    "image_size": {
        "default": None,
        "panel": OPTIONS,
        "help": "Side of the input in pixels, for weights that do not record it (timm:NAME, a plain state dict). "
        "Default: 224.",
        "low": 32,
    },
    "batch_size": {"default": 32, "panel": OPTIONS, "help": "Images per forward pass.", "low": 1},
    "precision": {"default": "32-true", "panel": OPTIONS, "help": "", "choices": PRECISIONS},
    "compile": {"default": False, "panel": OPTIONS, "help": ""},
    "num_workers": {
        "default": 8,
        "panel": OPTIONS,
        "help": "Processes that load images; at most one per CPU core is used.",
        "low": 0,
        "environment": True,
    },
    "load_timeout": {
        "default": 300,
        "panel": OPTIONS,
        "help": "Seconds to wait for a batch from another process before stopping with an error; 0: no limit.",
        "low": 0,
        "environment": True,
    },
    "images": {"default": True, "panel": OPTIONS, "help": "", "environment": True},
    "num_collage_samples": {"default": 10, "panel": "Training", "help": "", "low": 1, "high": 100},
    "seed": {"default": 0, "panel": OPTIONS, "help": "Random seed.", "low": 0, "high": 2**32 - 1},
    "consent": {
        "default": None,
        "panel": OPTIONS,
        "help": "Consent statement for the card. Default: EARTEACH_CONSENT, else not stated.",
        "private": True,
    },
    "license": {
        "default": None,
        "panel": OPTIONS,
        "help": "Licence for the card. Default: EARTEACH_LICENSE, else not stated.",
        "private": True,
    },
    "json": {
        "default": None,
        "panel": OPTIONS,
        "help": "Write the result as JSON; - for stdout.",
        "metavar": "FILE",
        "private": True,
    },
    "dry_run": {"default": False, "panel": OPTIONS, "help": "", "switch": True, "common": True},
    "overwrite": {
        "default": False,
        "panel": OPTIONS,
        "help": "Replace outputs that exist.",
        "switch": True,
        "common": True,
    },
    "quiet": {
        "default": False,
        "panel": OPTIONS,
        "help": "Print warnings and errors only.",
        "switch": True,
        "short": "-q",
        "environment": True,
        "common": True,
    },
    "verbose": {
        "default": False,
        "panel": OPTIONS,
        "help": "Print warnings and log messages of the libraries, too, and the traceback of an error.",
        "switch": True,
        "short": "-v",
        "common": True,
    },
}


def shared(name: str, **changes: Any) -> Any:
    """Return the field of an option that several commands have, with some of its metadata changed."""
    return option(**_SHARED[name] | changes)


class Checked:
    """Convert the values of a dataclass of options to plain ones and check them. Raises ConfigError."""

    def __post_init__(self) -> None:
        owner: Any = type(self)  # a dataclass
        for spec in fields(owner):
            value = converted(spec.name, getattr(self, spec.name), kinds_of(owner)[spec.name], spec.metadata)
            if isinstance(value, str) and "\0" in value:
                raise ConfigError(spec.name, "holds a NUL byte", "give a name without one")
            object.__setattr__(self, spec.name, value)


@dataclass(frozen=True)
class Reading:
    """How to read lists of ears where they do not say it themselves."""

    box_format: str = AUTO  # one of BOX_FORMATS
    box_units: str = AUTO  # one of BOX_UNITS
    identity_column: str | None = None  # the column to take identities from; None: `identity`, if there is one

    def __post_init__(self) -> None:
        check("box_format", self.box_format, {"choices": BOX_FORMATS})
        check("box_units", self.box_units, {"choices": BOX_UNITS})


@dataclass(frozen=True, kw_only=True)
class ListOptions(Checked):
    """Options of every command that reads lists of ears."""

    root_dir: str | None = shared("root_dir")
    box_format: str = shared("box_format")
    box_units: str = shared("box_units")
    identity_column: str | None = shared("identity_column")

    @property
    def reading(self) -> Reading:
        """The options that say what a list's columns and numbers mean."""
        return Reading(self.box_format, self.box_units, self.identity_column)


@cache
def kinds_of(owner: Any) -> dict[str, Any]:
    """Return the types of a class's fields, by name."""
    return get_type_hints(owner)


def scalar_of(kind: Any) -> type:
    """Return the type of one value: `int` of `int`, `int | None` and `tuple[int, ...]`."""
    while get_origin(kind) is not None or get_args(kind):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return kind


def is_several(kind: Any) -> bool:
    """Return whether a value of this type is a tuple."""
    return any(get_origin(each) is tuple for each in (kind, *get_args(kind)))


def converted(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> Any:
    """Return `value` as the plain type that its field declares, checked; AUTO_NUMBER for `auto` where the field takes it.

    Raises ConfigError.
    """
    if metadata.get("auto") and value in (AUTO, AUTO_NUMBER):
        return AUTO_NUMBER
    value = plain(name, value, kind)
    check(name, value, metadata)
    return value


def plain(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as the plain type that its field declares (numpy scalars and Path become int, float, str).

    Raises ConfigError if it has another type.
    """
    target = scalar_of(kind)
    if is_several(kind) and value is not None:
        return tuple(_scalar(name, each, target) for each in value)
    if value is None and type(None) in get_args(kind):
        return None
    return _scalar(name, value, target)


def _scalar(name: str, value: Any, target: type) -> Any:
    if isinstance(value, dict | list | tuple):
        raise ConfigError(name, f"holds several values, not {KINDS[target]}", f"give {KINDS[target]}")
    if target is bool or isinstance(value, bool):
        if target is not bool or not isinstance(value, bool):
            raise ConfigError(name, f"{value!r} is not {KINDS[target]}", f"give {KINDS[target]}")
        return value
    try:
        converted = target(value)
        if target is int and converted != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(name, f"{value!r} is not {KINDS[target]}", f"give {KINDS[target]}") from None
    return converted


def check(name: str, value: Any, checks: Mapping[str, Any]) -> None:
    """Raise ConfigError if a value, or one of a tuple, is outside of what `checks` allow. None is allowed."""
    if isinstance(value, tuple):
        for each in value:
            check(name, each, checks)
        return
    if value is None:
        return
    if isinstance(value, float) and not isfinite(value):
        raise ConfigError(name, f"{value} is not a finite number", "give a finite one")
    if "choices" in checks and value not in (*checks["choices"], *checks.get("earlier_choices", ())):
        raise ConfigError(name, f"{value!r} is not known", f"choose one of {', '.join(checks['choices'])}")
    if "low" in checks and value < checks["low"]:
        raise ConfigError(name, f"{value} is too small", f"use at least {checks['low']}")
    if "above" in checks and value <= checks["above"]:
        raise ConfigError(name, f"{value} is too small", f"use more than {checks['above']}")
    if "high" in checks and value > checks["high"]:
        raise ConfigError(name, f"{value} is too large", f"use at most {checks['high']}")
    step = checks.get("multiple", 1)
    if "multiple" in checks and value % step:
        below = value // step * step
        nearest = f"{below} or {below + step}" if below else f"{step}"
        raise ConfigError(name, f"{value} is not a multiple of {step}", f"use {nearest}")


def flag(name: str) -> str:
    """Return an option as it is typed: `--batch-size` of batch_size."""
    return f"--{name.replace('_', '-')}"

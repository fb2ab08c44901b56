"""Read configurations that were written: the TOML files of `--config` and of runs, and the dicts in checkpoints."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .config import ORIGINAL, RENAMED, TrainConfig, preset
from .config_fields import AUTO_NUMBER, converted, flag, kinds_of, plain
from .distill_config import DistillConfig
from .errors import ConfigError, EarTeachError, UsageError
from .files import printable

# What the first versions did where they had no option yet: they read every unnamed box as corners in pixels, let lists
# overlap, numbered the images of a batch, and had no anchor, no linear start of the decoder and no clipping of gradients.
_BEFORE = {
    "box_format": "xyxy",
    "box_units": "pixels",
    "allow_overlap": True,
    "pseudo_classes": "batch",
    "anchor_weight": 0.0,
    "decoder_input": "embedding",
    "decoder_start": "random",
    "gradient_clip_val": 0.0,
}


def from_dict(values: dict[str, Any], where: str) -> TrainConfig:
    """Return the config of a checkpoint's dict; an option that its version did not have gets the value of what that did.

    Raises EarTeachError if there are names that this version does not know.
    """
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    owner = _owner_of(values)
    unknown = sorted(set(values) - {spec.name for spec in fields(owner)})
    if unknown:
        raise EarTeachError(
            f"{where}: options {', '.join(unknown)} are unknown; it is from another version of earteach"
        )
    earlier = ORIGINAL | _BEFORE if owner is TrainConfig else {}  # the first versions distilled nothing
    return owner(**earlier | values)


def _owner_of(values: Iterable[str]) -> Any:
    """Return the class of a configuration, by the names of its options."""
    return DistillConfig if "teacher" in values else TrainConfig


def read_config(path: Path) -> TrainConfig:
    """Return the configuration in the folder of a run. Raises EarTeachError."""
    return from_dict(read_toml(path, owner=None), printable(path))


def read_toml(path: str | Path, recipe: str | None = None, owner: Any = TrainConfig) -> dict[str, Any]:
    """Return the options of a TOML file, whose names may have hyphens or underscores.

    The options of the preset `recipe`, else of the file's own `preset`, stand below them. `owner`: the class of the
    configuration; None: as the file's content says. Raises EarTeachError naming file, line and key.
    """
    text = _text_of(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        windows = " (a path of Windows goes into single quotes: 'C:\\Users\\...')" if "\\" in text else ""
        raise EarTeachError(f"{path}: not readable as TOML ({error}); mend that line{windows}") from error
    owner = owner or _owner_of(values)
    found: dict[str, Any] = {}
    below: dict[str, Any] = {}
    for key, value in values.items():
        name, where = key.replace("-", "_"), f"{path}{_line_of(key, text)}"
        name = RENAMED.get(name, name)
        if name in found:
            raise EarTeachError(f"{where}: {key!r} is given twice, with hyphens and with underscores; keep one")
        try:
            if name == "preset" and owner is TrainConfig:
                below = preset(plain(name, value, str))
            else:
                found[name] = _option_of_file(owner, name, key, value, where)
        except ConfigError as error:
            raise UsageError(f"{where}: {error}") from error
    return (preset(recipe) if recipe else below) | found


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EarTeachError(f"{path}: no such file; give --config a TOML file of options") from error
    except OSError as error:
        raise EarTeachError(f"{path}: {error.strerror}; give --config a TOML file of options") from error
    except UnicodeDecodeError as error:
        raise EarTeachError(f"{path}: not readable as TOML ({error}); save it as UTF-8") from error


def _option_of_file(owner: Any, name: str, key: str, value: Any, where: str) -> Any:
    """Return the checked value of one line."""
    specs = {spec.name: spec for spec in fields(owner)}
    if name in ("dry_run", "overwrite", "quiet", "verbose", "config"):
        raise EarTeachError(f"{where}: {key!r} cannot be set in a file; give {flag(name)} on the command line")
    if name not in specs and name in {spec.name for spec in fields(DistillConfig)}:
        raise EarTeachError(f"{where}: {key!r} is an option of earteach distill; give the file to that command")
    if name not in specs:
        hint = nearest(name, [*specs, "preset"])
        raise EarTeachError(f"{where}: unknown option {key!r}; {hint}`earteach train --help-all` lists the names")
    if specs[name].metadata.get("auto") and value == AUTO_NUMBER:
        raise ConfigError(name, f"{value} is not a number of its kind", "give a positive one, or auto")
    return converted(name, value, kinds_of(owner)[name], specs[name].metadata)


def _line_of(key: str, text: str) -> str:
    """Return where a key, or the table of that name, stands in a TOML file: ` line 3`; nothing if it is not found."""
    written = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    lines = (number for number, line in enumerate(text.splitlines(), 1) if written.match(line))
    number = next(lines, None)
    return "" if number is None else f" line {number}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean learning_rate? ` for lerning_rate; nothing if no name is like it."""
    names = list(names)
    longer = [other for other in names if other.startswith(name) and len(name) > 3]
    like = longer if len(longer) == 1 else get_close_matches(name, names, 1, cutoff=0.7)
    return f"did you mean {like[0]}? " if like else ""

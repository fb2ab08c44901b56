"""Warnings and log messages of libraries (Lightning, timm, PIL, torch's ONNX exporter): shown only with --verbose.

Code that hides them asks `are_shown` or `warning_action`; only the command line calls `show`.
"""

import logging
from typing import Literal

_LOGGED = logging.INFO
_handler: logging.Handler | None = None  # while they are shown


def show(wanted: bool) -> None:
    """Print log messages of libraries to stderr from now on, or no longer."""
    global _handler
    root = logging.getLogger()
    if _handler is not None:
        root.removeHandler(_handler)
        root.setLevel(logging.WARNING)
        _handler = None
    if wanted:
        _handler = logging.StreamHandler()
        _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        root.addHandler(_handler)
        root.setLevel(_LOGGED)


def are_shown() -> bool:
    """Return whether warnings and log messages of libraries are to be printed."""
    return _handler is not None


def warning_action() -> Literal["default", "ignore"]:
    """Return what `warnings.simplefilter` is to do with warnings of libraries."""
    return "default" if are_shown() else "ignore"

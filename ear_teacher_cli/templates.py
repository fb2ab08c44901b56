"""Documents made from Jinja templates: report.html and the model card."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .files import printable


def environment(package: str, *, html: bool) -> Environment:
    """Return an environment for `templates/` of a package (`report`, `export`).

    Values are written with control characters escaped (`files.printable`), and in HTML also with `<`, `>`, `&` and
    quotes; Markup is written unchanged. A name that a template does not know is an error.
    """
    return Environment(
        loader=PackageLoader(f"{__package__}.{package}"),
        autoescape=html,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _printable(value: Any) -> Any:
    return value if isinstance(value, Markup) else printable(value)

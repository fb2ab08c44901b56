"""Messages, tables and progress on stderr; stdout is for data.

In a terminal aligned columns and a rich progress bar; elsewhere plain lines, of progress one after the first second,
then every ten seconds.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rich.console import Console as Terminal
from rich.text import Text

from .files import printable

if TYPE_CHECKING:
    from rich.progress import Progress

FIRST_LINE_S = 1.0
NEXT_LINE_S = 10.0
NAME_WIDTH = 10  # of the names in a summary


@dataclass(frozen=True)
class Cell:
    """One value in a row of a table. `rank`: in a narrow terminal the cells of the highest ranks are left out first."""

    head: str
    text: str
    width: int = 0  # of the widest text to come
    rank: int = 0
    style: str = ""


class Console:
    """Prints the messages of a command. `Console(quiet=True)` prints warnings only."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.terminal = Terminal(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._heads = ""  # of the table under way

    def __deepcopy__(self, memo: dict) -> "Console":
        return self  # copies of a module (its moving average) share the console

    def info(self, text: str) -> None:
        """Print a message unless quiet."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning, also when quiet."""
        self._print(f"warning: {text}", "yellow")

    @property
    def in_terminal(self) -> bool:
        """Whether messages go to a terminal."""
        return self.terminal.is_terminal and not self.quiet

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print pairs of a name and a text as a table; outside a terminal as `name: text`."""
        for name, text in rows if not self.quiet else ():
            if not self.in_terminal:
                self._print(f"{name}: {text}" if name else f"    {text}")
                continue
            lines = Text(printable(text)).wrap(self.terminal, max(10, self.terminal.width - NAME_WIDTH - 2))
            for number, line in enumerate(lines):
                head = Text((name if number == 0 else "").ljust(NAME_WIDTH + 2), style="bold")
                self._live.print(head + Text(line.plain.rstrip()))

    def row(self, cells: Sequence[Cell], sentence: str) -> None:
        """Print a row of a table in a terminal, with the cells that fit, under their heads; elsewhere the sentence."""
        if self.quiet:
            return
        if not self.terminal.is_terminal:
            self._print(sentence)
            return
        kept = sorted(cells, key=lambda cell: cell.rank)
        while len(kept) > 1 and sum(_width(cell) + 2 for cell in kept) - 2 > self.terminal.width:
            kept.pop()
        kept = [cell for cell in cells if cell in kept]
        heads = "  ".join(cell.head.rjust(_width(cell)) for cell in kept)
        if heads != self._heads:
            self._live.print(Text(heads, style="bold"))
            self._heads = heads
        self._live.print(Text("  ").join(Text(cell.text.rjust(_width(cell)), style=cell.style) for cell in kept))

    @contextmanager
    def progress(self, doing: str, total: int | None, unit: str, done: int = 0) -> Iterator["Steps"]:
        """Show progress: `with console.progress('embedding', 5400, 'images') as steps: steps.advance(32)`. `done`: the
        number of units that were finished before."""
        if not self.in_terminal:
            steps = _PlainSteps(self, doing, total, unit, done)
            yield steps
            steps.end()
            return
        if self._bar is not None:  # rich allows one live display: a nested progress is another line of it
            task = self._bar.add_task(doing, total=total, completed=done)
            yield _BarSteps(self._bar, task)
            self._bar.remove_task(task)
            return
        from .progress_bar import progress_bar

        with progress_bar(self.terminal, unit) as bar:
            self._bar = bar
            try:
                yield _BarSteps(bar, bar.add_task(doing, total=total, completed=done))
            finally:
                self._bar = None

    @property
    def _live(self) -> Terminal:
        return self._bar.console if self._bar else self.terminal

    def _print(self, text: str, style: str = "") -> None:
        self._live.print(Text(printable(text), style=style))


def _width(cell: Cell) -> int:
    return max(len(cell.head), len(cell.text), cell.width)


class SilentConsole(Console):
    """Prints nothing, not even warnings: for callers that report the outcome themselves."""

    def __init__(self):
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        """Print nothing."""


class Steps(Protocol):
    """The progress of one task, as `Console.progress` yields it."""

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units."""

    def describe(self, doing: str) -> None:
        """Change what the task is called."""


class _BarSteps:
    def __init__(self, bar: "Progress", task):
        self.bar, self.task = bar, task

    def advance(self, count: int = 1) -> None:
        self.bar.advance(self.task, count)

    def describe(self, doing: str) -> None:
        self.bar.update(self.task, description=doing)


class _PlainSteps:
    def __init__(self, console: Console, doing: str, total: int | None, unit: str, done: int):
        self.console, self.doing, self.total, self.unit = console, doing, total, unit
        self.before, self.done, self.start, self.printed = done, done, time.monotonic(), False
        self.due = self.start + FIRST_LINE_S

    def advance(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() >= self.due:
            self._line()
            self.due = time.monotonic() + NEXT_LINE_S

    def describe(self, doing: str) -> None:
        self.doing = doing

    def end(self) -> None:
        if self.printed and self.done != self.total:
            self._line()

    def _line(self) -> None:
        self.printed = True
        rate = (self.done - self.before) / max(1e-9, time.monotonic() - self.start)
        left = f", {clock((self.total - self.done) / rate)} left" if self.total and rate else ""
        of = f"/{self.total}" if self.total else ""
        self.console.info(f"{self.doing}: {self.done}{of} {self.unit}, {rate:.1f}/s{left}")


def counted(number: int, thing: str, things: str = "") -> str:
    """Return `1 epoch`, `2 epochs`; `things`: the plural, if it is another."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def clock(seconds: float) -> str:
    """Return seconds as text: 95 -> '1 min 35 s'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"

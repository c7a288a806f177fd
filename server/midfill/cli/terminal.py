"""Print to a terminal: text, tables, JSON and progress.

Model names, file names and server messages are untrusted: control characters in them are spelled out, so
that they cannot send commands to the terminal.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from midfill.system.printable import printable, shown

if TYPE_CHECKING:
    from rich.console import Console

    from midfill.engine.api import Progress

T = TypeVar("T")

# Minimum time between two lines of progress.
_LINE_S = 1.0


def say(text: str = "", *, err: bool = False, bold: bool | None = None) -> None:
    """Print a text, with control characters spelled out."""
    click.secho(printable(text), err=err, bold=bold)


def show(result: dict[str, Any], table: Callable[[dict[str, Any]], Any], *, as_json: bool) -> None:
    """Print a result as one JSON object, or as the text or rich table that `table` returns for it."""
    found = json.dumps(result) if as_json else table(result)
    if isinstance(found, str):
        say(found)
        return
    terminal().print(found)


def terminal(*, stderr: bool = False) -> Console:
    """Return rich's console for tables and progress, without markup.

    rich would read markup from plain text: a model called `[/x]` would be an error, and `[link=...]` a link.
    Colours are given as styles or as `rich.text.Text` instead.
    """
    from rich.console import Console
    from rich.text import Text

    class Terminal(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """Render a text of a cell, a title or `print`, with control characters spelled out."""
            return super().render_str(printable(text), **options)

    return Terminal(stderr=stderr, markup=False, emoji=False, highlight=False)


class ProgressLines:
    """Progress where there is no terminal: a line on stderr when it has changed, at most one a second.

    The first report and the one that all is done are always printed.

    Args:
        title: printed in place of an empty message.
        clock_s: gives the time in seconds.
    """

    def __init__(self, title: str, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._clock_s = clock_s
        self._line = ""
        self._printed_s = -math.inf

    def report(self, message: str, share: float | None) -> None:
        """Take a report. `share` of the work is done, from 0 to 1; None: unknown."""
        line = (message or self._title) + ("" if share is None else f" ({int(100 * share)} %)")
        now_s = self._clock_s()
        is_done = share is not None and share >= 1
        if line == self._line or (now_s < self._printed_s + _LINE_S and not is_done):
            return
        self._line, self._printed_s = line, now_s
        say(line, err=True)


def with_progress(title: str, work: Callable[[Progress], T]) -> T:
    """Run `work` with a progress bar on stderr, or with lines if that is no terminal. Return its result."""
    console = terminal(stderr=True)
    if not console.is_terminal:
        return work(ProgressLines(title).report)
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        # A column renders its text without `Terminal.render_str`.
        task = bar.add_task(shown(title), total=None)

        def report(message: str, share: float | None) -> None:
            total = None if share is None else 1.0
            bar.update(task, description=shown(message or title), total=total, completed=share or 0.0)

        return work(report)

"""Print to a terminal: text, tables, JSON and progress.

Model names, file names and server messages are untrusted: control characters in them are spelled out, so
that they cannot send commands to the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from midfill.system.printable import printable, shown

if TYPE_CHECKING:
    from rich.console import Console

    from midfill.engine.api import Progress

T = TypeVar("T")


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


def with_progress(title: str, work: Callable[[Progress], T]) -> T:
    """Run `work` with a progress bar on stderr, and return its result."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = terminal(stderr=True)
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # Elsewhere, an empty line would be all that is left of the bar.
        disable=not console.is_terminal,
    ) as bar:
        # A column renders its text without `Terminal.render_str`.
        task = bar.add_task(shown(title), total=None)

        def report(message: str, share: float | None) -> None:
            total = None if share is None else 1.0
            bar.update(task, description=shown(message or title), total=total, completed=share or 0.0)

        return work(report)

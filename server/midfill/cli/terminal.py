"""What the commands print, for a person at a terminal. Nothing that others have written commands it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from midfill.system.printable import printable

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str = "", *, err: bool = False, bold: bool | None = None) -> None:
    """Print a text, of which nothing is left that would move the cursor or colour what follows."""
    click.secho(printable(text), err=err, bold=bold)


def terminal(*, stderr: bool = False) -> Console:
    """Return rich's console for tables and progress, to which texts are texts.

    To rich a text is markup: a model called `[/x]` would be an error, and `[link=...]` a link. Colours are
    given by styles and by `rich.text.Text`.
    """
    from rich.console import Console
    from rich.text import Text

    class Terminal(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """See `Console`; every text of a cell, a title or `print` comes through here."""
            return super().render_str(printable(text), **options)

    return Terminal(stderr=stderr, markup=False, emoji=False, highlight=False)

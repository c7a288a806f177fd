"""The interface to an editor's window: messages, questions, progress.

Knows nothing of LSP: `editor.EditorConnection` provides it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class Dialogs(Protocol):
    """Messages, questions and progress in an editor's window."""

    def show_info(self, sentence: str) -> None:
        """Show a message."""

    def show_warning(self, sentence: str) -> None:
        """Show a warning."""

    def show_error(self, sentence: str) -> None:
        """Show an error."""

    async def ask(self, question: str, answers: tuple[str, ...]) -> str | None:
        """Return the answer that the user chooses; None if there is none, or the editor cannot ask."""

    def progress(
        self, title: str, outcome: Callable[[], str], cancel: Callable[[], None] | None = None
    ) -> AbstractAsyncContextManager[Callable[[str, float | None], None]]:
        """Return a context that shows the progress of long work.

        Entering gives a function that reports a message and a share from 0 to 1 (None: unknown). At the end
        the text of `outcome` is shown. `cancel` is called when the user cancels; None: that is not possible.
        """

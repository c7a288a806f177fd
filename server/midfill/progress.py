"""`$/progress`: long work in the editor's window, for clients that show it. Runs on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lsprotocol import types
from pygls.lsp.server import LanguageServer


class Progress(contextlib.AbstractAsyncContextManager["Callable[[str, float | None], None]"]):
    """A piece of long work in the editor's window, from entering the context to leaving it.

    Args:
        server: whose client shows it.
        title: what the work is.
        outcome: what is shown at the end.
        cancel: called when the user wants it to end; None if it cannot.
    """

    def __init__(
        self,
        server: LanguageServer,
        title: str,
        outcome: Callable[[], str],
        cancel: Callable[[], None] | None = None,
    ) -> None:
        self._server = server
        self._outcome = outcome
        self._cancel = cancel
        self._title = title
        self._token = f"midfill-{uuid.uuid4()}"
        self._loop = asyncio.get_running_loop()
        self._shown = False

    async def __aenter__(self) -> Callable[[str, float | None], None]:
        window = self._server.client_capabilities.window
        if window is not None and window.work_done_progress:
            # A client that refuses, or never answers, gets no progress; loading does not wait for it.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._server.work_done_progress.create_async(self._token), timeout=1)
                self._shown = True
                begin = types.WorkDoneProgressBegin(
                    self._title, cancellable=self._cancel is not None, percentage=0
                )
                self._server.work_done_progress.begin(self._token, begin)
                self._server.work_done_progress.tokens[self._token].add_done_callback(self._cancelled)
        return self.report

    def _cancelled(self, wanted: Future[Any]) -> None:
        if wanted.cancelled() and self._cancel is not None:
            self._cancel()

    def report(self, message: str, share: float | None) -> None:
        """See `midfill.engine.Progress`; may be called from any thread."""
        if self._shown:
            percentage = None if share is None else round(100 * share)
            value = types.WorkDoneProgressReport(message=message, percentage=percentage)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._server.work_done_progress.report, self._token, value)

    async def __aexit__(self, *_: object) -> None:
        if self._shown:
            end = types.WorkDoneProgressEnd(message=self._outcome())
            self._server.work_done_progress.end(self._token, end)
            self._server.work_done_progress.tokens.pop(self._token, None)

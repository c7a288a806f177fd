"""`$/progress`: show long work in the editor's window, if the client can. Runs on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer


class WorkDoneProgress(contextlib.AbstractAsyncContextManager["Callable[[str, float | None], None]"]):
    """Show a piece of long work in the editor's window, from entering the context to leaving it.

    Args:
        server: the server whose client shows it.
        title: what the work is.
        outcome: called at the end; returns the text to show then.
        cancel: called when the user cancels the work; None if that is not possible.
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
        self._creation: asyncio.Task[None] | None = None
        self._is_shown = False
        self._newest: types.WorkDoneProgressReport | None = None
        self._end: types.WorkDoneProgressEnd | None = None

    async def __aenter__(self) -> Callable[[str, float | None], None]:
        window = self._server.client_capabilities.window
        if window is not None and window.work_done_progress:
            self._creation = self._loop.create_task(self._create())
        return self.report

    async def _create(self) -> None:
        """Create the token; show the progress once the client agrees, and nothing if it refuses.

        The work does not wait for that, since LSP sets no time limit for the answer. A client that agrees
        after the work has ended gets both the begin and the end, so that it keeps no token.
        """
        try:
            await self._server.work_done_progress.create_async(self._token)
        except JsonRpcException:
            return
        begin = types.WorkDoneProgressBegin(self._title, cancellable=self._cancel is not None, percentage=0)
        self._server.work_done_progress.begin(self._token, begin)
        self._server.work_done_progress.tokens[self._token].add_done_callback(self._cancelled)
        self._is_shown = True
        self._send()

    def _cancelled(self, wanted: Future[Any]) -> None:
        if wanted.cancelled() and self._cancel is not None:
            self._cancel()

    def report(self, message: str, share: float | None) -> None:
        """Report a message and the share that is done, from 0 to 1 (None: unknown). Call on any thread."""
        percentage = None if share is None else round(100 * share)
        value = types.WorkDoneProgressReport(message=message, percentage=percentage)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._note, value)

    def _note(self, value: types.WorkDoneProgressReport) -> None:
        self._newest = value
        self._send()

    def _send(self) -> None:
        """Send the newest report, or the end, if the client shows the progress."""
        if not self._is_shown:
            return
        progress = self._server.work_done_progress
        if self._end is not None:
            progress.end(self._token, self._end)
            progress.tokens.pop(self._token, None)
            self._is_shown = False
        elif self._newest is not None:
            progress.report(self._token, self._newest)

    async def __aexit__(self, *_: object) -> None:
        self._end = types.WorkDoneProgressEnd(message=self._outcome())
        self._send()

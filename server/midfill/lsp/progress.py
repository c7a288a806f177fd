"""`$/progress`: long work in the editor's window, for clients that show it. Runs on the event loop."""

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
        self._asking: asyncio.Task[None] | None = None
        self._shown = False
        self._reported: types.WorkDoneProgressReport | None = None  # the newest
        self._ended: types.WorkDoneProgressEnd | None = None

    async def __aenter__(self) -> Callable[[str, float | None], None]:
        window = self._server.client_capabilities.window
        if window is not None and window.work_done_progress:
            self._asking = self._loop.create_task(self._ask())
        return self.report

    async def _ask(self) -> None:
        """Show it from when the client agrees, however late; nothing if it refuses, as LSP demands.

        The work does not wait for that, since the protocol sets no time for it. A client that agrees when the
        work has ended is told both, so that it keeps no token.
        """
        try:
            await self._server.work_done_progress.create_async(self._token)
        except JsonRpcException:
            return
        begin = types.WorkDoneProgressBegin(self._title, cancellable=self._cancel is not None, percentage=0)
        self._server.work_done_progress.begin(self._token, begin)
        self._server.work_done_progress.tokens[self._token].add_done_callback(self._cancelled)
        self._shown = True
        self._tell()

    def _cancelled(self, wanted: Future[Any]) -> None:
        if wanted.cancelled() and self._cancel is not None:
            self._cancel()

    def report(self, message: str, share: float | None) -> None:
        """See `midfill.engine.api.Progress`; may be called from any thread."""
        percentage = None if share is None else round(100 * share)
        value = types.WorkDoneProgressReport(message=message, percentage=percentage)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._note, value)

    def _note(self, value: types.WorkDoneProgressReport) -> None:
        self._reported = value
        self._tell()

    def _tell(self) -> None:
        """Send what is new, if it is shown."""
        if not self._shown:
            return
        progress = self._server.work_done_progress
        if self._ended is not None:
            progress.end(self._token, self._ended)
            progress.tokens.pop(self._token, None)
            self._shown = False
        elif self._reported is not None:
            progress.report(self._token, self._reported)

    async def __aexit__(self, *_: object) -> None:
        self._ended = types.WorkDoneProgressEnd(message=self._outcome())
        self._tell()

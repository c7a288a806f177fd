"""The language server: its routes, its session, and how it runs on stdin and stdout.

`routes` says which handler answers which method, `session` holds the state, `protocol` speaks JSON-RPC.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from lsprotocol import types
from pygls.lsp.server import LanguageServer

from midfill import __version__
from midfill.engine.api import Engine
from midfill.lsp.editor import EditorConnection
from midfill.lsp.messages import TEST_HOOKS
from midfill.lsp.protocol import Protocol, Tap
from midfill.lsp.routes import ROUTES, TEST_ROUTES
from midfill.lsp.session import Session
from midfill.settings import Settings
from midfill.system.printable import printable


class MidfillServer(LanguageServer):
    """The language server.

    Args:
        settings: the user's own, before the editor adds its own.
        make_engine: makes the engine when the settings are complete; may be slow, so it runs in a thread.
        tap: gets the body of every message and its sender, "client" or "server".
        hooks: add the requests that only tests and benchmarks send.
    """

    protocol: Protocol

    def __init__(
        self,
        settings: Settings,
        make_engine: Callable[[Settings], Engine],
        *,
        tap: Tap | None = None,
        hooks: bool = False,
    ) -> None:
        routes = ROUTES + (TEST_ROUTES if hooks else ())
        readers = {route.method: route.reader for route in routes if route.reader is not None}
        protocol = partial(Protocol, readers=readers, tap=tap)
        # Notebooks of every kind, cells of every language.
        notebooks = types.NotebookDocumentSyncOptions([types.NotebookDocumentFilterWithNotebook("*")])
        super().__init__(
            "midfill",
            __version__,
            # pygls only calls it.
            protocol_cls=cast("type[Protocol]", protocol),
            notebook_document_sync=notebooks,
        )
        self.session = Session(settings, make_engine, EditorConnection(self))
        for route in routes:
            self.feature(route.method, route.options)(_with_session(route.handler, self.session))

    async def run(self, stdin: int, stdout: int) -> int:
        """Serve until the end and free the model. Returns the exit status."""
        try:
            return await self.protocol.serve(stdin, stdout)
        finally:
            await self.session.close()

    def window_show_message(self, params: types.ShowMessageParams) -> None:
        """Show a message; what is not printable in it is escaped."""
        super().window_show_message(types.ShowMessageParams(params.type, printable(params.message)))


def _with_session(handler: Callable[[Session, Any], Any], session: Session) -> Callable[[Any], Any]:
    """Return a handler as pygls takes it: a plain function, because pygls sets attributes on it."""

    def handle(params: Any) -> Any:
        return handler(session, params)

    return handle


def serve(settings: Settings, make_engine: Callable[[Settings], Engine], tap: Tap | None = None) -> int:
    """Serve this process's stdin and stdout. Returns the exit status.

    `tap` gets the body of every message and its sender. Nothing else may write to the real stdout: what
    libraries print goes to stderr. Threads may still run when it returns, so the caller has to end the
    process.
    """
    # A busy engine thread otherwise keeps the interpreter from the event loop for 5 ms at a time.
    sys.setswitchinterval(0.0005)
    stdin = os.dup(0)
    stdout = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    os.set_inheritable(stdin, False)
    os.set_inheritable(stdout, False)
    # Not `asyncio.run`: it waits for every thread at the end, one that imports torch or loads too.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = MidfillServer(settings, make_engine, tap=tap, hooks=bool(os.environ.get(TEST_HOOKS)))
    return loop.run_until_complete(server.run(stdin, stdout))

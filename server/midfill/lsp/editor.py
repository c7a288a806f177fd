"""The editor at the other end of the connection: its window, its workspace folders, its process.

The only way by which handlers reach the client. Runs on the event loop.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsprotocol import types

from midfill.lsp.editor_process import wait_for_end
from midfill.lsp.progress import WorkDoneProgress
from midfill.system.printable import printable
from midfill.text.documents import Encoding
from midfill.text.uris import file_of

if TYPE_CHECKING:
    from midfill.lsp.server import MidfillServer


class EditorConnection:
    """The editor that one server serves. Provides `dialogs.Dialogs`."""

    def __init__(self, server: MidfillServer) -> None:
        self._server = server

    # The window

    def show_info(self, sentence: str) -> None:
        """Show a message."""
        self._show(types.MessageType.Info, sentence)

    def show_warning(self, sentence: str) -> None:
        """Show a warning."""
        self._show(types.MessageType.Warning, sentence)

    def show_error(self, sentence: str) -> None:
        """Show an error."""
        self._show(types.MessageType.Error, sentence)

    def _show(self, kind: types.MessageType, sentence: str) -> None:
        self._server.window_show_message(types.ShowMessageParams(kind, f"midfill: {sentence}"))

    async def ask(self, question: str, answers: tuple[str, ...]) -> str | None:
        """Return the answer that the user chooses; None if there is none, or the client cannot ask."""
        actions = [types.MessageActionItem(answer) for answer in answers]
        text = printable(f"midfill: {question}")
        params = types.ShowMessageRequestParams(types.MessageType.Info, text, actions)
        try:
            # The protocol gives results as they came.
            chosen: Any = await self._server.window_show_message_request_async(params)
        except Exception:
            return None
        title = chosen.get("title") if isinstance(chosen, dict) else None
        return title if isinstance(title, str) else None

    def progress(
        self, title: str, outcome: Callable[[], str], cancel: Callable[[], None] | None = None
    ) -> WorkDoneProgress:
        """Return a context that shows the progress of long work, if the client can."""
        return WorkDoneProgress(self._server, f"midfill: {title}", outcome, cancel)

    # The workspace

    @property
    def encoding(self) -> Encoding:
        """The position encoding that client and server have agreed on."""
        # lsprotocol gives a member or a bare string.
        encoding = self._server.protocol.workspace.position_encoding
        return Encoding(types.PositionEncodingKind(encoding).value)

    def workspace_folders(self) -> list[tuple[str, Path]]:
        """Return the (name, path) of each folder of the workspace that is on this machine."""
        workspace = self._server.protocol.workspace
        named = [(folder.name, folder.uri) for folder in workspace.folders.values()]
        if not named and workspace.root_uri:
            # Older clients name one folder only.
            named = [("", workspace.root_uri)]
        return [(name, path) for name, uri in named if (path := file_of(uri)) is not None]

    async def watch_files(self, patterns: Sequence[str]) -> None:
        """Ask the client to report changes of files that match, if it can."""
        workspace = self._server.client_capabilities.workspace
        watching = workspace.did_change_watched_files if workspace else None
        if watching is None or not watching.dynamic_registration:
            return
        options = types.DidChangeWatchedFilesRegistrationOptions(
            [types.FileSystemWatcher(pattern) for pattern in patterns]
        )
        method = types.WORKSPACE_DID_CHANGE_WATCHED_FILES
        # A client that refuses reports nothing, and is served all the same.
        with contextlib.suppress(Exception):
            await self._server.client_register_capability_async(
                types.RegistrationParams([types.Registration(f"midfill-{uuid.uuid4()}", method, options)])
            )

    async def stop_with_process(self, process_id: int) -> None:
        """Stop the server when the editor's process ends, if that can be watched."""
        if await wait_for_end(process_id):
            self._server.protocol.stop(1)

"""`workspace/didChangeWorkspaceFolders`: index the folders of the workspace and route adapters by them."""

from __future__ import annotations

from typing import Any

from midfill.lsp.session import Session


def handle(session: Session, _: Any) -> None:
    """Open the folders that the workspace has now; pygls has noted which."""
    if session.initialized:
        open_folders(session)


def open_folders(session: Session) -> None:
    """Index the folders of the workspace and route adapters by them."""
    folders = session.editor.workspace_folders()
    session.completer.context.open_folders(folders)
    session.spawn(session.router.open_folders([path for _, path in folders]))

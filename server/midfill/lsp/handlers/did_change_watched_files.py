"""`workspace/didChangeWatchedFiles`: files of the workspace were written, made or deleted."""

from __future__ import annotations

from lsprotocol import types

from midfill.lsp.session import Session


def handle(session: Session, params: types.DidChangeWatchedFilesParams) -> None:
    """Bring the index of the workspace up to date."""
    session.completer.context.files_changed([change.uri for change in params.changes])

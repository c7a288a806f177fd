"""`textDocument/didSave`: users often pause after saving."""

from __future__ import annotations

from lsprotocol import types

from midfill.lsp.session import Session


def handle(session: Session, params: types.DidSaveTextDocumentParams) -> None:
    """Let the model prepare for the next request."""
    session.schedule_idle_work(params.text_document.uri)

"""`textDocument/didOpen`: open a document."""

from __future__ import annotations

from midfill.lsp.messages import OpenedDocument
from midfill.lsp.session import Session
from midfill.text.documents import Document


def handle(session: Session, opened: OpenedDocument) -> None:
    """Open a document."""
    open_document(session, opened)
    session.schedule_idle_work(opened.uri)


def open_document(session: Session, opened: OpenedDocument) -> None:
    """Open a document, or a cell of a notebook."""
    document = Document.open(opened.uri, opened.language_id, opened.version, opened.text)
    session.documents[opened.uri] = document
    session.completer.context.opened(document)

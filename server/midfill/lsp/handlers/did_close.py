"""`textDocument/didClose`: forget a document."""

from __future__ import annotations

from midfill.lsp.session import Session
from midfill.system import malloc

# Number of characters of closed documents after which the C library returns memory to the system.
_TRIM_CHARS = 16_000_000


def handle(session: Session, uri: str) -> None:
    """Forget a document, or a cell of a notebook, and cancel what is computed for it."""
    document = session.documents.pop(uri, None)
    session.cursors.pop(uri, None)
    session.num_chars_closed += document.num_chars if document else 0
    if session.num_chars_closed > _TRIM_CHARS:
        session.num_chars_closed = 0
        malloc.trim()
    session.answers.pop(uri, None)
    session.acceptance.close(uri)
    session.completer.forget(uri)
    session.cancel_requests(uri)

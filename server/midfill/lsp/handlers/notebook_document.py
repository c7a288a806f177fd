"""`notebookDocument/didOpen`, `didChange` and `didClose`: a notebook and the documents of its cells."""

from __future__ import annotations

from midfill.lsp.handlers import did_close
from midfill.lsp.handlers.did_change import apply_edit
from midfill.lsp.handlers.did_open import open_document
from midfill.lsp.messages import ChangedNotebook, ClosedNotebook, OpenedNotebook
from midfill.lsp.session import Session

# Brackets that the editor has closed are looked for in the last cells of an edit only: the user types in one.
_NUM_AUTOCLOSE_CELLS = 4


def handle_did_open(session: Session, opened: OpenedNotebook) -> None:
    """Open a notebook and its cells."""
    for document in opened.documents:
        open_document(session, document)
    session.notebooks.open(opened.uri, opened.cells)


def handle_did_change(session: Session, changed: ChangedNotebook) -> None:
    """Move, close, open and edit cells."""
    if changed.splice is not None:
        session.notebooks.splice(changed.uri, *changed.splice)
    for uri in changed.closed:
        did_close.handle(session, uri)
    for document in changed.opened:
        open_document(session, document)
    first = len(changed.edits) - _NUM_AUTOCLOSE_CELLS
    for at, edited in enumerate(changed.edits):
        apply_edit(session, edited, may_autoclose=at >= first)
    if changed.edits:
        session.schedule_idle_work(changed.edits[-1].uri)


def handle_did_close(session: Session, closed: ClosedNotebook) -> None:
    """Close a notebook and all its cells, including those that the client does not name."""
    for uri in {*session.notebooks.close(closed.uri), *closed.cells}:
        did_close.handle(session, uri)

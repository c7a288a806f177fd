"""`textDocument/didChange`: apply edits to a document."""

from __future__ import annotations

import logging

from midfill.completion.autoclose import auto_closing_changes
from midfill.lsp.messages import EditedDocument
from midfill.lsp.session import Session
from midfill.text.documents import Change, Document, Point, Snapshot

_LOG = logging.getLogger(__name__)


def handle(session: Session, edited: EditedDocument) -> None:
    """Apply edits. Those of a document that is not open are dropped."""
    apply_edit(session, edited)
    session.schedule_idle_work(edited.uri)


def apply_edit(session: Session, edited: EditedDocument, *, may_autoclose: bool = True) -> None:
    """Apply edits to a document, or to a cell of a notebook.

    With `may_autoclose`, look among them for brackets that the editor has closed by itself.
    """
    document = session.documents.get(edited.uri)
    if document is None:
        _LOG.warning("dropped a change of a document that is not open")
        return
    version = document.version if edited.version is None else edited.version
    after, done = document, 0
    for at in auto_closing_changes(edited.changes) if may_autoclose else ():
        after = after.edit(edited.changes[done:at], version, session.encoding)
        _note_autoclose(session, after, edited.changes[at])
        done = at
    after = after.edit(edited.changes[done:], version, session.encoding)
    session.documents[edited.uri] = after
    session.completer.context.edited(document, after)
    if session.completer.computes(edited.uri):
        # Only then: joining all cells of a notebook takes a moment, and all of them may be edited at once.
        session.completer.edited(session.whole(Snapshot(after, Point(0, 0))).document)
    session.acceptance.edit(document, after, edited.changes, session.encoding)
    if edited.changes and edited.changes[-1].start is not None:
        session.cursors[edited.uri] = after.end_of(edited.changes[-1], session.encoding)


def _note_autoclose(session: Session, document: Document, change: Change) -> None:
    """Tell the completer that part of a change, about to be made, may be an auto-closed bracket."""
    before = Snapshot(document, document.point(change.start or (0, 0), session.encoding))
    session.completer.before_auto_close(session.whole(before))

"""`textDocument/inlineCompletion`: ghost text."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from midfill.completion.answer import Trigger
from midfill.lsp.answering import acceptance_command, answer
from midfill.lsp.items import inline_item, with_selected
from midfill.lsp.messages import CompletionRequest
from midfill.lsp.session import Session
from midfill.text.documents import Snapshot


def handle(session: Session, request: CompletionRequest) -> Awaitable[dict[str, Any]]:
    """Answer with one item at most. A newer request for the document cancels this one."""
    snapshot = session.snapshot(request.uri, request.position)
    if snapshot is not None and request.selected is not None:
        snapshot = with_selected(snapshot, request.selected, session.encoding)
    whole = None if snapshot is None else session.whole(snapshot)
    return session.run_newest("inline", request.uri, _complete(session, snapshot, whole, request))


async def _complete(
    session: Session, snapshot: Snapshot | None, whole: Snapshot | None, request: CompletionRequest
) -> dict[str, Any]:
    found = await answer(session, whole, Trigger.INVOKED if request.invoked else Trigger.AUTOMATIC)
    if snapshot is None or not found.text:
        return {"items": []}
    command = acceptance_command(session, snapshot, found)
    return {"items": [inline_item(snapshot, found, session.encoding, request.selected, command)]}

"""`textDocument/completion`: the suggestion as an item of the editor's popup."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from lsprotocol import types

from midfill.completion.answer import Answer, Trigger
from midfill.lsp.answering import acceptance_command, answer
from midfill.lsp.items import popup_item
from midfill.lsp.messages import CompletionRequest
from midfill.lsp.session import Session
from midfill.text.documents import Snapshot


def handle(session: Session, request: CompletionRequest) -> Awaitable[types.CompletionList]:
    """Answer with one item at most, within the popup's budget."""
    snapshot = session.snapshot(request.uri, request.position)
    whole = None if snapshot is None else session.whole(snapshot)
    work = session.run_newest("popup-work", request.uri, answer(session, whole, Trigger.AUTOMATIC))
    return session.run_newest("popup", request.uri, _wait(session, snapshot, work))


async def _wait(
    session: Session, snapshot: Snapshot | None, work: asyncio.Task[Answer]
) -> types.CompletionList:
    """Return the item if it is there in time. A late one is computed to its end, for the next keystroke."""
    try:
        await asyncio.wait([work], timeout=session.popup_budget_s)
    except asyncio.CancelledError:
        work.cancel()
        raise
    found = await work if work.done() else Answer()
    items = []
    if snapshot is not None and found.text:
        command = acceptance_command(session, snapshot, found)
        item = popup_item(snapshot, found, session.encoding, command, session.popup_style)
        items = [item] if item is not None else []
    # What is typed next changes the suggestion, so the editor has to ask again.
    return types.CompletionList(is_incomplete=bool(items) or session.client.asks_again, items=items)

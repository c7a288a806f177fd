"""Shared by ghost text and popup: compute an answer, log it, and let the editor report its acceptance.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging

from lsprotocol import types

from midfill.completion.answer import Answer, Trigger
from midfill.completion.reasons import Reason
from midfill.completion.stats import acceptance
from midfill.lsp.session import Session
from midfill.system import last_request
from midfill.text.documents import Snapshot

_LOG = logging.getLogger(__name__)

# The command of a suggestion's item: editors run it when the user accepts the item.
ACCEPTED = "midfill.accepted"


async def answer(session: Session, whole: Snapshot | None, trigger: Trigger) -> Answer:
    """Return the answer for what `Session.whole` gave, and keep it for `midfill/explain`.

    None stands for a document that is not open. The snapshot comes from the caller, since other cells of a
    notebook may have changed by the time that this begins.
    """
    if whole is None:
        _LOG.info("empty answer: %s", Reason.NOT_OPEN)
        return Answer(reason=Reason.NOT_OPEN)
    if last_request.is_due():
        # In a thread: the folder may be on a slow disk.
        asyncio.get_running_loop().run_in_executor(None, last_request.mark)
    found = await session.completer.complete(whole, trigger)
    session.costs.answered(found.source, found.reason, found.latency_ms)
    uri = whole.document.uri
    if uri in session.documents:
        # Put in last again: the newest answer is the last one.
        session.answers.pop(uri, None)
        session.answers[uri] = found
    if found.reason is Reason.ENGINE_UNAVAILABLE and session.should_show(found.detail):
        session.editor.show_warning(found.detail)
    _LOG.info(
        "%s %s in %.1f ms (prompt %d, reused %d, generated %d tokens)",
        found.source,
        found.reason or "",
        found.latency_ms,
        found.num_prompt,
        found.num_reused,
        found.num_generated,
    )
    return found


def acceptance_command(session: Session, snapshot: Snapshot, shown: Answer) -> types.Command | None:
    """Return the command of a suggestion's item; None if acceptance is not counted."""
    engine = session.engine
    if engine is None or not session.settings.count_feedback:
        return None
    adapter = session.router.name_for(snapshot.document) or engine.model.adapter
    model = acceptance.key_of(engine.model.name, adapter, held_out=session.router.held_out)
    id_ = session.acceptance.shown(snapshot.document, snapshot.cursor, shown.text, model, shown.num_replaced)
    return None if id_ is None else types.Command("midfill: accepted", ACCEPTED, arguments=[id_])

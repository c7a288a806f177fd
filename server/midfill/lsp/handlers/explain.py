"""`midfill/explain`: how the last answer for a document came about, or why it was empty."""

from __future__ import annotations

from typing import Any

from midfill.completion.explanation import explain
from midfill.completion.reasons import REASONS, Reason
from midfill.lsp.messages import ExplainRequest
from midfill.lsp.session import Session


def handle(session: Session, request: ExplainRequest) -> dict[str, Any]:
    """Return the source of the last answer for a document, or the reason and message of an empty one."""
    answer = session.answers.get(request.uri)
    if answer is None:
        reason = None if request.uri in session.documents else Reason.NOT_OPEN
        return {"source": "none", "reason": reason, "message": REASONS[reason] if reason else None}
    engine = session.engine
    return explain(answer, engine.model.tokenizer if request.with_text and engine is not None else None)

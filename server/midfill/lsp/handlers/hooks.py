"""Requests for tests and benchmarks. They exist only if `MIDFILL_TEST_HOOKS` is set (`lsp/routes.py`)."""

from __future__ import annotations

from typing import Any

from lsprotocol import types

from midfill.lsp.messages import ResponseError
from midfill.lsp.session import Session


def document_text(session: Session, uri: str) -> dict[str, Any]:
    """Answer `midfill/documentText`: the server's copy of a document."""
    document = session.documents.get(uri)
    if document is None:
        raise ResponseError(types.ErrorCodes.InvalidParams, "The document is not open.")
    return {"text": document.text, "version": document.version}


async def indexed(session: Session, _: Any) -> dict[str, int]:
    """Answer `midfill/indexed` once the workspace has been indexed: numbers of files and chunks."""
    num_files, num_chunks = await session.completer.context.indexed()
    return {"files": num_files, "chunks": num_chunks}


def costs(session: Session, after: int) -> dict[str, Any]:
    """Answer `midfill/costs`: what answers and the engine's work have cost, cancelled requests included.

    `after` is the number of the last record that the client knows. Numbers and times, no text.
    """
    return session.costs.after(after)

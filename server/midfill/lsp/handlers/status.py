"""`midfill/status`: what runs, for an editor's status line."""

from __future__ import annotations

from typing import Any

from midfill import __version__
from midfill.completion.reasons import REASONS, Reason
from midfill.lsp.session import Session
from midfill.settings import changed

# Of every file, or over soon.
_NOT_OF_THE_FILE = {Reason.DISABLED, Reason.EMPTY_FILE, Reason.SECRET_SEARCH}


def handle(session: Session, params: Any) -> dict[str, Any]:
    """Return the model, its state and its speed.

    `state` is "loading", "ready" or "failed", and `message` says why it failed. `model` is the name that the
    user chose; what only the loaded model knows is null before. `heldOut` is the adapter that this session
    runs without, for comparison (`adapter_holdout`). `attention` is the attention kernel on a GPU, "flash" or
    "plain". `changedSettings` names the settings that are not at their defaults, `calibration` the file that
    `midfill eval calibrate` has written. `modelMissing`: the model has not been downloaded. If `params` name
    a document (`textDocument.uri`), `file` is the reason and the message why it gets no suggestion anywhere;
    null if it does.
    """
    completer = session.completer
    loaded = session.engine.model if completer.is_ready and session.engine is not None else None
    adapter = (loaded.adapter or session.router.name_for(None)) if loaded else None
    held_out = session.router.held_out
    speed = session.costs.tokens_per_second()
    return {
        "state": "failed" if completer.failure is not None else "ready" if loaded else "loading",
        "message": completer.failure,
        "modelMissing": session.model_missing,
        "file": _reason_against_file(session, params),
        "enabled": completer.settings.enabled,
        "model": loaded.name if loaded else completer.settings.model,
        "adapter": adapter if not held_out else None,
        "heldOut": adapter if held_out else None,
        "device": loaded.device if loaded else None,
        "dtype": loaded.dtype if loaded else None,
        "attention": (loaded.attention or None) if loaded else None,
        "calibration": completer.calibration.source or None,
        "changedSettings": changed(completer.settings),
        "tokensPerSecond": None if speed is None else round(speed, 1),
        "version": __version__,
    }


def _reason_against_file(session: Session, params: Any) -> dict[str, str] | None:
    named = params.get("textDocument") if isinstance(params, dict) else None
    uri = named.get("uri") if isinstance(named, dict) else None
    document = session.documents.get(uri) if isinstance(uri, str) else None
    reason = None if document is None else session.completer.reason_against_file(document)
    return (
        None
        if reason is None or reason in _NOT_OF_THE_FILE
        else {"reason": reason, "message": REASONS[reason]}
    )

"""`workspace/didChangeConfiguration`: take new settings."""

from __future__ import annotations

import logging
from typing import Any

from lsprotocol import types

from midfill.errors import MidfillError
from midfill.lsp.session import Session
from midfill.settings import keep_start_only, merge

_LOG = logging.getLogger(__name__)


def handle(session: Session, params: types.DidChangeConfigurationParams) -> None:
    """Take new settings. Those that need a restart keep their values."""
    apply_settings(session, params.settings)


def apply_settings(session: Session, values: Any) -> None:
    """Put the editor's settings over the user's own, and show what is wrong with them."""
    if isinstance(values, dict) and isinstance(values.get("midfill"), dict):
        values = values["midfill"]
    settings, problems = merge(values, session.settings, session.own_settings)
    if session.initialized:
        settings, need_restart = keep_start_only(settings, session.settings)
        problems += need_restart
    try:
        session.completer.configure(settings)
    except MidfillError as error:
        problems.append(str(error))
    for problem in problems:
        _LOG.warning("%s", problem)
    if problems:
        session.editor.show_warning(" ".join(problems))

"""`initialized`: load the model and index the workspace."""

from __future__ import annotations

from typing import Any

from midfill.completion.context.ignore import IGNORE_FILES
from midfill.lsp.handlers.did_change_workspace_folders import open_folders
from midfill.lsp.model_loading import load_model
from midfill.lsp.session import Session
from midfill.text.languages import SUFFIXES

# Files of the workspace whose changes concern its index.
_WATCHED = (*(f"**/*{suffix}" for suffix in SUFFIXES), *(f"**/{name}" for name in IGNORE_FILES))


def handle(session: Session, _: Any) -> None:
    """Begin to load the model, to index the workspace and to hear of changed files; once."""
    if session.initialized:
        return
    session.initialized = True
    session.spawn(load_model(session))
    open_folders(session)
    session.spawn(session.editor.watch_files(_WATCHED))

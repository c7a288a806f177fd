"""The routing table: every method that the server handles.

pygls handles `shutdown`, `exit`, `$/setTrace` and the like itself (`protocol`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lsprotocol import types

from midfill.lsp import messages
from midfill.lsp.handlers import (
    completion,
    did_change,
    did_change_configuration,
    did_change_watched_files,
    did_change_workspace_folders,
    did_close,
    did_open,
    did_save,
    execute_command,
    explain,
    hooks,
    initialize,
    initialized,
    inline_completion,
    notebook_document,
    status,
)
from midfill.lsp.session import Session


@dataclass(frozen=True, slots=True)
class Route:
    """How one method is handled.

    Attributes:
        method: its name in LSP.
        handler: gets the session and the params. May return an awaitable; its code up to the first `await`
            runs before the next message is handled.
        reader: reads the params from raw JSON; None for lsprotocol's type.
        options: announced as the server's capability; without them pygls announces some methods not at all.
    """

    method: str
    handler: Callable[[Session, Any], Any]
    reader: Callable[[Any], Any] | None = None
    options: Any = None


_SAVE = types.SaveOptions(include_text=False)
_GHOST = types.InlineCompletionOptions()
_POPUP = types.CompletionOptions(resolve_provider=False)
_COMMANDS = types.ExecuteCommandOptions(list(execute_command.COMMANDS))

ROUTES = (
    Route("initialize", initialize.handle),
    Route("initialized", initialized.handle),
    Route("textDocument/didOpen", did_open.handle, messages.read_opened),
    Route("textDocument/didChange", did_change.handle, messages.read_edited),
    Route("textDocument/didSave", did_save.handle, options=_SAVE),
    Route("textDocument/didClose", did_close.handle, messages.read_uri),
    Route("notebookDocument/didOpen", notebook_document.handle_did_open, messages.read_notebook_opened),
    Route("notebookDocument/didChange", notebook_document.handle_did_change, messages.read_notebook_changed),
    Route("notebookDocument/didClose", notebook_document.handle_did_close, messages.read_notebook_closed),
    Route("textDocument/inlineCompletion", inline_completion.handle, messages.read_inline_completion, _GHOST),
    Route("textDocument/completion", completion.handle, messages.read_completion, _POPUP),
    Route("workspace/executeCommand", execute_command.handle, messages.read_command, _COMMANDS),
    Route("workspace/didChangeConfiguration", did_change_configuration.handle),
    Route("workspace/didChangeWorkspaceFolders", did_change_workspace_folders.handle),
    Route("workspace/didChangeWatchedFiles", did_change_watched_files.handle),
    Route("midfill/explain", explain.handle, messages.read_explain),
    Route("midfill/status", status.handle),
)

# Only if MIDFILL_TEST_HOOKS is set.
TEST_ROUTES = (
    Route("midfill/documentText", hooks.document_text, messages.read_uri),
    Route("midfill/indexed", hooks.indexed),
    Route("midfill/costs", hooks.costs, messages.read_costs),
)

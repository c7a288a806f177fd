"""`initialize`: take the editor's settings and capabilities."""

from __future__ import annotations

from lsprotocol import types

from midfill.lsp import known_clients
from midfill.lsp.handlers.did_change_configuration import apply_settings
from midfill.lsp.items import PopupStyle
from midfill.lsp.messages import OWN_CLIENT, REPLAYED
from midfill.lsp.session import Session


def handle(session: Session, params: types.InitializeParams) -> None:
    """Take the editor's settings and capabilities. The model is loaded after `initialized`."""
    session.client = known_clients.find(params.client_info)
    session.encoding = session.editor.encoding
    apply_settings(session, params.initialization_options)
    session.popup_style = PopupStyle.of(params)
    # What the demo and the benchmarks accept says nothing about a user.
    name = params.client_info.name if params.client_info else ""
    session.acceptance.counts = name != OWN_CLIENT and not name.startswith(REPLAYED)
    if isinstance(params.process_id, int) and params.process_id > 0:
        session.spawn(session.editor.stop_with_process(params.process_id))

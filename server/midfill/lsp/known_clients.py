"""Table of LSP clients that need other answers than the protocol says, by the `clientInfo` of `initialize`.

One row for each client, with its source; everything else about a client is in its capabilities. Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass

from lsprotocol import types

from midfill.lsp.messages import REPLAYED


@dataclass(frozen=True, slots=True)
class KnownClient:
    """How the server answers one client.

    Attributes:
        name: the client's name, as in `clientInfo`; "" is every client without a row.
        version: the version starts with this; "" is every version.
        popup_budget_ms: time that a popup waits for the model, in milliseconds; None: until the model has
            answered, or `deadline_s` is over.
        asks_again: it asks again after an empty answer that is incomplete. Any other client gets an empty
            answer as complete.
        takes_edits: it inserts the text of an edit unchanged.
        commands: those that are announced; None: all of them.
    """

    name: str = ""
    version: str = ""
    popup_budget_ms: int | None = 80
    asks_again: bool = True
    takes_edits: bool = True
    commands: frozenset[str] | None = None


ANY_CLIENT = KnownClient()

KNOWN_CLIENTS = (
    # It shows its popup 100 ms after the first answer, adds later answers to it, and drops an empty answer
    # unless that is incomplete: such a one starts the 100 ms and opens nothing. So a fast empty incomplete
    # answer hides the items of every slower server. It runs no command of an item; its
    # `:lsp-workspace-command` lists the ids that are announced, and shows no result of theirs.
    # Source: helix-term/src/handlers/completion.rs (`handle_response`), completion/request.rs
    # (`request_completions`), commands/typed.rs (`lsp_workspace_command`) of helix-editor/helix at 079a789e8;
    # 25.07.1 does the same (tests/editors/test_helix.py).
    KnownClient(
        "helix",
        popup_budget_ms=None,
        asks_again=False,
        commands=frozenset(
            {"midfill.explain", "midfill.adapter.off", "midfill.adapter.train", "midfill.adapter.stop"}
        ),
    ),
    # It cuts the text of an edit at its first blank, but inserts a plain text whole, in place of the word
    # before the cursor. Source: Neovim 0.11.4 as run (tests/editors/test_neovim.py).
    KnownClient("Neovim", version="0.11", takes_edits=False),
    # It shows its popup when every server has answered, so the model must not delay it: the default budget.
    # Source: plugin/completion.py (`query_completions_async`) of sublimelsp/LSP at 00ac22bd; not run.
    KnownClient("Sublime Text LSP"),
)


def find(info: types.ClientInfo | None) -> KnownClient:
    """Return the row of a client, or of the one that is replayed; `ANY_CLIENT` if it has none."""
    name, version = ("", "") if info is None else (info.name.removeprefix(REPLAYED), info.version or "")
    rows = (row for row in KNOWN_CLIENTS if row.name == name and version.startswith(row.version))
    return next(rows, ANY_CLIENT)

"""What editors and people ask beside suggestions: the server's commands and its `midfill/` requests.

Runs on the event loop and answers at once, from what is known already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lsprotocol import types

from midfill import __version__
from midfill.completer import REASONS, Reason
from midfill.explanation import explain
from midfill.messages import Command, Explain
from midfill.protocol import Refusal

if TYPE_CHECKING:
    from midfill.server import MidfillServer

ACCEPTED = "midfill.accepted"
EXPLAIN = "midfill.explain"


class Commands:
    """The commands of one server, and the requests that are not LSP's own."""

    def __init__(self, server: MidfillServer) -> None:
        self._server = server
        self._commands: dict[str, Callable[[list[Any]], Any]] = {
            ACCEPTED: self._accepted,
            EXPLAIN: self._explain_last,
        }

    @property
    def names(self) -> list[str]:
        """What `workspace/executeCommand` knows."""
        return list(self._commands)

    @property
    def requests(self) -> dict[str, Callable[[Any], Any]]:
        """Methods of our own and what answers them."""
        return {
            "midfill/documentText": self.document_text,
            "midfill/indexed": self.indexed,
            "midfill/explain": self.explain,
            "midfill/costs": self.costs,
            "midfill/status": self.status,
        }

    def execute(self, command: Command) -> Any:
        """`workspace/executeCommand`."""
        run = self._commands.get(command.name)
        if run is None:
            raise Refusal(types.ErrorCodes.InvalidParams, f"Unknown command {command.name[:80]!r}.")
        return run(command.arguments)

    def explain(self, asked: Explain) -> dict[str, Any]:
        """`midfill/explain`: how the last answer for a document came about, or why it was empty."""
        state = self._server.state
        answer = state.answers.get(asked.uri)
        if answer is None:
            reason = None if asked.uri in state.documents else Reason.NOT_OPEN
            return {"source": "none", "reason": reason, "message": REASONS[reason] if reason else None}
        engine = state.engine
        return explain(answer, engine.model.tokenizer if asked.with_text and engine is not None else None)

    def costs(self, after: int) -> dict[str, Any]:
        """`midfill/costs`: what answers and the work for them have cost, those of cancelled requests too."""
        return self._server.state.costs.after(after)

    def status(self, _: Any) -> dict[str, Any]:
        """`midfill/status`: what runs here, for a status line.

        `state` is "loading", "ready" or "failed", and `message` says why it failed. `model` is the name that
        the user chose; what only the loaded model knows is null before.
        """
        state = self._server.state
        completer = state.completer
        loaded = state.engine.model if completer.is_ready and state.engine is not None else None
        speed = state.costs.tokens_per_second()
        return {
            "state": "failed" if completer.failure is not None else "ready" if loaded else "loading",
            "message": completer.failure,
            "enabled": completer.settings.enabled,
            "model": loaded.name if loaded else completer.settings.model,
            "adapter": loaded.adapter if loaded else None,
            "device": loaded.device if loaded else None,
            "dtype": loaded.dtype if loaded else None,
            "tokensPerSecond": None if speed is None else round(speed, 1),
            "version": __version__,
        }

    def document_text(self, uri: str) -> dict[str, Any]:
        """`midfill/documentText`: the server's copy of a document, for tests of synchronisation."""
        document = self._server.state.documents.get(uri)
        if document is None:
            raise Refusal(types.ErrorCodes.InvalidParams, "The document is not open.")
        return {"text": document.text, "version": document.version}

    async def indexed(self, _: Any) -> dict[str, int]:
        """`midfill/indexed`: answered when the workspace has been read, for evaluations."""
        num_files, num_chunks = await self._server.state.completer.context.indexed()
        return {"files": num_files, "chunks": num_chunks}

    def _accepted(self, arguments: list[Any]) -> None:
        """`midfill.accepted`: the command of an item that the user took."""
        for id_ in arguments[:1]:
            if type(id_) is int:
                self._server.state.journal.accept(id_)

    def _explain_last(self, arguments: list[Any]) -> dict[str, Any]:
        """`midfill.explain`: the last answer, of the document that is named or of any; shown as a message."""
        named = arguments[0] if arguments and isinstance(arguments[0], str) else None
        uri = named or next(reversed(self._server.state.answers), None)
        explained = self.explain(Explain(uri or "", with_text=arguments[1:2] == [True]))
        what = explained["message"] or f"The last suggestion came from: {explained['source']}."
        message = "midfill: Nothing has been asked for yet." if uri is None else f"midfill: {what}"
        self._server.window_show_message(types.ShowMessageParams(types.MessageType.Info, message))
        return explained

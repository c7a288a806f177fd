"""`workspace/executeCommand`: one table of commands; those of adapters are in `adapter_commands`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lsprotocol import types

from midfill.lsp.answering import ACCEPTED
from midfill.lsp.handlers import adapter_commands, explain
from midfill.lsp.messages import CommandCall, ExplainRequest, ResponseError
from midfill.lsp.session import Session


def handle(session: Session, call: CommandCall) -> Any:
    """Run a command and return its result."""
    run = COMMANDS.get(call.name)
    if run is None:
        raise ResponseError(types.ErrorCodes.InvalidParams, f"Unknown command {call.name[:80]!r}.")
    return run(session, call.arguments)


def _accepted(session: Session, arguments: list[Any]) -> None:
    """Count an item as accepted; `arguments[0]` is the id that the item had."""
    for id_ in arguments[:1]:
        if type(id_) is int:
            session.acceptance.accept(id_)


def _explain_last(session: Session, arguments: list[Any]) -> dict[str, Any]:
    """Show and return where the last answer came from.

    `arguments[0]` may be the URI of its document; `arguments[1]` true adds the texts.
    """
    named = arguments[0] if arguments and isinstance(arguments[0], str) else None
    uri = named or next(reversed(session.answers), None)
    explained = explain.handle(session, ExplainRequest(uri or "", with_text=arguments[1:2] == [True]))
    if uri is None:
        message = "No suggestion has been requested yet."
    else:
        message = explained["message"] or f"The last suggestion came from: {explained['source']}."
    session.editor.show_info(message)
    return explained


# Name > what runs it, with the session and the arguments.
COMMANDS: dict[str, Callable[[Session, list[Any]], Any]] = {
    ACCEPTED: _accepted,
    "midfill.explain": _explain_last,
    "midfill.adapter.list": adapter_commands.list_adapters,
    "midfill.adapter.use": adapter_commands.use_adapter,
    "midfill.adapter.off": adapter_commands.use_no_adapter,
    "midfill.adapter.train": adapter_commands.train_adapter,
    "midfill.adapter.stop": adapter_commands.stop_training,
}

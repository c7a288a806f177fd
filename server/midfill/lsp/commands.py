"""What editors and people ask beside suggestions: the server's commands and its `midfill/` requests.

Runs on the event loop and answers at once, from what is known already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lsprotocol import types

from midfill import __version__
from midfill.completion.explanation import explain
from midfill.completion.reasons import REASONS, Reason
from midfill.errors import AdapterError, MidfillError
from midfill.lsp.adapter_routing import Asked as AskedFor
from midfill.lsp.messages import Command, Explain
from midfill.lsp.progress import Progress
from midfill.lsp.protocol import Refusal
from midfill.lsp.train_command import Training
from midfill.settings import changed
from midfill.system.printable import printable

if TYPE_CHECKING:
    from midfill.lsp.server import MidfillServer

ACCEPTED = "midfill.accepted"
EXPLAIN = "midfill.explain"
ADAPTER_LIST = "midfill.adapter.list"
ADAPTER_USE = "midfill.adapter.use"
ADAPTER_OFF = "midfill.adapter.off"
ADAPTER_TRAIN = "midfill.adapter.train"
ADAPTER_STOP = "midfill.adapter.stop"

_AGREE, _REFUSE = "Use it", "Do not use it"

_MINUTES = 20
_MOST_MINUTES = 24 * 60


class Commands:
    """The commands of one server, and the requests that are not LSP's own."""

    def __init__(self, server: MidfillServer) -> None:
        self._server = server
        self._commands: dict[str, Callable[[list[Any]], Any]] = {
            ACCEPTED: self._accepted,
            EXPLAIN: self._explain_last,
            ADAPTER_LIST: self._list_adapters,
            ADAPTER_USE: self._use_adapter,
            ADAPTER_OFF: self._use_no_adapter,
            ADAPTER_TRAIN: self._train_adapter,
            ADAPTER_STOP: self._stop_training,
        }
        self.training = Training(self, lambda name: server.switch.bind(name, "workspace"))

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
        the user chose; what only the loaded model knows is null before. `heldOut` is the adapter that this
        session is without, for the sake of comparison (`adapter_holdout`). `changedSettings` names those
        that are not at their defaults, `calibration` the file that `midfill eval calibrate` has written.
        """
        state = self._server.state
        completer = state.completer
        loaded = state.engine.model if completer.is_ready and state.engine is not None else None
        adapter = (loaded.adapter or self._server.switch.name_for(None)) if loaded else None
        held_out = self._server.switch.held_out
        speed = state.costs.tokens_per_second()
        return {
            "state": "failed" if completer.failure is not None else "ready" if loaded else "loading",
            "message": completer.failure,
            "enabled": completer.settings.enabled,
            "model": loaded.name if loaded else completer.settings.model,
            "adapter": adapter if not held_out else None,
            "heldOut": adapter if held_out else None,
            "device": loaded.device if loaded else None,
            "dtype": loaded.dtype if loaded else None,
            "calibration": completer.calibration.source or None,
            "changedSettings": changed(completer.settings),
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
        message = "Nothing has been asked for yet." if uri is None else what
        self.say(message)
        return explained

    async def _list_adapters(self, _: list[Any]) -> dict[str, Any]:
        """`midfill.adapter.list`: the adapters on this machine, and which of them are in the model."""
        switch = self._server.switch
        entries, bound = await asyncio.to_thread(switch.known)
        running = {entry.digest for entry in switch.in_use}
        adapters = [
            {
                "name": entry.name,
                "digest": entry.digest,
                "base": entry.base,
                "verdict": entry.judgement.verdict,
                "reasons": list(entry.judgement.reasons),
                "forced": entry.judgement.forced,
                "usedIn": bound.uses(entry.digest),
                "running": entry.digest in running,
            }
            for entry in entries
        ]
        return {"adapters": adapters, "failures": list(switch.failures), "heldOut": switch.held_out}

    async def _use_adapter(self, arguments: list[Any]) -> dict[str, Any]:
        """`midfill.adapter.use`: the adapter that is named, in the workspace or where `arguments[1]` says.

        That is "workspace", "global", or the identifier of a language. Returns what is in use then.
        """
        name, where = (*arguments, None, None)[:2]
        if not isinstance(name, str) or not isinstance(where, str | None):
            raise Refusal(types.ErrorCodes.InvalidParams, "The arguments are a name and a place.")
        return await self._bind(name, where)

    async def _use_no_adapter(self, arguments: list[Any]) -> dict[str, Any]:
        """`midfill.adapter.off`: no adapter in the workspace, or where the argument says."""
        where = (*arguments, None)[0]
        if not isinstance(where, str | None):
            raise Refusal(types.ErrorCodes.InvalidParams, "The argument is a place.")
        return await self._bind(None, where)

    async def _bind(self, name: str | None, where: str | None) -> dict[str, Any]:
        switch = self._server.switch
        try:
            if self._server.state.completer.settings.adapter is not None:
                raise AdapterError("The adapter is chosen by the setting `adapter`; change it there.")
            await switch.bind(name, where or "workspace")
        except MidfillError as error:
            self.say(str(error), failed=True)
            return {"running": switch.name_for(None), "error": str(error)}
        return {"running": switch.name_for(None), "error": None}

    async def _train_adapter(self, arguments: list[Any]) -> dict[str, Any]:
        """`midfill.adapter.train`: learn an adapter from the history of the workspace's first folder.

        `arguments[0]` may be an object with `name` and `minutes`. Returns at once: the name, or why there is
        nothing to wait for. The user is asked then, and told how far it is, and what has come of it.
        """
        wanted = arguments[0] if arguments else {}
        if not isinstance(wanted, dict):
            raise Refusal(types.ErrorCodes.InvalidParams, "The argument is an object: `name`, `minutes`.")
        name, minutes = wanted.get("name"), wanted.get("minutes", _MINUTES)
        if not isinstance(name, str | None):
            raise Refusal(types.ErrorCodes.InvalidParams, "`name` is a string.")
        if type(minutes) not in {int, float} or not 0 < minutes <= _MOST_MINUTES:
            raise Refusal(types.ErrorCodes.InvalidParams, f"`minutes` is a number up to {_MOST_MINUTES}.")
        settings = self._server.state.completer.settings
        folder = next((path for _, path in self._server.folders()), None)
        try:
            job, model = await self.training.plan(folder, name, float(minutes), settings)
        except MidfillError as error:
            self.say(str(error), failed=True)
            return {"name": None, "error": str(error)}
        self._server.spawn(self.training.run(job, model, settings))
        return {"name": job.name, "error": None}

    def _stop_training(self, _: list[Any]) -> dict[str, bool]:
        """`midfill.adapter.stop`: end the training, with a checkpoint. Whether there was one."""
        return {"stopped": self.training.stop()}

    # What `training` needs of the editor.

    def say(self, sentence: str, *, failed: bool = False) -> None:
        """Show a sentence, as an error or not."""
        kind = types.MessageType.Error if failed else types.MessageType.Info
        self._server.window_show_message(types.ShowMessageParams(kind, f"midfill: {sentence}"))

    def progress(self, title: str, outcome: Callable[[], str], cancel: Callable[[], None]) -> Progress:
        """See `Progress`."""
        return Progress(self._server, title, outcome, cancel)

    async def ask(self, question: str, answers: tuple[str, ...]) -> str | None:
        """Have the user choose; None if the user does not, or the client cannot ask."""
        actions = [types.MessageActionItem(answer) for answer in answers]
        params = types.ShowMessageRequestParams(types.MessageType.Info, printable(question), actions)
        try:
            # The protocol gives results as they came.
            chosen: Any = await self._server.window_show_message_request_async(params)
        except Exception:  # noqa: BLE001 - a client that cannot ask has not agreed
            return None
        title = chosen.get("title") if isinstance(chosen, dict) else None
        return title if isinstance(title, str) else None

    async def ask_for_adapter(self, asked: AskedFor) -> bool | None:
        """Ask the user whether a workspace may have the adapter that its file asks for."""
        judgement = asked.entry.judgement
        verdict = "not judged" if judgement.verdict == "none" else f"judged {judgement.verdict}"
        question = (
            f"midfill: the workspace {asked.workspace.name} asks for your adapter {asked.entry.name} "
            f"({verdict}). Use it there?"
        )
        chosen = await self.ask(question, (_AGREE, _REFUSE))
        return {_AGREE: True, _REFUSE: False}.get(chosen or "")

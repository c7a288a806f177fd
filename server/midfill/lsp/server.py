"""The LSP edge: requests and notifications to snapshots, answers to items.

With `protocol`, `progress`, `items` and `commands` the only code that knows pygls and lsprotocol. Handlers
take their snapshot before the first `await`; everything after that is the completer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lsprotocol import types
from pygls.lsp.server import LanguageServer

from midfill import __version__
from midfill.completion import calibrations
from midfill.completion.answer import Answer, Trigger
from midfill.completion.autoclose import auto_closing_changes
from midfill.completion.completer import Completer
from midfill.completion.context.ignore import IGNORE_FILES
from midfill.completion.reasons import Reason
from midfill.completion.stats import acceptance as feedback
from midfill.completion.stats.acceptance import AcceptanceTracker
from midfill.completion.stats.request_log import InstrumentedEngine, RequestStats
from midfill.engine.api import Engine
from midfill.errors import EngineUnavailableError, MidfillError
from midfill.fim.probing import identify
from midfill.lsp.adapter_routing import Switch
from midfill.lsp.commands import ACCEPTED, Commands
from midfill.lsp.items import PopupStyle, inline_item, popup_item, with_selected
from midfill.lsp.messages import (
    OWN_CLIENT,
    Asked,
    Edited,
    NotebookChanged,
    NotebookClosed,
    NotebookOpened,
    Opened,
)
from midfill.lsp.progress import Progress
from midfill.lsp.protocol import Protocol
from midfill.models.store import find as find_model
from midfill.settings import Settings, keep_start_only, merge
from midfill.system import last_request
from midfill.system import malloc as heap
from midfill.system.printable import printable
from midfill.text import secret_shapes
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot
from midfill.text.languages import SUFFIXES
from midfill.text.notebooks import Notebooks
from midfill.text.uris import file_of

_LOG = logging.getLogger(__name__)

_TRIM_CHARS = 16_000_000
# Of cells that are edited at once, the last so many may have brackets that were closed by the editor.
_CELLS_CLOSING = 4

# A served engine that is away at the start is asked again after such pauses.
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0

T = TypeVar("T")


@dataclass(slots=True)
class _State:
    """Everything that changes while the server runs; only the event loop touches it."""

    completer: Completer
    costs: RequestStats = field(default_factory=RequestStats)
    documents: dict[str, Document] = field(default_factory=dict)
    places: dict[str, Point] = field(default_factory=dict)
    notebooks: Notebooks = field(default_factory=Notebooks)
    flights: dict[tuple[str, str], asyncio.Task[Any]] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    engine: Engine | None = None
    encoding: Encoding = Encoding.UTF16
    popup_style: PopupStyle = field(default_factory=PopupStyle)
    started: bool = False
    said: set[str] = field(default_factory=set)
    num_chars_closed: int = 0
    journal: AcceptanceTracker = field(init=False)
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.journal = AcceptanceTracker(self.documents)


class MidfillServer(LanguageServer):
    """The language server.

    Args:
        settings: the user's own, before the editor adds its own.
        make_engine: makes the engine when the settings are complete; may be slow, runs in a thread.
    """

    protocol: Protocol

    def __init__(self, settings: Settings, make_engine: Callable[[Settings], Engine]) -> None:
        # Notebooks of every kind, cells of every language.
        notebooks = types.NotebookDocumentSyncOptions([types.NotebookDocumentFilterWithNotebook("*")])
        super().__init__("midfill", __version__, protocol_cls=Protocol, notebook_document_sync=notebooks)
        self._own_settings = settings
        self._make_engine = make_engine
        self.state = _State(Completer(settings))
        self.switch = Switch(self._say, self.state.completer.drop_work)
        self.state.completer.adapter_of = self.switch.adapter_of
        self._commands = Commands(self)
        self.switch.ask = self._commands.ask_for_adapter
        self._register()

    def _register(self) -> None:
        features: list[tuple[str, Callable[[Any], Any], Any]] = [
            (types.INITIALIZE, self.initialize, None),
            (types.INITIALIZED, self.initialized, None),
            (types.TEXT_DOCUMENT_DID_OPEN, self.did_open, None),
            (types.TEXT_DOCUMENT_DID_CHANGE, self.did_change, None),
            (types.TEXT_DOCUMENT_DID_CLOSE, self.did_close, None),
            (types.TEXT_DOCUMENT_DID_SAVE, self.did_save, types.SaveOptions(include_text=False)),
            (types.NOTEBOOK_DOCUMENT_DID_OPEN, self.did_open_notebook, None),
            (types.NOTEBOOK_DOCUMENT_DID_CHANGE, self.did_change_notebook, None),
            (types.NOTEBOOK_DOCUMENT_DID_CLOSE, self.did_close_notebook, None),
            (types.WORKSPACE_DID_CHANGE_CONFIGURATION, self.did_change_configuration, None),
            (types.WORKSPACE_DID_CHANGE_WORKSPACE_FOLDERS, self.did_change_folders, None),
            (types.WORKSPACE_DID_CHANGE_WATCHED_FILES, self.did_change_files, None),
            (
                types.TEXT_DOCUMENT_INLINE_COMPLETION,
                self.inline_completion,
                # pygls advertises the feature only if it is given options.
                types.InlineCompletionOptions(),
            ),
            (
                types.TEXT_DOCUMENT_COMPLETION,
                self.completion,
                types.CompletionOptions(resolve_provider=False),
            ),
            (
                types.WORKSPACE_EXECUTE_COMMAND,
                self._commands.execute,
                types.ExecuteCommandOptions(self._commands.names),
            ),
            *((method, answer, None) for method, answer in self._commands.requests.items()),
        ]
        for name, handler, options in features:
            self.feature(name, options)(_plain(handler))

    # Life cycle

    def initialize(self, params: types.InitializeParams) -> None:
        """Take the editor's settings; the model is loaded after `initialized`."""
        # lsprotocol gives a member or a bare string, pygls has chosen one that both sides know.
        encoding = self.protocol.workspace.position_encoding
        self.state.encoding = Encoding(types.PositionEncodingKind(encoding).value)
        self._apply_settings(params.initialization_options)
        self.state.popup_style = PopupStyle.of(params)
        # What our own demo and measurements accept is no one's opinion.
        self.state.journal.counts = params.client_info is None or params.client_info.name != OWN_CLIENT
        if isinstance(params.process_id, int) and params.process_id > 0:
            self.spawn(self.protocol.watch_editor(params.process_id))

    def initialized(self, _: types.InitializedParams) -> None:
        """Start to load the model and to index the workspace, once."""
        if not self.state.started:
            self.state.started = True
            self.spawn(self._load())
            self._open_folders()
            self.spawn(self._watch_files())

    async def run(self, stdin: int, stdout: int) -> int:
        """Serve until the end and free the model. Returns the exit status."""
        try:
            return await self.protocol.serve(stdin, stdout)
        finally:
            for task in self.state.background:
                task.cancel()
            self._commands.training.stop()
            self.state.completer.drop_work()
            self.state.journal.end()
            self.state.completer.context.close()
            if self.state.engine is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.state.engine.close(), timeout=2)

    async def _load(self) -> None:
        """Load the model. One that others serve may be away for a while, and is tried again."""
        pause_s = _FIRST_PAUSE_S
        while not await self._load_once():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _load_once(self) -> bool:
        """Load the model and say how it goes; the server stays. Returns whether that was the last time."""
        settings = self.state.completer.settings
        begun = time.monotonic()
        completer = self.state.completer

        def outcome() -> str:
            return "ready" if completer.failure is None else "failed"

        async with Progress(self, f"midfill: {settings.model}", outcome) as report:
            try:
                engine = await asyncio.to_thread(self._make_engine, settings)
                self.state.engine = engine
                await asyncio.gather(engine.start(report), asyncio.to_thread(secret_shapes.prepare))
                family = await identify(engine, settings.family)
                await self._calibrate(engine.model.name)
                self.state.completer.use(InstrumentedEngine(engine, self.state.costs), family)
                self.spawn(self._start_adapters(engine))
                for uri in self.state.documents:
                    self._rest(uri)
                # What has been imported and loaded stays; a collection that walks over it would cost a
                # key that is just being answered tens of milliseconds.
                gc.freeze()
                # Reading a vocabulary takes 90 MB, which the C library would keep.
                heap.trim()
            except EngineUnavailableError as error:
                self._load_failed(str(error))
                if self.state.engine is not None:
                    await self.state.engine.close()
                return False
            except MidfillError as error:
                self._load_failed(str(error))
            except Exception as error:  # noqa: BLE001 - the server stays up, whatever a model does
                _LOG.exception("loading the model failed")
                self._load_failed(f"The model cannot be loaded ({type(error).__name__}). The log says more.")
            else:
                model = engine.model
                _LOG.info(
                    "serving %s (%s, %s) after %.1f s",
                    model.name,
                    model.device,
                    model.dtype,
                    time.monotonic() - begun,
                )
        return True

    async def _calibrate(self, model: str) -> None:
        """Judge suggestions by the user's own calibration for the model, if there is one."""
        found = await asyncio.to_thread(calibrations.in_use, model)
        self.state.completer.calibration = found.calibration
        if found.problem:
            _LOG.warning("%s", found.problem)
            self._say(found.problem)

    async def _start_adapters(self, engine: Engine) -> None:
        """Use the adapters that are bound, unless the user has named one for everything."""
        settings = self.state.completer.settings
        if settings.adapter is None:
            if settings.adapter_holdout:
                # An editor that starts its server anew may go on in the same session.
                self.state.journal.session = session = os.environ.get("MIDFILL_SESSION") or uuid.uuid4().hex
                self.switch.held_out = feedback.is_held_out(session)
            name = engine.model.name if settings.engine_urls else settings.model
            model = await asyncio.to_thread(find_model, name)
            folders = [path for _, path in self.folders()]
            await self.switch.start(engine, model, folders, served=bool(settings.engine_urls))

    def window_show_message(self, params: types.ShowMessageParams) -> None:
        """Show a message, of which nothing is left that is not printable."""
        super().window_show_message(types.ShowMessageParams(params.type, printable(params.message)))

    def _say(self, sentence: str) -> None:
        message = types.ShowMessageParams(types.MessageType.Warning, f"midfill: {sentence}")
        self.window_show_message(message)

    def _load_failed(self, why: str) -> None:
        self.state.completer.fail(why)
        if why in self.state.said:
            return
        self.state.said.add(why)
        _LOG.error("%s", why)
        self.window_show_message(types.ShowMessageParams(types.MessageType.Error, f"midfill: {why}"))

    def spawn(self, coroutine: Awaitable[None]) -> None:
        """Do something in the background, until the server ends."""
        task = asyncio.ensure_future(coroutine)
        self.state.background.add(task)
        task.add_done_callback(self.state.background.discard)

    # Settings

    def did_change_configuration(self, params: types.DidChangeConfigurationParams) -> None:
        """Take new settings. Those that only count at the start stay as they are."""
        self._apply_settings(params.settings, started=self.state.started)

    def _apply_settings(self, values: Any, *, started: bool = False) -> None:
        if isinstance(values, dict) and isinstance(values.get("midfill"), dict):
            values = values["midfill"]
        settings, problems = merge(values, self.state.completer.settings, self._own_settings)
        if started:
            settings, later = keep_start_only(settings, self.state.completer.settings)
            problems += later
        try:
            self.state.completer.configure(settings)
        except MidfillError as error:
            problems.append(str(error))
        for problem in problems:
            _LOG.warning("%s", problem)
        if problems:
            message = "midfill: " + " ".join(problems)
            self.window_show_message(types.ShowMessageParams(types.MessageType.Warning, message))

    # Workspace

    def did_change_folders(self, _: types.DidChangeWorkspaceFoldersParams) -> None:
        """Folders came or went; the protocol has noted which."""
        if self.state.started:
            self._open_folders()

    def did_change_files(self, params: types.DidChangeWatchedFilesParams) -> None:
        """Files of the workspace were written, made or deleted."""
        self.state.completer.context.files_changed([change.uri for change in params.changes])

    def folders(self) -> list[tuple[str, Path]]:
        """The folders of the workspace, with their names."""
        workspace = self.protocol.workspace
        named = [(folder.name, folder.uri) for folder in workspace.folders.values()]
        if not named and workspace.root_uri:
            # Older clients name one folder only.
            named = [("", workspace.root_uri)]
        return [(name, path) for name, uri in named if (path := file_of(uri)) is not None]

    def _open_folders(self) -> None:
        folders = self.folders()
        self.state.completer.context.open_folders(folders)
        if self.switch.started:
            self.spawn(self.switch.open_folders([path for _, path in folders]))

    async def _watch_files(self) -> None:
        """Ask the client to tell of changed files, if it can: nothing is polled."""
        workspace = self.client_capabilities.workspace
        watching = workspace.did_change_watched_files if workspace else None
        if watching is None or not watching.dynamic_registration:
            return
        patterns = [*(f"**/*{suffix}" for suffix in SUFFIXES), *(f"**/{name}" for name in IGNORE_FILES)]
        options = types.DidChangeWatchedFilesRegistrationOptions(
            [types.FileSystemWatcher(pattern) for pattern in patterns]
        )
        method = types.WORKSPACE_DID_CHANGE_WATCHED_FILES
        # A client that refuses tells nothing, and is served as well.
        with contextlib.suppress(Exception):
            await self.client_register_capability_async(
                types.RegistrationParams([types.Registration(f"midfill-{uuid.uuid4()}", method, options)])
            )

    # Documents

    def did_open(self, opened: Opened) -> None:
        """Start a document."""
        self._open(opened)
        self._rest(opened.uri)

    def _open(self, opened: Opened) -> None:
        document = Document.open(opened.uri, opened.language_id, opened.version, opened.text)
        self.state.documents[opened.uri] = document
        self.state.completer.context.opened(document)

    def did_change(self, edited: Edited) -> None:
        """Apply edits. Changes of a document that is not open are dropped: there is nothing to change."""
        self._change(edited)
        self._rest(edited.uri)

    def _change(self, edited: Edited, *, closes: bool = True) -> None:
        """Apply edits; with `closes`, look for what the editor has closed by itself among them."""
        document = self.state.documents.get(edited.uri)
        if document is None:
            _LOG.warning("dropped a change of a document that is not open")
            return
        version = document.version if edited.version is None else edited.version
        after, done = document, 0
        for at in auto_closing_changes(edited.changes) if closes else ():
            after = after.edit(edited.changes[done:at], version, self.state.encoding)
            self._closing(after, edited.changes[at])
            done = at
        after = after.edit(edited.changes[done:], version, self.state.encoding)
        self.state.documents[edited.uri] = after
        self.state.completer.context.edited(document, after)
        if self.state.completer.computes(edited.uri):
            # Joining all cells of a notebook takes a moment, and all its cells may be edited at once.
            whole = self.state.notebooks.whole(Snapshot(after, Point(0, 0)), self.state.documents)
            self.state.completer.edited(whole.document)
        self.state.journal.edit(document, after, edited.changes, self.state.encoding)
        if edited.changes and edited.changes[-1].start is not None:
            self.state.places[edited.uri] = after.end_of(edited.changes[-1], self.state.encoding)

    def _closing(self, document: Document, change: Change) -> None:
        """What a change puts in may in part come from the editor."""
        before = Snapshot(document, document.point(change.start or (0, 0), self.state.encoding))
        self.state.completer.before_auto_close(self.state.notebooks.whole(before, self.state.documents))

    def did_save(self, params: types.DidSaveTextDocumentParams) -> None:
        """Whoever saves rests for a moment."""
        self._rest(params.text_document.uri)

    def _rest(self, uri: str) -> None:
        """Let the model get ready for the place where the user last was, at first the end of the text."""
        if self.switch.is_due():
            self.spawn(self.switch.update())
        if (document := self.state.documents.get(uri)) is not None:
            end = Point(len(document.lines) - 1, len(document.lines[-1]))
            place = document.clamp(self.state.places.get(uri, end))
            self.state.completer.on_idle(
                self.state.notebooks.whole(Snapshot(document, place), self.state.documents)
            )

    def did_close(self, uri: str) -> None:
        """Forget a document and cancel what is computed for it."""
        self._close(uri)

    def did_open_notebook(self, opened: NotebookOpened) -> None:
        """Start a notebook and the documents of its cells."""
        for text in opened.texts:
            self._open(text)
        self.state.notebooks.open(opened.uri, opened.cells)

    def did_change_notebook(self, changed: NotebookChanged) -> None:
        """Move, close, open and edit cells."""
        if changed.splice is not None:
            self.state.notebooks.splice(changed.uri, *changed.splice)
        for uri in changed.closed:
            self._close(uri)
        for text in changed.opened:
            self._open(text)
        # The user is in one cell; the others were edited along with it.
        first_closing = len(changed.edits) - _CELLS_CLOSING
        for at, edited in enumerate(changed.edits):
            self._change(edited, closes=at >= first_closing)
        if changed.edits:
            self._rest(changed.edits[-1].uri)

    def did_close_notebook(self, closed: NotebookClosed) -> None:
        """Forget a notebook and its cells, those too that the client does not name."""
        for uri in {*self.state.notebooks.close(closed.uri), *closed.cells}:
            self._close(uri)

    def _close(self, uri: str) -> None:
        document = self.state.documents.pop(uri, None)
        self.state.places.pop(uri, None)
        self.state.num_chars_closed += document.num_chars if document else 0
        if self.state.num_chars_closed > _TRIM_CHARS:
            self.state.num_chars_closed = 0
            heap.trim()
        self.state.answers.pop(uri, None)
        self.state.journal.close(uri)
        self.state.completer.forget(uri)
        for key in [key for key in self.state.flights if key[0] == uri]:
            self.state.flights.pop(key).cancel()

    # Suggestions

    def inline_completion(self, asked: Asked) -> Awaitable[dict[str, Any]]:
        """`textDocument/inlineCompletion`: ghost text."""
        snapshot = self._snapshot(asked)
        trigger = Trigger.INVOKED if asked.invoked else Trigger.AUTOMATIC
        selected = asked.selected
        if snapshot is not None and selected is not None:
            snapshot = with_selected(snapshot, selected, self.state.encoding)
        inline = self._inline(snapshot, self._whole(snapshot), trigger, selected)
        return self._newest("inline", asked.uri, inline)

    async def _inline(
        self, snapshot: Snapshot | None, whole: Snapshot | None, trigger: Trigger, selected: Change | None
    ) -> dict[str, Any]:
        answer = await self._answer(whole, trigger)
        if snapshot is None or not answer.text:
            return {"items": []}
        command = self._offer(snapshot, answer)
        return {"items": [inline_item(snapshot, answer, self.state.encoding, selected, command)]}

    def completion(self, asked: Asked) -> Awaitable[types.CompletionList]:
        """`textDocument/completion`: the same suggestion as an item of the popup."""
        snapshot = self._snapshot(asked)
        work = self._newest("popup-work", asked.uri, self._answer(self._whole(snapshot), Trigger.AUTOMATIC))
        return self._newest("popup", asked.uri, self._popup(snapshot, work))

    async def _popup(self, snapshot: Snapshot | None, work: asyncio.Task[Answer]) -> types.CompletionList:
        """The item, if there is one in time. What is late is computed on, and found at the next key."""
        try:
            await asyncio.wait([work], timeout=self.state.completer.settings.popup_budget_ms / 1000)
        except asyncio.CancelledError:
            work.cancel()
            raise
        answer = await work if work.done() else Answer()
        items = []
        if snapshot is not None and answer.text:
            command = self._offer(snapshot, answer)
            item = popup_item(snapshot, answer, self.state.encoding, command, self.state.popup_style)
            items = [item] if item is not None else []
        # What is typed next changes the suggestion, so the editor has to ask again.
        return types.CompletionList(is_incomplete=True, items=items)

    def _offer(self, snapshot: Snapshot, answer: Answer) -> types.Command | None:
        """The command of a suggestion's item, by which the editor says that it was accepted."""
        engine = self.state.engine
        if engine is None or not self.state.completer.settings.count_feedback:
            return None
        adapter = self.switch.name_for(snapshot.document) or engine.model.adapter
        model = feedback.key_of(engine.model.name, adapter, held_out=self.switch.held_out)
        id_ = self.state.journal.shown(
            snapshot.document, snapshot.cursor, answer.text, model, answer.num_replaced
        )
        return None if id_ is None else types.Command("midfill: accepted", ACCEPTED, arguments=[id_])

    async def _answer(self, snapshot: Snapshot | None, trigger: Trigger) -> Answer:
        if snapshot is None:
            _LOG.info("empty answer: %s", Reason.NOT_OPEN)
            return Answer(reason=Reason.NOT_OPEN)
        if last_request.is_due():
            # By a thread: the folder may be on a slow disk.
            asyncio.get_running_loop().run_in_executor(None, last_request.mark)
        answer = await self.state.completer.complete(snapshot, trigger)
        self.state.costs.answered(answer.source, answer.reason, answer.latency_ms)
        if snapshot.document.uri in self.state.documents:
            self.state.answers.pop(snapshot.document.uri, None)
            self.state.answers[snapshot.document.uri] = answer
        if answer.reason is Reason.ENGINE_UNAVAILABLE and answer.detail not in self.state.said:
            self.state.said.add(answer.detail)
            message = f"midfill: {answer.detail}"
            self.window_show_message(types.ShowMessageParams(types.MessageType.Warning, message))
        _LOG.info(
            "%s %s in %.1f ms (prompt %d, reused %d, generated %d tokens)",
            answer.source,
            answer.reason or "",
            answer.latency_ms,
            answer.num_prompt,
            answer.num_reused,
            answer.num_generated,
        )
        return answer

    def _newest(self, kind: str, uri: str, work: Awaitable[T]) -> asyncio.Task[T]:
        """Run `work`; a newer request of the same kind for the same document cancels it.

        What the model does for it goes on if the newer one can use it: see `suggestions`.
        """
        key = (uri, kind)
        if (older := self.state.flights.get(key)) is not None:
            older.cancel()
        task: asyncio.Task[T] = asyncio.ensure_future(work)
        self.state.flights[key] = task
        task.add_done_callback(lambda done: self._landed(key, done))
        return task

    def _landed(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        if self.state.flights.get(key) is task:
            del self.state.flights[key]

    def _snapshot(self, asked: Asked) -> Snapshot | None:
        document = self.state.documents.get(asked.uri)
        if document is None:
            return None
        place = document.point(asked.position, self.state.encoding)
        self.state.places[asked.uri] = place
        return Snapshot(document, place)

    def _whole(self, snapshot: Snapshot | None) -> Snapshot | None:
        """What the model sees of a snapshot: all of the notebook, if it is of a cell."""
        return None if snapshot is None else self.state.notebooks.whole(snapshot, self.state.documents)


def serve(
    settings: Settings,
    make_engine: Callable[[Settings], Engine],
    tap: Callable[[str, bytes], None] | None = None,
) -> int:
    """Serve this process's stdin and stdout. Returns the exit status.

    `tap` is given every message body with its sender: see `Protocol`.
    Nothing else may write to the real stdout: what libraries print goes to stderr. Threads may still
    run when it returns, so the caller has to end the process.
    """
    # A busy engine thread otherwise keeps the interpreter from the event loop for 5 ms at a time.
    sys.setswitchinterval(0.0005)
    stdin = os.dup(0)
    stdout = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    os.set_inheritable(stdin, False)
    os.set_inheritable(stdout, False)
    # Not `asyncio.run`: it waits for every thread at the end, one that imports torch or loads too.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = MidfillServer(settings, make_engine)
    server.protocol.tap = tap
    return loop.run_until_complete(server.run(stdin, stdout))


def _plain(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function around a method: pygls sets attributes on handlers, which bound methods refuse."""

    def handler(params: Any) -> Any:
        return method(params)

    return handler

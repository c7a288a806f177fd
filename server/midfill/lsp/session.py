"""The state of one server: what its handlers read and change.

Every handler gets the `Session` as its first argument. Only the event loop touches it. A handler of a request
takes an immutable snapshot (`Session.snapshot`) before its first `await` and works on that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from midfill.completion.answer import Answer
from midfill.completion.completer import Completer
from midfill.completion.stats.acceptance import AcceptanceTracker
from midfill.completion.stats.request_log import RequestStats
from midfill.engine.api import Engine
from midfill.lsp.adapter_routing import AdapterRouter
from midfill.lsp.editor import EditorConnection
from midfill.lsp.items import PopupStyle
from midfill.lsp.known_clients import ANY_CLIENT
from midfill.lsp.train_command import AdapterTraining
from midfill.settings import Settings
from midfill.text.documents import Document, Encoding, Point, Snapshot
from midfill.text.notebooks import Notebooks

T = TypeVar("T")

_CLOSE_S = 2.0


class Session:
    """Everything that changes while the server runs.

    Args:
        settings: the user's own, before the editor adds its own.
        make_engine: makes the engine when the settings are complete; may be slow, so it runs in a thread.
        editor: the client.

    Attributes:
        own_settings: the settings of the user's file and command line.
        completer: answers requests; holds the settings in force.
        engine: what runs the model; None until it has been made.
        documents: the open documents, by URI.
        cursors: where the user last was in a document, by URI.
        answers: the last answer of each open document, by URI; the newest is last.
        acceptance: counts which suggestions are accepted.
        client: how the server answers this client.
        encoding: how the client counts columns.
        model_missing: the model could not be loaded, because it has not been downloaded.
        initialized: the client has sent `initialized`, so the settings that need a restart are fixed.
        num_chars_closed: size of the documents that were closed since the last trim of the heap.
    """

    def __init__(
        self, settings: Settings, make_engine: Callable[[Settings], Engine], editor: EditorConnection
    ) -> None:
        self.own_settings = settings
        self.make_engine = make_engine
        self.editor = editor
        self.router = AdapterRouter(editor, on_change=self._drop_work)
        self.completer = Completer(settings, adapter_of=self.router.adapter_of)
        self.training = AdapterTraining(editor, use=partial(self.router.bind, where="workspace"))
        self.engine: Engine | None = None
        self.costs = RequestStats()
        self.documents: dict[str, Document] = {}
        self.cursors: dict[str, Point] = {}
        self.notebooks = Notebooks()
        self.answers: dict[str, Answer] = {}
        self.acceptance = AcceptanceTracker(self.documents)
        self.client = ANY_CLIENT
        self.encoding = Encoding.UTF16
        self.popup_style = PopupStyle()
        self.model_missing = False
        self.initialized = False
        self.num_chars_closed = 0
        self._shown: set[str] = set()
        self._newest: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._background: set[asyncio.Task[None]] = set()

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.completer.settings

    @property
    def popup_budget_s(self) -> float | None:
        """The time that a popup waits for the model; None: until it has answered. The user's setting wins."""
        own = self.settings.popup_budget_ms
        budget_ms = self.client.popup_budget_ms if own is None else own
        return None if budget_ms is None else budget_ms / 1000

    def _drop_work(self) -> None:
        self.completer.drop_work()

    # Snapshots

    def snapshot(self, uri: str, position: tuple[int, int]) -> Snapshot | None:
        """Return the document with its cursor at an LSP position, and remember the cursor.

        None if the document is not open. Call it before the first `await` of a handler.
        """
        document = self.documents.get(uri)
        if document is None:
            return None
        cursor = document.point(position, self.encoding)
        self.cursors[uri] = cursor
        return Snapshot(document, cursor)

    def whole(self, snapshot: Snapshot) -> Snapshot:
        """Return what the model sees of a snapshot: the whole notebook, if it is of a cell.

        Call it before the first `await` of a handler, too: other cells change.
        """
        return self.notebooks.whole(snapshot, self.documents)

    def schedule_idle_work(self, uri: str) -> None:
        """Let the model prepare, if the user pauses, for the last cursor (at first: the end of the text)."""
        if self.router.is_due():
            self.spawn(self.router.update())
        if (document := self.documents.get(uri)) is not None:
            end = Point(len(document.lines) - 1, len(document.lines[-1]))
            cursor = document.clamp(self.cursors.get(uri, end))
            self.completer.on_idle(self.whole(Snapshot(document, cursor)))

    # Tasks

    def run_newest(self, kind: str, uri: str, work: Awaitable[T]) -> asyncio.Task[T]:
        """Run `work` as a task; a newer request of the same kind for the same document cancels it.

        What the model computes for it continues if the newer request can use it (see `completion.in_flight`).
        """
        key = (uri, kind)
        if (older := self._newest.get(key)) is not None:
            older.cancel()
        task: asyncio.Task[T] = asyncio.ensure_future(work)
        self._newest[key] = task
        task.add_done_callback(lambda done: self._forget(key, done))
        return task

    def cancel_requests(self, uri: str) -> None:
        """Cancel what runs for a document."""
        for key in [key for key in self._newest if key[0] == uri]:
            self._newest.pop(key).cancel()

    def _forget(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        if self._newest.get(key) is task:
            del self._newest[key]

    def spawn(self, coroutine: Awaitable[None]) -> None:
        """Run a coroutine in the background; it is cancelled when the server ends."""
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Messages

    def should_show(self, message: str) -> bool:
        """Return whether a message is new, so that the user sees each one once. Remembers it."""
        if message in self._shown:
            return False
        self._shown.add(message)
        return True

    # The end

    async def close(self) -> None:
        """Cancel all work, write the acceptance counts and free the model."""
        for task in self._background:
            task.cancel()
        self.training.stop()
        self.completer.drop_work()
        self.acceptance.end()
        self.completer.context.close()
        if self.engine is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.engine.close(), timeout=_CLOSE_S)

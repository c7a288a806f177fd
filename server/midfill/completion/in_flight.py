r"""In-flight completions: suggestions that are being computed.

An in-flight completion belongs to no request: requests wait for it, and may come and go. It continues while a
request waits, and a moment longer, so that the next request can join it. It is cancelled at once when the
text contradicts it.

Knows texts and positions, nothing of prompts or LSP; the caller's `work` computes. All texts have \n. Runs on
the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from midfill.completion.autoclose import agrees
from midfill.completion.cache import Computed, Match, Suggestion, SuggestionCache, fits_trigger
from midfill.completion.origin import HashedText, Origin
from midfill.engine.api import Request
from midfill.text.documents import Document, Snapshot

LINGER_S = 0.25
"""How long an in-flight completion continues without a waiting request: editors cancel a request at a key,
and ask again some 50 to 100 ms later."""


class InFlightCompletion:
    """A suggestion that is being computed.

    Args:
        base: a position in the text as it was at launch.
        assumed: text that is assumed to be inserted there, as if it had been accepted; "" unless prefetching.
        origin: the position that the suggestion is for: `base`, with `assumed` inserted.
        explicit: the user asked for it.

    Attributes:
        text: what the model has written so far; the work updates it by `push`.
        waiters: the waiting requests, with the text inserted at the origin in their documents.
    """

    def __init__(self, base: Origin, assumed: str, origin: Origin, *, explicit: bool) -> None:
        self.base = base
        self.assumed = assumed
        self.origin = origin
        self.explicit = explicit
        self.text = ""
        self.waiters: dict[asyncio.Future[Match | None], tuple[str, str]] = {}
        self.task: asyncio.Task[Computed] | None = None
        self._inserted = ""
        self._request: Request | None = None
        self._linger: asyncio.TimerHandle | None = None

    @property
    def awaited(self) -> bool:
        """Whether a request waits."""
        return bool(self.waiters)

    @property
    def ending(self) -> bool:
        """Whether it is being cancelled, so that no request can use it."""
        return self.task is not None and self.task.cancelling() > 0

    def run_as(self, request: Request) -> None:
        """Name the engine's request, which has idle priority while no completion request waits."""
        self._request = request
        request.set_idle(not self.awaited)

    def push(self, text: str) -> None:
        """Take all that the model has written so far. Requests that it contradicts get None from `wait`."""
        self.text = text
        for waiter, (typed, closed) in list(self.waiters.items()):
            if not waiter.done() and not agrees(typed + closed, text):
                waiter.set_result(None)
        if not agrees(self._inserted, self.assumed + text):
            self.cancel()

    def follow(self, document: Document) -> bool:
        """Compare with the edited document: cancel if that contradicts it. Returns whether it continues."""
        inserted = self.base.inserted(HashedText(document))
        if inserted is None or not agrees(inserted[0], self.assumed + self.text):
            self.cancel()
            return False
        self._inserted = inserted[0]
        if self._linger is not None:
            self.linger()
        return True

    def serves(self, snapshot: Snapshot) -> bool:
        """Return whether it is, or may become, of use at a cursor."""
        inserted = self.base.inserted(HashedText(snapshot.document), snapshot.cursor)
        return inserted is not None and agrees("".join(inserted), self.assumed + self.text)

    async def wait(self, inserted: tuple[str, str]) -> Match | None:
        """Wait for the result.

        Args:
            inserted: the text inserted at the origin in the request's document, before and after the cursor.

        Returns:
            The result, or None once the model's text contradicts `inserted`.

        Raises:
            asyncio.CancelledError: the newest text contradicts it, or the caller was cancelled.
        """
        waiter: asyncio.Future[Match | None] = asyncio.get_running_loop().create_future()
        self.waiters[waiter] = inserted
        self._stop_lingering()
        try:
            return await waiter
        finally:
            del self.waiters[waiter]
            if not self.awaited and self.task is not None and not self.task.done():
                self.linger()

    def linger(self) -> None:
        """Continue for `LINGER_S` although no request waits."""
        self._stop_lingering()
        self._linger = asyncio.get_running_loop().call_later(LINGER_S, self.cancel)

    def cancel(self) -> None:
        """Cancel the work at once, and the requests that wait for it."""
        if self.task is not None:
            self.task.cancel()

    def resolve(self, suggestion: Suggestion | None, error: BaseException | None = None) -> None:
        """Give the waiting requests the suggestion, or the error; with neither, cancel them."""
        if self._linger is not None:
            self._linger.cancel()
        for waiter, (typed, closed) in self.waiters.items():
            if waiter.done():
                continue
            if suggestion is not None:
                waiter.set_result(Match(suggestion, typed, closed))
            elif error is not None:
                waiter.set_exception(error)
            else:
                waiter.cancel()

    def _stop_lingering(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._request is not None:
            self._request.set_idle(not self.awaited)


Work = Callable[[InFlightCompletion], Awaitable[Computed]]


class InFlightCompletions:
    """All suggestions that are being computed.

    Args:
        cache: takes the results.
    """

    def __init__(self, cache: SuggestionCache) -> None:
        self._cache = cache
        self._running: list[InFlightCompletion] = []

    def launch(
        self, snapshot: Snapshot, work: Work, *, explicit: bool = False, ahead_of: Snapshot | None = None
    ) -> InFlightCompletion:
        """Begin to compute a suggestion at a cursor.

        Args:
            snapshot: the text without auto-closed brackets.
            work: computes the suggestion.
            explicit: the user asked for it.
            ahead_of: the present text, if `snapshot` is what it becomes when a suggestion is accepted.
        """
        origin = Origin.of(snapshot)
        base, assumed = origin, ""
        if ahead_of is not None:
            base = Origin.of(ahead_of)
            assumed = "".join(base.inserted(HashedText(snapshot.document), snapshot.cursor) or ())
        launched = InFlightCompletion(base, assumed, origin, explicit=explicit)
        launched.task = asyncio.ensure_future(work(launched))
        launched.task.add_done_callback(partial(self._finish, launched))
        self._running.append(launched)
        return launched

    def join(
        self, snapshot: Snapshot, *, explicit: bool
    ) -> tuple[InFlightCompletion, tuple[str, str]] | None:
        """Return the newest in-flight completion that agrees with the text, and what was inserted since."""
        text = HashedText(snapshot.document)
        for running in reversed(self._running):
            if running.ending or (explicit and not running.explicit):
                continue
            inserted = running.origin.inserted(text, snapshot.cursor)
            if inserted is None or not fits_trigger(
                inserted, made_explicit=running.explicit, explicit=explicit
            ):
                continue
            if agrees("".join(inserted), running.text):
                return running, inserted
        return None

    def edited(self, document: Document) -> None:
        """Cancel what a changed document contradicts."""
        for running in self._of(document.uri):
            running.follow(document)

    def computes(self, uri: str) -> bool:
        """Return whether something is being computed for a document."""
        return bool(self._of(uri))

    def moved(self, snapshot: Snapshot) -> None:
        """Cancel what no request waits for and is of no use at the cursor's new position."""
        for running in self._of(snapshot.document.uri):
            if not running.awaited and not running.serves(snapshot):
                running.cancel()

    def forget(self, uri: str) -> None:
        """Cancel everything for a document."""
        for running in self._of(uri):
            running.cancel()

    def clear(self) -> None:
        """Cancel everything that no request waits for. Waiting requests get answers, which are not cached."""
        for running in self._running:
            if not running.awaited:
                running.cancel()
        self._running.clear()

    def _of(self, uri: str) -> list[InFlightCompletion]:
        return [running for running in self._running if running.origin.uri == uri and not running.ending]

    def _finish(self, finished: InFlightCompletion, task: asyncio.Task[Computed]) -> None:
        is_current = finished in self._running
        if is_current:
            self._running.remove(finished)
        if task.cancelled():
            finished.resolve(None)
        elif (error := task.exception()) is not None:
            finished.resolve(None, error)
        else:
            computed = task.result()
            suggestion = Suggestion(
                finished.origin, computed, finished.explicit, is_prefetched=bool(finished.assumed)
            )
            if is_current and computed.lasting:
                self._cache.keep(suggestion)
            finished.resolve(suggestion)

"""Type recorded sessions into one or several backends in real time, and record the outcome of each request.

Requests follow a key as recorded, and are cancelled when the next key comes first. The virtual user is an
oracle: it accepts a suggestion at once if that leads to the text that it is going to type; the keys that this
saves are skipped.

Backends take turns by session, in rotating order, so that all get the same keys in the same minutes on the
same machine. `replay_report` computes the figures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from midfill.bench.backends import Backend, EngineJob, SuggestionRequest
from midfill.bench.trace import Key, TypingSession, total_s
from midfill.text.documents import Change, Document, Encoding

_PROBE = Document.open("file:///replay/probe.py", "python", 1, "def add(a, b):\n    return a ")
_PROBE_POSITION = (1, 13)
_PROBE_S = 10.0


@dataclass(slots=True)
class BackendRun:
    """The results of one backend.

    Attributes:
        name: the backend's name.
        requests: all requests, in order.
        jobs: the engine's work for them.
        num_sessions: typing sessions that were played.
        num_keys: keys that were reached, typed or skipped.
        num_skipped: keys that accepted suggestions made unnecessary.
        seconds: duration of the typing.
        begun_s: `time.monotonic` at the first key of all backends.
        startup_s: seconds from the start of the process until the model was loaded.
        first_suggestion_s: seconds from the start to a first suggestion, requested then; None without one.
        peak_rss_mb: peak memory.
        late_s: delay of each key in seconds; shows whether a machine can play many virtual users at once.
    """

    name: str = "midfill"
    requests: list[SuggestionRequest] = field(default_factory=list)
    jobs: list[EngineJob] = field(default_factory=list)
    num_sessions: int = 0
    num_keys: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    begun_s: float = 0.0
    startup_s: float = 0.0
    first_suggestion_s: float | None = None
    peak_rss_mb: float = 0.0
    late_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pace:
    """How sessions are played.

    Attributes:
        speed: factor by which to type faster than recorded.
        limit_s: maximum seconds of typing for each backend, if given.
        accepts: whether right suggestions are accepted; if not, they are typed through.
        looks_inside: whether to determine which requests are inside an earlier suggestion
            (`SuggestionRequest.inside`). That costs as much as a pipeline: too much for many virtual users in
            one process.
    """

    speed: float = 1.0
    limit_s: float | None = None
    accepts: bool = True
    looks_inside: bool = True


async def replay(
    sessions: Sequence[TypingSession],
    backends: Sequence[Backend],
    report: Callable[[str, float | None], None],
    pace: Pace | None = None,
) -> list[BackendRun]:
    """Start the backends, play the sessions to each of them, and end them; return a result for each.

    Raises `MidfillError` if one cannot load its model, or ends.
    """
    pace = pace or Pace()
    async with AsyncExitStack() as stack:
        runs = []
        for backend in backends:
            stack.push_async_callback(backend.end)
            runs.append(await _start(backend, report))
        expected_s = total_s(sessions) / pace.speed
        if pace.limit_s is not None:
            expected_s = min(expected_s, pace.limit_s)
        begun_s = time.monotonic()
        for run in runs:
            run.begun_s = begun_s
        for number, session in enumerate(sessions):
            if all(_over(run, pace) for run in runs):
                break
            for turn in range(len(runs)):
                index = (number + turn) % len(runs)
                if not _over(runs[index], pace):
                    done = sum(run.seconds for run in runs) / len(runs)
                    report("typing", min(1.0, done / expected_s) if expected_s else None)
                    await SessionPlayer(runs[index], backends[index], session, number, pace).run()
        for run, backend in zip(runs, backends, strict=True):
            run.peak_rss_mb = backend.peak_rss_mb()
        return runs


async def _start(backend: Backend, report: Callable[[str, float | None], None]) -> BackendRun:
    """Start a backend and request one suggestion, as after opening an editor."""
    run = BackendRun(backend.name)
    begun = time.monotonic()
    await backend.start(report)
    run.startup_s = time.monotonic() - begun
    backend.open(_PROBE)
    request = SuggestionRequest(-1, time.monotonic())
    answer = backend.ask(request, _PROBE, _PROBE_POSITION)
    await asyncio.wait({answer}, timeout=_PROBE_S)
    if request.text:
        run.first_suggestion_s = time.monotonic() - begun
    if not answer.done():
        request.cancelled_s = time.monotonic()
        backend.cancel(request)
    await backend.close(_PROBE)
    return run


def _over(run: BackendRun, pace: Pace) -> bool:
    return pace.limit_s is not None and run.seconds >= pace.limit_s


class SessionPlayer:
    """Plays one typing session to one backend."""

    def __init__(
        self, run: BackendRun, backend: Backend, session: TypingSession, number: int, pace: Pace
    ) -> None:
        self._run = run
        self._backend = backend
        self._session = session
        self._number = number
        self._speed = pace.speed
        self._accepts = pace.accepts
        self._looks_inside = pace.looks_inside
        self._begun_s = time.monotonic()
        left_s = None if pace.limit_s is None else pace.limit_s - run.seconds
        self._end_s = None if left_s is None else self._begun_s + left_s
        # The document after each key, to recognise right suggestions; and the document now.
        self._documents = session.documents() if pace.accepts else []
        self._document = Document.open(session.uri, session.language_id, 1, session.text)
        self._index = -1
        self._due_s = self._begun_s
        # When the editor will request a suggestion; the request that is being answered.
        self._ask_s: float | None = None
        self._pending: tuple[asyncio.Future[None], SuggestionRequest] | None = None
        # Earlier requests, each with its document and cursor.
        self._suggested: list[tuple[Document, tuple[int, int], SuggestionRequest]] = []

    async def run(self) -> None:
        """Open the document, type the keys, and close it."""
        session, run = self._session, self._run
        self._backend.open(self._document)
        while self._end_s is None or time.monotonic() < self._end_s:
            more = self._index + 1 < len(session.keys)
            gap_s = session.keys[self._index + 1].gap_s if more else session.rest_s
            next_s = self._due_s + gap_s / self._speed
            if (reached := await self._wait(next_s)) is not None:
                run.num_keys += reached - self._index
                run.num_skipped += reached - self._index
                self._accept(reached)
                continue
            self._cancel()
            if not more:
                break
            self._index += 1
            run.num_keys += 1
            run.late_s.append(time.monotonic() - next_s)
            self._due_s = next_s
            self._type(session.keys[self._index])
        self._cancel()
        run.seconds += time.monotonic() - self._begun_s
        run.num_sessions += 1
        run.jobs += await self._backend.close(self._document)

    async def _wait(self, until_s: float) -> int | None:
        """Wait for the next key, sending the request when due; return the key that a suggestion leads to."""
        if self._ask_s is not None and self._ask_s < until_s:
            await _sleep(self._ask_s)
            self._ask()
        self._ask_s = None
        if self._pending is not None:
            future, request = self._pending
            await asyncio.wait({future}, timeout=max(0.0, until_s - time.monotonic()))
            if self._accepts and request.text and (reached := self._leads_to(request.text)) is not None:
                return reached
        await _sleep(until_s)
        return None

    def _leads_to(self, text: str) -> int | None:
        """Return the index of the key after which the document equals that with `text` accepted now."""
        edited = self._documents[self._index].edit([self._insertion(text)], 0, Encoding.UTF16)
        for index in range(self._index + 1, len(self._documents)):
            document = self._documents[index]
            if document.num_chars == edited.num_chars and document.lines == edited.lines:
                return index
        return None

    def _insertion(self, text: str) -> Change:
        cursor = self._session.keys[self._index].cursor
        return Change(text, cursor, cursor)

    def _accept(self, reached: int) -> None:
        """Insert the suggestion, and continue typing after it."""
        if self._pending is None:
            return
        request = self._pending[1]
        request.accepted = True
        change = self._insertion(request.text)
        key = self._session.keys[reached]
        delay_s = self._session.keys[self._index].request_after_s
        self._index, self._pending = reached, None
        self._due_s = time.monotonic()
        self._type(Key(0.0, (change,), key.cursor, delay_s))

    def _type(self, key: Key) -> None:
        self._document = self._document.edit(key.changes, self._document.version + 1, Encoding.UTF16)
        self._backend.change(self._document, key.changes)
        self._ask_s = None if key.request_after_s is None else self._due_s + key.request_after_s / self._speed

    def _ask(self) -> None:
        """Send the request, and record when it is answered."""
        cursor = self._session.keys[self._index].cursor
        request = SuggestionRequest(
            self._number, time.monotonic(), inside=self._looks_inside and self._is_inside()
        )
        self._run.requests.append(request)
        if self._looks_inside:
            self._suggested.append((self._document, cursor, request))

        def note(_: asyncio.Future[None]) -> None:
            request.answered_s = time.monotonic()

        future = self._backend.ask(request, self._document, cursor)
        future.add_done_callback(note)
        self._pending = future, request

    def _is_inside(self) -> bool:
        """Return whether the text typed since an earlier request is the begin of its suggestion."""
        for document, cursor, request in self._suggested:
            size = self._document.num_chars - document.num_chars
            if not request.text or not 0 < size < len(request.text):
                continue
            typed = document.edit([Change(request.text[:size], cursor, cursor)], 0, Encoding.UTF16)
            if typed.lines == self._document.lines:
                return True
        return False

    def _cancel(self) -> None:
        """Cancel the pending request: the text has changed, or the session ends."""
        if self._pending is not None:
            future, request = self._pending
            if not future.done():
                request.cancelled_s = time.monotonic()
                self._backend.cancel(request)
        self._pending = None


async def _sleep(until_s: float) -> None:
    await asyncio.sleep(max(0.0, until_s - time.monotonic()))

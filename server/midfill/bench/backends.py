"""Systems under test of `midfill bench replay` and `load`: midfill's server, and others on the same weights.

A backend gets what an editor would send: documents, changes, a request at a cursor, a cancellation. It
records the outcome in the request. Times are `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from midfill.bench.baselines import GENERATE, BaselineProcess
from midfill.completion.answer import Answer, Trigger
from midfill.completion.autoclose import may_auto_close
from midfill.completion.completer import Completer
from midfill.completion.reasons import Reason
from midfill.completion.stats.request_log import REQUEST, InstrumentedEngine, RequestStats
from midfill.engine.api import Engine, Progress
from midfill.errors import MidfillError
from midfill.fim.templates import FAMILIES, Family
from midfill.lsp.client import SERVE_COMMAND, Client, ServerError
from midfill.models.store import LocalModel
from midfill.models.tokenizer import load_tokenizer
from midfill.settings import Settings
from midfill.system.measure import peak_rss_mb
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot

CANCELLED = -32800
OUTCOMES = ("accepted", "shown", "empty", "cancelled", "late", "failed")
"""Accepted; shown before the next key, but not accepted; answered without a suggestion; cancelled by the next
key; cancelled, but a result was sent nevertheless; answered with an error, or with nothing because the engine
failed."""

_FAILURES = frozenset(
    {
        Reason.LOADING,
        Reason.MODEL_FAILED,
        Reason.ENGINE_ERROR,
        Reason.ENGINE_UNAVAILABLE,
        Reason.DEADLINE,
    }
)
"""Reasons for an empty answer that are failures of the engine."""

_PATIENCE_S = 60.0
_POLL_S = 0.02


@dataclass(slots=True, eq=False)
class SuggestionRequest:
    """One request for a suggestion, and its outcome.

    Attributes:
        session: the number of the typing session.
        asked_s: when it was sent.
        id: the backend's id of it.
        cancelled_s: when it was cancelled; None if it was not.
        answered_s: when its answer came, also one that confirms the cancellation.
        text: the suggestion; "" for none.
        source: where the suggestion came from: "model", "none", or how it was reused; "" if not known.
        reason: why there is no suggestion, if known.
        detail: the engine's message about that, or "".
        code: the code of an error response; None if it was answered with a result.
        accepted: whether the virtual user accepted the suggestion.
        inside: whether the text is that of an earlier request plus a typed part of its suggestion.
    """

    session: int
    asked_s: float
    id: int = 0
    cancelled_s: float | None = None
    answered_s: float | None = None
    text: str = ""
    source: str = ""
    reason: str | None = None
    detail: str = ""
    code: int | None = None
    accepted: bool = False
    inside: bool = False

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`."""
        if self.accepted:
            return "accepted"
        if self.code == CANCELLED:
            return "cancelled"
        if self.code is not None or self.answered_s is None or self.reason in _FAILURES:
            return "failed"
        if self.cancelled_s is not None:
            return "late"
        return "shown" if self.text else "empty"

    @property
    def waited_ms(self) -> float:
        """Milliseconds from the request to its answer, or to its cancellation."""
        end_s = self.cancelled_s if self.cancelled_s is not None else self.answered_s
        return ((end_s if end_s is not None else self.asked_s) - self.asked_s) * 1000


@dataclass(frozen=True, slots=True)
class EngineJob:
    """The engine's work for a request, as far as the backend reports it; None is not reported.

    Attributes:
        session, request: session and id of the request that started it; -1 and None if none did.
        end: "finished", "stopped" (enough text), "cancelled" or "failed".
        idle: whether it was done ahead of a request.
        num_prompt, num_reused, num_computed: tokens of the prompt: all, from the cache, computed.
        num_generated: tokens that were generated, including those that were not read.
        num_delivered: tokens that were read, from `first_s` to `last_s`.
        submitted_s: when the engine got it.
        first_s, last_s: when the first and the last token were delivered.
        left_s: when it was no longer needed.
        freed_s: when the engine was free of it.
    """

    session: int
    request: int | None
    end: str
    idle: bool = False
    num_prompt: int | None = None
    num_reused: int | None = None
    num_computed: int | None = None
    num_generated: int | None = None
    num_delivered: int | None = None
    submitted_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    left_s: float | None = None
    freed_s: float | None = None


class Backend(Protocol):
    """A system under test. All methods are called on one event loop."""

    name: str

    async def start(self, report: Progress) -> None:
        """Load the model. Raises `MidfillError`."""
        ...

    def open(self, document: Document) -> None:
        """Open a document."""
        ...

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """Apply changes (positions in UTF-16), which lead to this document."""
        ...

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """Request a suggestion at a position (in UTF-16); done when `request` has its outcome."""
        ...

    def cancel(self, request: SuggestionRequest) -> None:
        """Cancel a request."""
        ...

    async def close(self, document: Document) -> list[EngineJob]:
        """Close a document; return the engine's work since it was opened, once the engine is free."""
        ...

    def peak_rss_mb(self) -> float:
        """Return the peak memory of the backend's process."""
        ...

    async def end(self) -> None:
        """End its process."""
        ...


class ServerBackend:
    """midfill's own server in a separate process, over pipes.

    Args:
        engine: the option --engine of `midfill serve`, for tests.
        options: settings.
    """

    name = "midfill"

    def __init__(self, engine: str | None = None, options: dict[str, Any] | None = None) -> None:
        self._command = [*SERVE_COMMAND, *(["--engine", engine] if engine else [])]
        # Do not count what the virtual user accepts as the user's acceptances.
        self._options = {"count_feedback": False} | (options or {})
        self._started: Client | None = None
        self._request: dict[int, SuggestionRequest] = {}
        self._futures: set[asyncio.Future[Any]] = set()
        self._known = 0

    async def start(self, report: Progress) -> None:
        """Start the server and load the model."""
        self._started = await Client.start(self._command)
        await self._started.load(self._options, lambda message: report(message, None))

    @property
    def _client(self) -> Client:
        if self._started is None:
            raise MidfillError("The server has not been started.")
        return self._started

    def open(self, document: Document) -> None:
        """Send `textDocument/didOpen`."""
        item = {
            "uri": document.uri,
            "languageId": document.language_id,
            "version": document.version,
            "text": document.text,
        }
        self._client.notify("textDocument/didOpen", {"textDocument": item})

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """Send `textDocument/didChange`."""
        edits = [
            {
                "range": {"start": lsp_position(change.start), "end": lsp_position(change.end)},
                "text": change.text,
            }
            for change in changes
        ]
        identifier = {"uri": document.uri, "version": document.version}
        self._client.notify("textDocument/didChange", {"textDocument": identifier, "contentChanges": edits})

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """Send `textDocument/inlineCompletion`."""
        params = {
            "textDocument": {"uri": document.uri},
            "position": lsp_position(position),
            "context": {"triggerKind": 2},
        }
        request.id, future = self._client.send_request("textDocument/inlineCompletion", params)
        self._request[request.id] = request
        filled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def fill(done: asyncio.Future[Any]) -> None:
            if isinstance(error := done.exception(), ServerError):
                request.code = error.code
            elif items := done.result()["items"]:
                request.text = items[0]["insertText"]
            filled.set_result(None)

        future.add_done_callback(fill)
        self._futures.add(future)
        return filled

    def cancel(self, request: SuggestionRequest) -> None:
        """Send `$/cancelRequest`; the server still answers the request."""
        self._client.cancel(request.id)

    async def close(self, document: Document) -> list[EngineJob]:
        """Wait for all answers and close the document. Raises `MidfillError` after a timeout."""
        if self._futures:
            _, missing = await asyncio.wait(self._futures, timeout=_PATIENCE_S)
            if missing:
                raise MidfillError(f"The server did not answer a request within {_PATIENCE_S:.0f} s.")
            for future in self._futures:
                if isinstance(error := future.exception(), ServerError) and error.code == 0:
                    raise MidfillError("The server ended during the replay; see its log.")
            self._futures.clear()
        self._client.notify("textDocument/didClose", {"textDocument": {"uri": document.uri}})
        costs = await self._costs()
        for answer in costs["answers"]:
            if (request := self._request.get(answer["request"])) is not None:
                request.source, request.reason = answer["source"], answer["reason"]
        jobs = [_job(work, self._request) for work in costs["work"]]
        self._request.clear()
        return jobs

    async def _costs(self) -> dict[str, Any]:
        """Return the server's records since the last call, once the engine is free."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            costs: dict[str, Any] = await self._client.request("midfill/costs", {"after": self._known})
            work = costs["work"]
            running = [w for w in work if w["end"] is None or (w["end"] != "failed" and w["freedS"] is None)]
            if not running:
                self._known = max(
                    [self._known, *(record["number"] for record in costs["answers"] + costs["work"])]
                )
                return costs
            if time.monotonic() > until:
                raise MidfillError(f"The server's engine was still busy after {_PATIENCE_S:.0f} s.")
            await asyncio.sleep(_POLL_S)

    def peak_rss_mb(self) -> float:
        """Return the peak memory of the server."""
        return peak_rss_mb(self._client.process.pid)

    async def end(self) -> None:
        """Shut the server down."""
        if self._started is not None:
            await self._started.close()


class PipelineBackend:
    """midfill's pipeline in this process, for one of many virtual users: everything between pipe and engine.

    All virtual users share one engine, which is started already. Each has its own pipeline, as each window of
    an editor has its own server.

    Args:
        engine: the shared engine.
        family: the model's FIM template, from `probing.identify`.
        settings: settings of the pipeline.
        prefetch: whether to prefetch as a server does; off to measure requests alone.
    """

    name = "midfill"

    def __init__(
        self, engine: Engine, family: tuple[str, Family], settings: Settings, *, prefetch: bool = True
    ) -> None:
        self._costs = RequestStats()
        self._completer = Completer(settings if prefetch else settings.model_copy(update={"prefetch": False}))
        self._completer.use(InstrumentedEngine(engine, self._costs), family)
        self._request: dict[int | str | float | None, SuggestionRequest] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ids = itertools.count(1)
        self._known = 0
        self.answer: Answer | None = None
        """The latest answer to a request that was not cancelled."""

    async def start(self, report: Progress) -> None:
        """Do nothing: the engine is started already."""

    def open(self, document: Document) -> None:
        """Open a document in the pipeline."""
        self._document = document
        self._completer.context.opened(document)
        # Until something is typed, the server takes the end of the text for the cursor.
        end = Point(len(document.lines) - 1, len(document.lines[-1]))
        self._completer.on_idle(Snapshot(document, document.clamp(end)))

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """Apply the change of one key."""
        before, self._document = self._document, document
        change = changes[-1]
        if may_auto_close(change):
            place = before.point(change.start or (0, 0), Encoding.UTF16)
            self._completer.before_auto_close(Snapshot(before, place))
        self._completer.context.edited(before, document)
        self._completer.edited(document)
        self._completer.on_idle(Snapshot(document, document.end_of(change, Encoding.UTF16)))

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """Start a request; a newer one cancels the older ones, as in the server."""
        for task in self._tasks.values():
            task.cancel()
        request.id = next(self._ids)
        self._request[request.id] = request
        snapshot = Snapshot(document, document.point(position, Encoding.UTF16))
        task = asyncio.ensure_future(self._complete(request, snapshot))
        self._tasks[request.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.id, None))
        return task

    async def _complete(self, request: SuggestionRequest, snapshot: Snapshot) -> None:
        REQUEST.set(request.id)
        try:
            answer = await self._completer.complete(snapshot, Trigger.AUTOMATIC)
        except asyncio.CancelledError:
            request.code = CANCELLED
            raise
        self.answer = answer
        request.text, request.source = answer.text, answer.source
        request.reason, request.detail = answer.reason, answer.detail

    def cancel(self, request: SuggestionRequest) -> None:
        """Cancel the request's task."""
        if (task := self._tasks.get(request.id)) is not None:
            task.cancel()

    async def close(self, document: Document) -> list[EngineJob]:
        """Close the document. Does not wait until the engine is free, since it serves other users too."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._completer.forget(document.uri)
        # Let cancelled tasks end.
        await asyncio.sleep(0)
        work = self._costs.after(self._known)["work"]
        self._known = max([self._known, *(one["number"] for one in work)])
        jobs = [_job(one | {"end": one["end"] or "cancelled"}, self._request) for one in work]
        self._request.clear()
        return jobs

    def peak_rss_mb(self) -> float:
        """Return the peak memory of this process, with all virtual users."""
        return peak_rss_mb(os.getpid())

    async def end(self) -> None:
        """Cancel all work; the engine keeps running."""
        self._completer.drop_work()
        self._completer.context.close()


class GenerateBackend:
    """`transformers.generate` in fp32, one request at a time, without any reuse.

    Prompts are plain prefix, suffix, middle, as long as ours. Its output ends where ours would; a cancelled
    request ends between two tokens.
    """

    name = GENERATE

    def __init__(self, model: LocalModel, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        self._baseline: BaselineProcess | None = None
        self._tokenizer = load_tokenizer(model.path)
        # A model folder has no known template; the catalogue's models have.
        self._family = FAMILIES[settings.family or model.family or "qwen2.5-coder"]
        self._busy = asyncio.Lock()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._running = 0
        self._ids = 0
        self._jobs: list[EngineJob] = []

    async def start(self, report: Progress) -> None:
        """Start the process and load the model."""
        report("loading the model into generate", None)
        self._baseline = await BaselineProcess.start(GENERATE, self._model.path, "cpu")

    def open(self, document: Document) -> None:
        """Do nothing: each prompt is built from the whole document."""

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """Do nothing: each prompt is built from the whole document."""

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """Queue a request."""
        self._ids += 1
        request.id = self._ids
        snapshot = Snapshot(document, document.point(position, Encoding.UTF16))
        task = asyncio.ensure_future(self._answer(request, snapshot))
        self._tasks[request.id] = task
        return task

    def cancel(self, request: SuggestionRequest) -> None:
        """Cancel the request if it is running; a queued one notices by itself."""
        if request.id == self._running and self._baseline is not None:
            self._baseline.cancel(request.id)

    async def _answer(self, request: SuggestionRequest, snapshot: Snapshot) -> None:
        tokens = self._prompt(snapshot)
        async with self._busy:
            if self._baseline is None or request.cancelled_s is not None:
                request.code = CANCELLED
                return
            self._running = request.id
            place = [snapshot.line_before, snapshot.line_after, snapshot.lines_after(16)]
            begun = time.monotonic()
            found = await self._baseline.fill(request.id, tokens, self._settings.max_new_tokens, place)
            self._running = 0
            freed = time.monotonic()
        cancelled = request.cancelled_s is not None
        request.text = "" if cancelled else found["text"]
        request.code = CANCELLED if cancelled else None
        request.source = "model" if found["text"] else "none"
        first_s = begun + found["prefill_s"]
        self._jobs.append(
            EngineJob(
                request.session,
                request.id,
                "cancelled" if cancelled else "finished",
                num_prompt=len(tokens),
                num_reused=0,
                num_computed=len(tokens),
                num_generated=found["num_generated"],
                num_delivered=found["num_generated"],
                first_s=first_s,
                last_s=first_s + found["decode_s"],
                left_s=request.cancelled_s or freed,
                freed_s=freed,
            )
        )

    def _prompt(self, snapshot: Snapshot) -> list[int]:
        """Return the prompt around the cursor: prefix, suffix, middle as in the model's paper."""
        document, cursor = snapshot.document, snapshot.cursor
        above = "".join(document.lines[max(0, cursor.line - 256) : cursor.line]) + snapshot.line_before
        below = snapshot.line_after + "\n" + "\n".join(snapshot.lines_after(64))
        encode, family = self._tokenizer.encode, self._family
        bos, prefix, suffix, middle = (
            [] if (id_ := self._tokenizer.token_id(name)) is None else [id_]
            for name in (family.bos, family.prefix, family.suffix, family.middle)
        )
        before = encode(above)[-self._settings.prefix_tokens :]
        after = encode(below)[: self._settings.suffix_tokens]
        return [*bos, *prefix, *before, *suffix, *after, *middle]

    async def close(self, document: Document) -> list[EngineJob]:
        """Wait for all requests; return the work."""
        await asyncio.gather(*self._tasks.values())
        self._tasks.clear()
        jobs, self._jobs = self._jobs, []
        return jobs

    def peak_rss_mb(self) -> float:
        """Return the peak memory of the baseline's process."""
        return peak_rss_mb(self._baseline.pid) if self._baseline is not None else peak_rss_mb(os.getpid())

    async def end(self) -> None:
        """End the process."""
        if self._baseline is not None:
            await self._baseline.close()


def lsp_position(position: tuple[int, int] | None) -> dict[str, int]:
    """Return a position as LSP writes it."""
    line, character = position or (0, 0)
    return {"line": line, "character": character}


def _job(work: dict[str, Any], request: Mapping[Any, SuggestionRequest]) -> EngineJob:
    """Return the engine's work from the server's record of it, with the session of its request."""
    began = request.get(work["request"])
    return EngineJob(
        -1 if began is None else began.session,
        work["request"],
        work["end"],
        idle=work["idle"],
        num_prompt=work["promptTokens"],
        num_reused=work["reusedTokens"],
        num_computed=work["computedTokens"],
        num_generated=work["generatedTokens"],
        num_delivered=work["deliveredTokens"],
        submitted_s=work["submittedS"],
        first_s=work["firstTokenS"],
        last_s=work["lastTokenS"],
        left_s=work["leftS"],
        freed_s=work["freedS"],
    )

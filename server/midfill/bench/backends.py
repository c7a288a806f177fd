"""Who answers the typist of a replay: midfill's own server, and others on the same weights.

A contender is told what the editor would tell it: documents, changes, a request at a cursor, and that the
answer to it is not wanted any more. It fills in what became of the request. Times are `time.monotonic`,
a clock that all processes of a machine share.
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
from midfill.completion.completer import Answer, Completer, Trigger
from midfill.completion.reasons import Reason
from midfill.completion.stats.request_log import REQUEST, Costs, Metered
from midfill.completion.suggestions import may_close
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
"""Accepted; shown before the next key, but not what the user wanted; answered with nothing; taken back at
the next key and answered so; taken back, but a result had been sent; answered with an error, or with nothing
because the engine failed."""

_FAILURES = frozenset(
    {
        Reason.LOADING,
        Reason.MODEL_FAILED,
        Reason.ENGINE_ERROR,
        Reason.ENGINE_UNAVAILABLE,
        Reason.DEADLINE,
    }
)
"""Reasons for nothing that are the engine's fault. A server answers with them as with any other."""

_PATIENCE_S = 60.0
_POLL_S = 0.02


@dataclass(slots=True, eq=False)
class SuggestionRequest:
    """One request and what became of it.

    Attributes:
        episode: its number.
        id: the contender's own name for it.
        cancelled_s: when the typist took it back; None if not.
        answered_s: when its answer came, if only that it is cancelled.
        text: the suggestion; "" for none.
        source: where that came from: "model", "none", or how it was reused; "" if not known.
        reason: why there is none, if it is told; detail: what the engine said of that, "" for nothing.
        code: the error that answered it; None if it was answered with a result.
        inside: the text is that of an earlier request with a beginning of its suggestion typed since.
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
        """One of `FATES`."""
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
        """From the request to its answer, or to the key that took it back."""
        end_s = self.cancelled_s if self.cancelled_s is not None else self.answered_s
        return ((end_s if end_s is not None else self.asked_s) - self.asked_s) * 1000


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What a model did for a request, as far as the contender tells; None where it does not.

    Attributes:
        episode, request: of the `Asked` that began it; -1 and None if none did.
        end: "finished", "stopped" (enough was written), "cancelled" or "failed".
        idle: done ahead, when nobody waited.
        num_computed: tokens of the prompt that were computed.
        num_generated: tokens that were chosen, those too that nobody read.
        num_delivered: tokens that were read, from `first_s` to `last_s`.
        submitted_s: when the model was asked.
        left_s: when nobody wanted it any more; freed_s: when the model was free of it.
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
    """See the module. All methods are called on one event loop."""

    name: str

    async def start(self, report: Progress) -> None:
        """Load the model. Raises `MidfillError`."""
        ...

    def open(self, document: Document) -> None:
        """The editor opens a document."""
        ...

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """The document is now this one; `changes` (positions in UTF-16) have made it so."""
        ...

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """Return a suggestion is wanted at a position (in UTF-16). Done when `asked` is filled in."""
        ...

    def cancel(self, request: SuggestionRequest) -> None:
        """It is not wanted any more."""
        ...

    async def close(self, document: Document) -> list[EngineJob]:
        """Return the editor closes the document; what the model did since it was opened, once it is free."""
        ...

    def peak_rss_mb(self) -> float:
        """Return the most memory that the contender has had."""
        ...

    async def end(self) -> None:
        """End its process."""
        ...


class ServerBackend:
    """Our own server in a process of its own, over pipes.

    Args:
        engine: `midfill serve --engine`, for tests.
        options: settings.
    """

    name = "midfill"

    def __init__(self, engine: str | None = None, options: dict[str, Any] | None = None) -> None:
        self._command = [*SERVE_COMMAND, *(["--engine", engine] if engine else [])]
        # What the typist accepts here is nobody's choice: it must not be counted as the user's.
        self._options = {"count_feedback": False} | (options or {})
        self._started: Client | None = None
        self._request: dict[int, SuggestionRequest] = {}
        self._futures: set[asyncio.Future[Any]] = set()
        self._known = 0

    async def start(self, report: Progress) -> None:
        """See `Contender.start`."""
        self._started = await Client.start(self._command)
        await self._started.load(self._options, lambda message: report(message, None))

    @property
    def _client(self) -> Client:
        if self._started is None:
            raise MidfillError("The server has not been started.")
        return self._started

    def open(self, document: Document) -> None:
        """See `Contender.open`."""
        item = {
            "uri": document.uri,
            "languageId": document.language_id,
            "version": document.version,
            "text": document.text,
        }
        self._client.notify("textDocument/didOpen", {"textDocument": item})

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """See `Contender.change`."""
        edits = [
            {"range": {"start": place(change.start), "end": place(change.end)}, "text": change.text}
            for change in changes
        ]
        identifier = {"uri": document.uri, "version": document.version}
        self._client.notify("textDocument/didChange", {"textDocument": identifier, "contentChanges": edits})

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """See `Contender.ask`."""
        params = {
            "textDocument": {"uri": document.uri},
            "position": place(position),
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
        """See `Contender.take_back`: the server answers all the same."""
        self._client.cancel(request.id)

    async def close(self, document: Document) -> list[EngineJob]:
        """See `Contender.close`. Raises `MidfillError` if the server does not answer."""
        if self._futures:
            _, missing = await asyncio.wait(self._futures, timeout=_PATIENCE_S)
            if missing:
                raise MidfillError(f"The server left a request unanswered for {_PATIENCE_S:.0f} s.")
            for future in self._futures:
                if isinstance(error := future.exception(), ServerError) and error.code == 0:
                    raise MidfillError("The server ended during the replay; its log says more.")
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
        """Return what has been added since the last time, when the engine is free of all of it."""
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
                raise MidfillError(f"The server's model has not come to rest within {_PATIENCE_S:.0f} s.")
            await asyncio.sleep(_POLL_S)

    def peak_rss_mb(self) -> float:
        """See `Contender.peak_rss_mb`."""
        return peak_rss_mb(self._client.process.pid)

    async def end(self) -> None:
        """See `Contender.end`."""
        if self._started is not None:
            await self._started.close()


class PipelineBackend:
    """Our own pipeline in this process, for one of many typists: what a server does between pipe and engine.

    The engine is one for all of them and is started already. Each typist has a pipeline, as each window of an
    editor has a server.

    Args:
        family: see `probing.identify`.
        looks_ahead: as in a server; off to measure what requests alone cost.
    """

    name = "midfill"

    def __init__(
        self, engine: Engine, family: tuple[str, Family], settings: Settings, *, looks_ahead: bool = True
    ) -> None:
        self._costs = Costs()
        self._completer = Completer(settings, looks_ahead=looks_ahead)
        self._completer.use(Metered(engine, self._costs), family)
        self._request: dict[int | str | float | None, SuggestionRequest] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ids = itertools.count(1)
        self._known = 0
        self.answer: Answer | None = None
        """The newest answer that was not taken back."""

    async def start(self, report: Progress) -> None:
        """See `Contender.start`: there is nothing to load."""

    def open(self, document: Document) -> None:
        """See `Contender.open`."""
        self._document = document
        self._completer.context.opened(document)
        # Until something is typed, the server takes the end of the text for the place.
        end = Point(len(document.lines) - 1, len(document.lines[-1]))
        self._completer.rest(Snapshot(document, document.clamp(end)))

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """See `Contender.change`. One change, as a key makes it."""
        before, self._document = self._document, document
        change = changes[-1]
        if may_close(change):
            place = before.point(change.start or (0, 0), Encoding.UTF16)
            self._completer.closing(Snapshot(before, place))
        self._completer.context.edited(before, document)
        self._completer.edited(document)
        self._completer.rest(Snapshot(document, document.end_of(change, Encoding.UTF16)))

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """See `Contender.ask`. A newer request takes the older one's place, as in the server."""
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
        """See `Contender.take_back`."""
        if (task := self._tasks.get(request.id)) is not None:
            task.cancel()

    async def close(self, document: Document) -> list[EngineJob]:
        """See `Contender.close`. Does not wait until the engine is free, since that serves others too."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._completer.forget(document.uri)
        # What is cancelled ends when the loop comes to it.
        await asyncio.sleep(0)
        work = self._costs.after(self._known)["work"]
        self._known = max([self._known, *(one["number"] for one in work)])
        jobs = [_job(one | {"end": one["end"] or "cancelled"}, self._request) for one in work]
        self._request.clear()
        return jobs

    def peak_rss_mb(self) -> float:
        """See `Contender.peak_rss_mb`: that of all typists together."""
        return peak_rss_mb(os.getpid())

    async def end(self) -> None:
        """Drop what is computed; the engine goes on."""
        self._completer.drop_work()
        self._completer.context.close()


class GenerateBackend:
    """`transformers.generate` in fp32, one request at a time, nothing reused.

    Its prompts are plain prefix, suffix, middle of the size of ours. What it writes ends where ours does; a
    request that is taken back is left between two tokens.
    """

    name = GENERATE

    def __init__(self, model: LocalModel, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        self._baseline: BaselineProcess | None = None
        self._tokenizer = load_tokenizer(model.path)
        # In the name of a folder there is no family; of the catalogue's models there is.
        self._family = FAMILIES[settings.family or model.family or "qwen2.5-coder"]
        self._busy = asyncio.Lock()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._running = 0
        self._ids = 0
        self._jobs: list[EngineJob] = []

    async def start(self, report: Progress) -> None:
        """See `Contender.start`."""
        report("loading the model into generate", None)
        self._baseline = await BaselineProcess.start(GENERATE, self._model.path, "cpu")

    def open(self, document: Document) -> None:
        """See `Contender.open`."""

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """See `Contender.change`."""

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """See `Contender.ask`."""
        self._ids += 1
        request.id = self._ids
        snapshot = Snapshot(document, document.point(position, Encoding.UTF16))
        task = asyncio.ensure_future(self._answer(request, snapshot))
        self._tasks[request.id] = task
        return task

    def cancel(self, request: SuggestionRequest) -> None:
        """See `Contender.take_back`."""
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
        """Prefix, suffix, middle as in the family's paper, around the cursor of this moment."""
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

    async def close(self, document: Document) -> list[EngineJob]:  # noqa: ARG002 - see `Contender`
        """See `Contender.close`."""
        await asyncio.gather(*self._tasks.values())
        self._tasks.clear()
        jobs, self._jobs = self._jobs, []
        return jobs

    def peak_rss_mb(self) -> float:
        """See `Contender.peak_rss_mb`."""
        return peak_rss_mb(self._baseline.pid) if self._baseline is not None else peak_rss_mb(os.getpid())

    async def end(self) -> None:
        """See `Contender.end`."""
        if self._baseline is not None:
            await self._baseline.close()


def place(position: tuple[int, int] | None) -> dict[str, int]:
    """Return a position as LSP writes it."""
    line, character = position or (0, 0)
    return {"line": line, "character": character}


def _job(work: dict[str, Any], request: Mapping[Any, SuggestionRequest]) -> EngineJob:
    """Return a piece of work as `metrics.Work.as_dict` tells it, and the request that began it."""
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

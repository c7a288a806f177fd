"""The baseline llama.vim: llama.cpp's server with the requests and the cache of its Vim plugin.

From the plugin's source (https://github.com/ggml-org/llama.vim, version of 2025): it sends whole lines above
the cursor, the line up to the cursor (after the middle sentinel) and the text that follows; keeps answers and
shows the rest of one whose text is being typed; requests the next suggestion while one is shown. The first
request has a shorter time limit, which counts from the first line end on. The plugin's ring of chunks of
other files stays empty while somebody types without a pause of three seconds, so it is not implemented. A
cancelled request is ended by closing its connection. (The plugin itself lets it run and waits; see
`patient`.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from midfill.bench.backends import CANCELLED, EngineJob, SuggestionRequest
from midfill.bench.baselines import LLAMA_CPP, BaselineProcess
from midfill.engine.api import Progress
from midfill.errors import MidfillError
from midfill.system.measure import peak_rss_mb
from midfill.text.documents import Change, Document, Encoding, Point

_PREDICT_TOKENS = 128
_MAX_PROMPT_MS = 500
_MAX_PREDICT_MS = 1000
_MAX_FIRST_PREDICT_MS = 250
_MAX_LINE_SUFFIX = 8
_MAX_KEYS = 250
_LOOK_BACK = 128
_LATER_WINDOWS = 3
_CONTEXT = 16_384


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the baseline.

    Attributes:
        lines_before, lines_after: whole lines to send.
        batch_tokens: the server's batch size; it notices closed connections between two batches only.
        patient: let cancelled requests run on and keep their answers, as the plugin does.
    """

    lines_before: int = 256
    lines_after: int = 64
    batch_tokens: int = 128
    patient: bool = False


@dataclass(frozen=True, slots=True)
class _Context:
    """The text of a request: above the cursor's line, the line up to the cursor, after the cursor."""

    prefix: str
    middle: str
    suffix: str
    indent: int


class LlamaVim:
    """A `backends.Backend` that works like llama.vim."""

    name = LLAMA_CPP

    def __init__(self, gguf: Path, options: Options | None = None) -> None:
        self._gguf = gguf
        self._options = options or Options()
        self._baseline: BaselineProcess | None = None
        self._cache: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._running: asyncio.Task[str] | None = None
        self._running_key: tuple[str, str] | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._jobs: list[EngineJob] = []
        self._ids = 0

    async def start(self, report: Progress) -> None:
        """Start the server and load the model."""
        report("loading the model into llama.cpp", None)
        self._baseline = await BaselineProcess.start(
            LLAMA_CPP, self._gguf, "cpu", _CONTEXT, batch_tokens=self._options.batch_tokens
        )

    def open(self, document: Document) -> None:
        """Do nothing: each request has the text."""

    def change(self, document: Document, changes: Sequence[Change]) -> None:
        """Do nothing: each request has the text."""

    def ask(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> asyncio.Future[None]:
        """Start a request."""
        self._ids += 1
        request.id = self._ids
        task = asyncio.ensure_future(self._answer(request, document, position))
        self._tasks[request.id] = task
        return task

    def cancel(self, request: SuggestionRequest) -> None:
        """Close the request's connection, unless `patient`."""
        if not self._options.patient and request.id in self._tasks:
            self._tasks[request.id].cancel()

    async def _answer(
        self, request: SuggestionRequest, document: Document, position: tuple[int, int]
    ) -> None:
        point = document.point(position, Encoding.UTF16)
        line = _bare(document.lines[point.line])
        before, after = line[: point.column], line[point.column :]
        if len(after) > _MAX_LINE_SUFFIX:
            request.source, request.reason = "none", "line-tail"
            return
        context = self._context(document, point.line, before, after)
        try:
            content, request.source = self._kept(context)
            if content is None:
                await self._ask(request, context, _MAX_FIRST_PREDICT_MS)
                # The plugin searches its cache again when an answer has come.
                content, request.source = self._kept(context)[0], "model"
            request.text = "" if content is None else _worthwhile(content, document, point)
        except asyncio.CancelledError:
            request.code = CANCELLED
            return
        if not request.text:
            request.source, request.reason = "none", "model-silent"
            return
        ahead = self._accepted(document, point.line, before, request.text)
        if self._running is None and not self._is_kept(ahead):
            self._tasks[-request.id] = asyncio.ensure_future(self._look_ahead(request, ahead))

    async def _look_ahead(self, request: SuggestionRequest, context: _Context) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self._ask(request, context, _MAX_PREDICT_MS, idle=True)

    def _context(self, document: Document, number: int, before: str, after: str) -> _Context:
        """Return the text around a cursor. On a blank line the plugin starts at the line's begin."""
        lines, options = document.lines, self._options
        blank = not (before + after).strip()
        above = [_bare(line) for line in lines[max(0, number - options.lines_before) : number]]
        below = [_bare(line) for line in lines[number + 1 : number + 1 + options.lines_after]]
        before, after = ("", "") if blank else (before, after)
        indent = len(before) - len(before.lstrip())
        return _Context("\n".join(above) + "\n", before, "\n".join([after, *below]) + "\n", indent)

    def _accepted(self, document: Document, number: int, before: str, text: str) -> _Context:
        """Return the text around the cursor after a suggestion was accepted."""
        *above, last = (before + text).split("\n")
        here = self._context(document, number, before, "")
        prefix = here.prefix + "".join(f"{line}\n" for line in above)
        lines = prefix.splitlines(keepends=True)[-self._options.lines_before :]
        suffix = "\n" + here.suffix.partition("\n")[2]
        return _Context("".join(lines), last, suffix, here.indent)

    def _key(self, context: _Context) -> tuple[str, str]:
        return context.prefix + context.middle, context.suffix

    def _is_kept(self, context: _Context) -> bool:
        return self._key(context) in self._cache

    def _kept(self, context: _Context) -> tuple[str | None, str]:
        """Return a kept answer for this text, or the rest of one that is being typed, with its source."""
        whole, suffix = self._key(context)
        if (exact := self._cache.get((whole, suffix))) is not None:
            return exact, "cache"
        best: str | None = None
        for size in range(1, min(_LOOK_BACK, len(whole)) + 1):
            earlier = self._cache.get((whole[:-size], suffix))
            if earlier is None or earlier[:size] != whole[-size:] or not earlier[size:]:
                continue
            if best is None or len(earlier[size:]) > len(best):
                best = earlier[size:]
        return best, "typed-through"

    async def _ask(
        self, request: SuggestionRequest, context: _Context, limit_ms: int, *, idle: bool = False
    ) -> None:
        """Send a request and keep its answer; close an older one first, or await it if `patient`."""
        key = self._key(context)
        if self._running is not None and self._running_key != key:
            if not self._options.patient:
                self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(self._running)
            if request.cancelled_s is not None or self._kept(context)[0] is not None:
                return
        if self._running is None:
            self._running_key = key
            self._running = asyncio.ensure_future(self._infill(request, context, limit_ms, idle=idle))
            self._running.add_done_callback(self._done)
        running = self._running
        try:
            content = await (asyncio.shield(running) if self._options.patient or idle else running)
        except asyncio.CancelledError:
            if not idle and not self._options.patient:
                running.cancel()
            raise
        self._keep(context, content)

    def _done(self, task: asyncio.Task[str]) -> None:
        if self._running is task:
            self._running = self._running_key = None

    def _keep(self, context: _Context, content: str) -> None:
        """Keep an answer, also under the keys for windows that have moved down by a few lines."""
        prefix = context.prefix
        for _ in range(1 + _LATER_WINDOWS):
            self._cache[prefix + context.middle, context.suffix] = content
            _, end, prefix = prefix.partition("\n")
            if not end or not prefix:
                break
        while len(self._cache) > _MAX_KEYS:
            self._cache.popitem(last=False)

    async def _infill(
        self, request: SuggestionRequest, context: _Context, limit_ms: int, *, idle: bool
    ) -> str:
        body = {
            "id_slot": 0,
            "input_prefix": context.prefix,
            "input_suffix": context.suffix,
            "input_extra": [],
            "prompt": context.middle,
            "n_predict": _PREDICT_TOKENS,
            "n_indent": context.indent,
            "top_k": 40,
            "top_p": 0.90,
            "samplers": ["top_k", "top_p", "infill"],
            "seed": 0,
            "stream": False,
            "cache_prompt": True,
            "t_max_prompt_ms": _MAX_PROMPT_MS,
            "t_max_predict_ms": limit_ms,
        }
        begun = time.monotonic()
        try:
            found = await self._post("/infill", body)
        except asyncio.CancelledError:
            self._jobs.append(
                EngineJob(request.session, request.id, "cancelled", idle=idle, left_s=time.monotonic())
            )
            raise
        timings = found["timings"]
        first_s = begun + timings["prompt_ms"] / 1000
        self._jobs.append(
            EngineJob(
                request.session,
                request.id,
                "finished",
                idle=idle,
                num_computed=timings["prompt_n"],
                num_generated=timings["predicted_n"],
                num_delivered=timings["predicted_n"],
                first_s=first_s,
                last_s=first_s + timings["predicted_ms"] / 1000,
                left_s=time.monotonic(),
            )
        )
        return str(found["content"])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request over a new connection, which is closed if the task is cancelled."""
        if self._baseline is None:
            raise MidfillError("llama.cpp has not been started.")
        address = urlsplit(self._baseline.ready["address"])
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(head.encode() + content)
            status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
            answer = json.loads(await reader.read())
        finally:
            writer.close()
        if status != b"200":
            raise MidfillError(f"llama.cpp answered with HTTP status {status.decode()}: {str(answer)[:200]}")
        result: dict[str, Any] = answer
        return result

    async def close(self, document: Document) -> list[EngineJob]:
        """Cancel all requests and wait until the server is free, so that the next session is not delayed."""
        if self._running is not None:
            self._running.cancel()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        nothing = {"prompt": [0], "n_predict": 0, "cache_prompt": True, "id_slot": 0}
        with contextlib.suppress(MidfillError):
            await self._post("/completion", nothing)
        jobs, self._jobs = self._jobs, []
        return jobs

    def peak_rss_mb(self) -> float:
        """Return the server's peak memory."""
        return peak_rss_mb(self._baseline.pid) if self._baseline is not None else 0.0

    async def end(self) -> None:
        """End the server."""
        if self._baseline is not None:
            await self._baseline.close()


def _bare(line: str) -> str:
    return line.rstrip("\r\n")


def _worthwhile(content: str, document: Document, cursor: Point) -> str:
    """Return what the plugin shows of an answer: "" if that repeats the text after or below the cursor."""
    line = _bare(document.lines[cursor.line])
    before, after = line[: cursor.column], line[cursor.column :]
    shown = content.rstrip("\n").split("\n")
    if not line.strip():
        # On a blank line the answer begins at the line's start; do not repeat its indentation.
        lead = min(len(shown[0]) - len(shown[0].lstrip()), len(line))
        shown[0] = shown[0][lead:]
    below = [_bare(other) for other in document.lines[cursor.line + 1 :]]
    first = next((index for index, other in enumerate(below) if other.strip()), len(below))
    repeats_suffix = len(shown) == 1 and shown[0] == after
    repeats_lines = len(shown) > 1 and not shown[0] and shown[1:] == below[: len(shown) - 1]
    following = below[first:]
    repeats_next = bool(following) and before + shown[0] == following[0]
    repeats_next = repeats_next and (
        len(shown) == 1 or "\n".join(following[1:]).startswith("\n".join(shown[1:]))
    )
    text = "\n".join(shown)
    return "" if repeats_suffix or repeats_lines or repeats_next or not text.strip() else text

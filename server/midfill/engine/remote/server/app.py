"""Serve a model to several processes: OpenAI's completions API over HTTP, for one user's editors or a team.

Greedy only, one model; see `request_params` for the parameters. A field `midfill` holds what OpenAI's form
lacks: the forced prefix, idle priority, reused tokens. Closing the connection cancels the request, which
frees the device within one step. No text is logged. Knows no sockets: see `listen` for those and `guard` for
access control. Runs on the event loop; slow work on long texts runs in threads, one at a time per user.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Send

from midfill import __version__
from midfill.engine.api import MAX_ADAPTERS, AdapterSource, Engine, ModelInfo, Request, Token, Tokenizer
from midfill.engine.remote.server.model_host import ModelHost, Report
from midfill.engine.remote.server.request_params import (
    CHARS_PER_TOKEN,
    CompletionBody,
    Extra,
    InvalidParamsError,
    read,
    refusal,
)
from midfill.engine.remote.server.stop_strings import StopMatcher
from midfill.errors import (
    EngineError,
    EngineOverloadedError,
    EngineUnavailableError,
    MidfillError,
    ModelError,
)

_LOG = logging.getLogger(__name__)

_PULSE_S = 1.0
"""After this long without an event a stream gets a comment: the server is alive, the request waits."""


class AdapterParams(BaseModel):
    """An `AdapterSource` as JSON."""

    model_config = ConfigDict(extra="ignore", strict=True)

    key: str = Field(max_length=200)
    name: str = Field(max_length=200)
    path: str = Field(max_length=4096)


class ClientAdapters(BaseModel):
    """The adapters that one client wants in the model."""

    model_config = ConfigDict(extra="ignore", strict=True)

    client: str = Field(max_length=64)
    pid: int = Field(default=0, ge=0)
    adapters: list[AdapterParams] = Field(max_length=MAX_ADAPTERS)


class EngineApp:
    """The HTTP side of a `ModelHost`; `app` is the ASGI application.

    Args:
        host: the model.
        own: only the user who owns the process can reach it.
        any_temperature: see `request_params.read`.
    """

    def __init__(self, host: ModelHost, *, own: bool, any_temperature: bool = False) -> None:
        self.host = host
        self._any_temperature = any_temperature
        self._running: dict[tuple[str, str], Request] = {}  # by user and by the user's own name for it
        self._encoding: dict[str, asyncio.Lock] = {}  # by user
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/midfill/ready", self.ready),
                Route("/midfill/idle", self.set_idle, methods=["POST"]),
                # Adapters are folders of this machine, which other users must not name.
                *([Route("/midfill/adapters", self.set_adapters, methods=["POST"])] if own else []),
            ],
            exception_handlers={HTTPException: _http_error, ClientDisconnect: _client_gone},
        )

    async def models(self, _: HttpRequest) -> Response:
        """List the model and its adapters as models, with what our own client must know of them."""
        try:
            engine = await self.host.load()
        except MidfillError as error:
            return _error(503, error)
        rows = [_describe(engine.model, self.host.vocabulary)]
        rows += [_describe_adapter(rows[0], one) for one in self.host.known_adapters]
        return JSONResponse({"object": "list", "data": rows})

    async def health(self, _: HttpRequest) -> Response:
        """Report that the server is alive; loads nothing."""
        loaded = self.host.engine is not None
        return JSONResponse({"status": "ok", "version": __version__, "loaded": loaded, "pid": os.getpid()})

    async def metrics(self, _: HttpRequest) -> Response:
        """Report metrics for Prometheus."""
        return Response(generate_latest(self.host.metrics.registry), media_type="text/plain; version=0.0.4")

    async def ready(self, _: HttpRequest) -> Response:
        """Stream the progress of loading, one JSON object per line, until it ends."""

        async def lines() -> AsyncGenerator[bytes, None]:
            async with aclosing(self.host.progress()) as reports:
                async for report in reports:
                    yield json.dumps(report).encode() + b"\n"

        return _Stream(lines(), "application/x-ndjson")

    async def set_idle(self, http: HttpRequest) -> Response:
        """Change the priority of an active request."""
        try:
            params = Extra.model_validate_json(await http.body())
        except ValidationError as error:
            return _invalid(refusal(error))
        if (request := self._running.get((_user(http), params.id))) is not None:
            request.set_idle(params.idle)
        return Response(status_code=204)

    async def set_adapters(self, http: HttpRequest) -> Response:
        """Set a client's adapters; respond when requests may name them."""
        try:
            wanted = ClientAdapters.model_validate_json(await http.body())
            sources = [AdapterSource(one.key, one.name, Path(one.path)) for one in wanted.adapters]
            await self.host.want(wanted.client, sources, pid=wanted.pid)
        except ValidationError as error:
            return _invalid(refusal(error))
        except MidfillError as error:
            return _error(409, error)
        return Response(status_code=204)

    async def complete(self, http: HttpRequest) -> Response:
        """Handle `/v1/completions`."""
        try:
            params = read(await http.body(), any_temperature=self._any_temperature)
        except InvalidParamsError as error:
            return _invalid(error)
        try:
            engine = await self.host.load()
        except MidfillError as error:
            return _error(503, error)
        self.host.touch()  # the model must not be unloaded before the request begins
        adapter = params.midfill.adapter
        if params.model not in ("", engine.model.name):
            by_name = {one.name: one.key for one in self.host.known_adapters}
            if params.model not in by_name:
                known = ", ".join([engine.model.name, *by_name])
                return _error(
                    404, EngineError(f"There is no model {params.model!a:.80}; available: {known}.")
                )
            adapter = by_name[params.model]
        user = _user(http)
        try:
            tokens, stop_ids = await self._tokens(params, engine.model, user)
            _check(tokens, params.max_tokens, engine.model.context, self.host.num_ids)
        except InvalidParamsError as error:
            return _invalid(error)
        if not params.max_tokens:
            engine.prewarm(tokens, adapter, user=user)
            self.host.touch()
            return JSONResponse({"choices": [{"text": "", "index": 0, "finish_reason": "length"}]})
        extra = params.midfill
        request = Request(
            tuple(tokens),
            params.max_tokens,
            stop_ids.union(params.stop_token_ids),
            forced_prefix=extra.starts_with,
            idle=extra.idle,
            adapter=adapter,
            user=user,
        )
        run = _CompletionRun(
            self.host, engine, request, params, self._running, params.model or engine.model.name
        )
        if params.stream:
            return _Events(run.events(), "text/event-stream")
        return await run.whole()

    async def _tokens(
        self, params: CompletionBody, model: ModelInfo, user: str
    ) -> tuple[Sequence[int], frozenset[int]]:
        """Return the prompt's ids, and ids that end the text of its hole. Raises `InvalidParamsError`."""
        if not isinstance(params.prompt, str):
            return params.prompt, frozenset()
        num_chars = len(params.prompt) + len(params.suffix or "")
        if num_chars > (most := model.context * CHARS_PER_TOKEN):
            raise InvalidParamsError(
                "prompt", f"it has {num_chars} characters; the model takes at most {most}."
            )
        lock = self._encoding.setdefault(user, asyncio.Lock())
        async with lock:
            if params.suffix is None:
                return await asyncio.to_thread(_encode, model.tokenizer, params.prompt), frozenset()
            if self.host.infill is None:
                raise InvalidParamsError("suffix", "this engine does not support fill-in-the-middle.")
            try:
                return await asyncio.to_thread(self.host.infill, model, params.prompt, params.suffix)
            except ModelError as error:
                raise InvalidParamsError("suffix", str(error)) from error


class _Stream(StreamingResponse):
    """A streaming response. However it ends, the source of its parts is closed."""

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(parts, media_type=media_type)
        self._parts = parts

    async def stream_response(self, send: Send) -> None:
        """Send the parts, then close their source; see `StreamingResponse`."""
        async with aclosing(self._parts):
            await super().stream_response(send)


class _Events(_Stream):
    """Server-sent events, with comments while there are none; see `_PULSE_S`."""

    async def stream_response(self, send: Send) -> None:
        """Send the events and the comments between them; see `StreamingResponse`."""
        sent_s = time.monotonic()

        async def pulse() -> None:
            while True:
                if (left_s := sent_s + _PULSE_S - time.monotonic()) > 0:
                    await asyncio.sleep(left_s)
                else:
                    await note({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

        async def note(message: Message) -> None:
            nonlocal sent_s
            sent_s = time.monotonic()
            if message["type"] == "http.response.body" and not message.get("more_body"):
                # No comment may follow the end.
                pulsing.cancel()
            await send(message)

        # It sleeps first, so that the head is sent before any comment.
        pulsing = asyncio.get_running_loop().create_task(pulse())
        try:
            await super().stream_response(note)
        finally:
            pulsing.cancel()


@dataclass(slots=True)
class _CompletionRun:
    """One completion request while it runs."""

    host: ModelHost
    engine: Engine
    request: Request
    params: CompletionBody
    running: dict[tuple[str, str], Request]
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    stopped: bool = False  # by a text of `CompletionBody.stop`

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """Yield its tokens; record its costs however it ends. Raises only `EngineError`."""
        end = "cancelled"
        key = self.request.user, self.params.midfill.id
        self.host.enter()
        if self.params.midfill.id:
            self.running[key] = self.request
        try:
            async with aclosing(self._up_to_stop(self.engine.generate(self.request))) as tokens:
                async for token in tokens:
                    yield token
            end = "finished"
        except EngineError:
            end = "failed"
            raise
        except Exception as error:
            end = "failed"
            # The error's text may quote the prompt.
            _LOG.error("a request failed: %s", type(error).__name__)
            raise EngineError(f"The engine failed on this request ({type(error).__name__}).") from None
        finally:
            if self.running.get(key) is self.request:
                del self.running[key]
            self.host.leave()
            self.host.metrics.account(self.request.stats, end)

    async def _up_to_stop(self, source: AsyncGenerator[Token, None]) -> AsyncGenerator[Token, None]:
        """Yield the tokens before the first `stop` text; hold back what may be the beginning of one."""
        stops = StopMatcher(self.params.stop)
        held: list[Token] = []
        num_held = num_given = 0  # characters
        async with aclosing(source) as tokens:
            async for token in tokens:
                held.append(token)
                num_held += len(token.text)
                stops.push(token.text)
                if stops.end is not None:
                    self.stopped = True
                    num_held = stops.end - num_given
                    break
                while held and num_held - len(held[0].text) >= stops.num_held:
                    num_held -= len(held[0].text)
                    num_given += len(held[0].text)
                    yield held.pop(0)
        for token in held:
            if num_held <= 0:
                break
            yield replace(token, text=token.text[:num_held])
            num_held -= len(token.text)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as server-sent events."""
        options = self.params.stream_options
        form = self._form() | ({"usage": None} if options is not None and options.include_usage else {})
        first = True
        try:
            async with aclosing(self.tokens()) as tokens:
                async for token in tokens:
                    event = form | {"choices": [self._choice([token])]}
                    if first:
                        event["midfill"] = self._own()
                        first = False
                    yield _event(event)
        except EngineError as error:
            yield _event({"error": _as_dict(error)})
            return
        yield _event(
            form | {"choices": [self._choice([]) | {"finish_reason": self._finish()}], "midfill": self._own()}
        )
        if "usage" in form:
            yield _event(form | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def whole(self) -> Response:
        """Return the whole answer as one response."""
        try:
            async with aclosing(self.tokens()) as tokens:
                found = [token async for token in tokens]
        except EngineError as error:
            return _error(429 if isinstance(error, EngineOverloadedError) else 503, error)
        choice = self._choice(found) | {"finish_reason": self._finish()}
        return JSONResponse(self._form() | {"choices": [choice], "usage": self._usage()})

    def _form(self) -> Report:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _usage(self) -> Report:
        stats = self.request.stats
        return {
            "prompt_tokens": stats.num_prompt,
            "completion_tokens": stats.num_generated,
            "total_tokens": stats.num_prompt + stats.num_generated,
            "prompt_tokens_details": {"cached_tokens": stats.num_reused},
        }

    def _choice(self, tokens: list[Token]) -> Report:
        choice: Report = {"index": 0, "text": "".join(token.text for token in tokens), "finish_reason": None}
        choice["token_ids"] = [token.id for token in tokens]
        if self.params.logprobs is not None:
            choice["logprobs"] = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
            }
        return choice

    def _own(self) -> Report:
        stats = self.request.stats
        waited = max(stats.started_s - stats.submitted_s, 0.0) if stats.started_s else 0.0
        return {"reused": stats.num_reused, "computed": stats.num_computed, "waited_s": round(waited, 4)}

    def _finish(self) -> str:
        if self.stopped:
            return "stop"
        return "length" if self.request.stats.num_generated >= self.request.max_new_tokens else "stop"


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text prompt. As on other servers, spelled-out control tokens become tokens."""
    marks = {tokenizer.decode([token]): token for token in tokenizer.control_ids}
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True) if mark)
    ids: list[int] = []
    for part in re.split(f"({pattern})", text) if pattern else [text]:
        ids += [marks[part]] if part in marks else tokenizer.encode(part)
    return ids


def _describe(model: ModelInfo, vocabulary: str) -> Report:
    own = {
        "version": __version__,
        "architecture": model.architecture,
        "family": model.family,
        "context": model.context,
        "device": model.device,
        "dtype": model.dtype,
        "adapter": model.adapter,
        "vocabulary": vocabulary,
    }
    return {
        "id": model.name,
        "object": "model",
        "owned_by": "midfill",
        "created": int(time.time()),
        "max_model_len": model.context,
        "midfill": own,
    }


def _describe_adapter(base: Report, adapter: AdapterSource) -> Report:
    own = base["midfill"] | {"adapter": adapter.name, "adapter_digest": adapter.key}
    return base | {"id": adapter.name, "parent": base["id"], "midfill": own}


def _check(tokens: Sequence[int], max_tokens: int, context: int, num_ids: int) -> None:
    """Raise `InvalidParamsError` for a prompt that the model cannot read."""
    if not tokens:
        raise InvalidParamsError("prompt", "it is empty.")
    if len(tokens) + max_tokens > context:
        raise InvalidParamsError(
            "max_tokens",
            f"prompt and output ({len(tokens)} + {max_tokens} tokens) are longer than the model's {context}.",
        )
    if min(tokens) < 0 or max(tokens) >= num_ids:
        raise InvalidParamsError("prompt", "it has ids that are not in the vocabulary.")


def _user(http: HttpRequest) -> str:
    """Return the user, as determined by `guard`; "" for the one user of a personal engine."""
    return str(http.scope.get("midfill.user", ""))


def _event(value: Report) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _as_dict(error: MidfillError) -> Report:
    kind = "unavailable" if isinstance(error, EngineUnavailableError) else "engine"
    return {"message": str(error), "type": kind}


def _error(status: int, error: MidfillError) -> Response:
    return JSONResponse({"error": _as_dict(error)}, status_code=status)


def _invalid(error: InvalidParamsError) -> Response:
    """Return an error response in OpenAI's form."""
    what = {"message": str(error), "type": "invalid_request_error", "param": error.name or None, "code": None}
    return JSONResponse({"error": what}, status_code=400)


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    """Return the response for an unknown page or a method that a page does not have."""
    if not isinstance(error, HTTPException):
        raise error
    kind = "invalid_request_error"
    what = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
    return JSONResponse(what, status_code=error.status_code, headers=error.headers)


async def _client_gone(_request: HttpRequest, _error: Exception) -> Response:
    """Return a response that nobody reads: the client disconnected in the middle of its request."""
    return Response(status_code=400)

"""A model that others serve: `Engine` over HTTP, on a machine of the team's or in another process here.

The prompt is the one that a model in this process would get, and so is what ends a suggestion; only the
way to the model is another. A request is taken back by closing its stream. Nothing is sent twice but a
request whose connection failed before it was sent, or that a server has refused. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property, partial

import httpx2

from midfill.engine.api import (
    BASE,
    AdapterSource,
    ModelInfo,
    Progress,
    Request,
    Stats,
    TextStream,
    Token,
    Tokenizer,
)
from midfill.engine.remote.client.credentials import find_key
from midfill.engine.remote.client.detection import ServerInfo
from midfill.engine.remote.client.dialects import Healing, RemoteRequest, StreamEvent
from midfill.engine.remote.client.endpoint import (
    Endpoint,
    RejectedRequestError,
    RemoteSpec,
    RetryElsewhereError,
    ServerBusyError,
)
from midfill.engine.remote.client.text_tokenizer import RenderedTokenizer
from midfill.engine.token_healing import TokenIndex
from midfill.errors import (
    AdapterError,
    EngineError,
    EngineOverloadedError,
    EngineUnavailableError,
    MidfillError,
)
from midfill.system.printable import shown

_LOG = logging.getLogger(__name__)

_SWITCH_RATIO = 0.7
"""One moves to a server that is expected to answer in this share of the time: the old one has the KV."""
_WEIGHT = 0.2

_STOPPED = "The engine was closed."


class RemoteEngine:
    """`Engine` on one or several servers; see the module."""

    def __init__(self, spec: RemoteSpec) -> None:
        self._spec = spec
        self._endpoints: list[Endpoint] = []
        self._model: ModelInfo | None = None
        self._tokenizer: Tokenizer = RenderedTokenizer()
        self._current: Endpoint | None = None
        self._prewarming: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._adapters: tuple[AdapterSource, ...] = ()
        self._closed = False

    @property
    def model(self) -> ModelInfo:
        """The model behind the URL; see `Engine.model`."""
        if self._model is None or self._closed:
            raise EngineUnavailableError(_STOPPED if self._closed else "The engine has not been reached yet.")
        return self._model

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """The servers, for whoever looks at them (`midfill engine check`)."""
        return self._endpoints

    async def start(self, progress: Progress) -> None:
        """Reach the servers and recognise the model; returns when one is ready. See `Engine.start`."""
        key = await asyncio.to_thread(find_key, self._spec.key) if self._spec.key else None
        await self._disconnect()  # of an earlier try
        self._endpoints = [Endpoint(url, self._spec, key) for url in self._spec.urls]
        try:
            self._model = await self._detect_all(progress)
            for endpoint in self._endpoints:
                if endpoint.verified:
                    await self._find_adapters(endpoint)
        except BaseException:
            await self._disconnect()
            raise

    async def _detect_all(self, progress: Progress) -> ModelInfo:
        """Ask all servers what they have. Raises `EngineError` if none answers or they differ."""
        progress(f"reaching {', '.join(endpoint.address for endpoint in self._endpoints)}", None)
        found = await asyncio.gather(
            *(endpoint.refresh() for endpoint in self._endpoints), return_exceptions=True
        )
        errors = [error for error in found if isinstance(error, BaseException)]
        served = [one for one in found if isinstance(one, ServerInfo)]
        for error in errors:
            if not served or not isinstance(error, MidfillError):
                raise error
            _LOG.warning("%s", error)
        first = served[0]
        for endpoint in self._endpoints:
            if endpoint.served is not None and _identity(endpoint.served) != _identity(first):
                raise EngineError(
                    f"{endpoint.address} serves {endpoint.served.model}, not {first.model} as "
                    f"{self._endpoints[0].address} does; the servers of `engine` must have the same model."
                )
        self._tokenizer = first.tokenizer or RenderedTokenizer()
        return ModelInfo(
            # What a server calls things is shown in many places.
            name=first.catalogue_name or shown(first.model),
            family=first.family,
            architecture=shown(first.architecture),
            context=first.context,
            tokenizer=self._tokenizer,
            device=shown(first.device),
            dtype=shown(first.dtype),
            adapter=shown(first.adapter) if first.adapter is not None else None,
            served_by="" if first.dialect == "midfill" else first.kind.title,
            proven=first.proven,
        )

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Tokens as they come; see `Engine.generate`."""
        _ = self.model
        stats = request.stats
        stats.submitted_s = time.monotonic()
        stats.num_prompt = len(request.tokens)
        if not request.idle:
            self._stop_prewarming()
        tried: list[Endpoint] = []
        again = len(self._endpoints) == 1
        try:
            while True:
                endpoint = self._choose(tried)
                try:
                    async with aclosing(self._stream(endpoint, request)) as tokens:
                        async for token in tokens:
                            yield token
                except RetryElsewhereError as failure:
                    if failure.again and again:
                        again = False
                        await asyncio.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - so that not all come at once
                        continue
                    tried.append(endpoint)
                    if all(
                        one in tried or not one.breaker.allows(time.monotonic()) for one in self._endpoints
                    ):
                        raise failure.error from None
                else:
                    return
        finally:
            stats.ended_s = time.monotonic()

    def prewarm(
        self,
        tokens: Sequence[int],
        adapter: str | None = None,
        *,
        user: str = "",  # noqa: ARG002 - the server knows its users
    ) -> None:
        """Let the server compute a prompt, unless it has work of ours or each request costs money."""
        endpoint = self._current or next(iter(self._endpoints), None)
        if endpoint is None or endpoint.served is None or not endpoint.verified or endpoint.num_running:
            return
        if endpoint.served.kind.warm_tokens is not None:
            self._stop_prewarming()
            self._prewarming = self._spawn(self._send_prewarm(endpoint, tuple(tokens), adapter))

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """See `Adaptable.set_adapters`: each is a model of that name on the servers.

        Raises `AdapterError` if one of those that answer has it not. A server that is away is asked when it
        comes back; until it has an adapter, its requests go to the model alone.
        """
        found: list[tuple[Endpoint, dict[str, str]]] = []
        for endpoint in self._endpoints:
            if endpoint.served is None or not endpoint.verified:
                continue
            try:
                names = {one.key: await endpoint.find_adapter(one) for one in adapters}
            except EngineError as error:
                self._failed(endpoint, error)
            else:
                found.append((endpoint, names))
        self._adapters = tuple(adapters)
        for endpoint, names in found:
            endpoint.adapters = names

    async def _find_adapters(self, endpoint: Endpoint) -> None:
        """After a server came back: it may have lost them. Raises `EngineError`."""
        endpoint.adapters = {}
        for one in self._adapters:
            try:
                endpoint.adapters[one.key] = await endpoint.find_adapter(one)
            except AdapterError as error:
                _LOG.warning("%s The model answers without it.", error)

    async def close(self) -> None:
        """Hang up; see `Engine.close`."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._disconnect()

    async def _disconnect(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.client.aclose()

    # Which server

    def _choose(self, tried: Sequence[Endpoint]) -> Endpoint:
        """The server that will probably answer first; the one before, unless another is clearly quicker."""
        if self._closed:
            raise EngineUnavailableError(_STOPPED)
        now = time.monotonic()
        open_ = [one for one in self._endpoints if one not in tried and one.breaker.allows(now)]
        for unknown in [one for one in open_ if one.served is None]:
            # It was away at the start; nobody waits for it while there are others.
            open_.remove(unknown)
            unknown.breaker.begin()
            self._spawn(self._connect_late(unknown))
        if not open_:
            why = next((one.breaker.why for one in self._endpoints if one.breaker.why), "No engine is there.")
            raise EngineUnavailableError(why)

        def expected(one: Endpoint) -> float:
            stay = _SWITCH_RATIO if one is self._current else 1.0
            return one.latency_s * (1 + one.num_running) * stay

        self._current = min(open_, key=expected)
        return self._current

    async def _connect_late(self, endpoint: Endpoint) -> None:
        """Recognise a server that was away at the start."""
        try:
            found = await endpoint.refresh()
            await self._find_adapters(endpoint)
        except EngineError as error:
            endpoint.breaker.fail(time.monotonic(), str(error), at_least_s=5.0)
            return
        known = next(one.served for one in self._endpoints if one.served is not None and one is not endpoint)
        if _identity(found) != _identity(known):
            endpoint.served = None
            why = f"{endpoint.address} serves {found.model}, not the model of the others."
            endpoint.breaker.fail(time.monotonic(), why, at_least_s=60.0)
        else:
            endpoint.breaker.succeed()

    # One request

    async def _stream(self, endpoint: Endpoint, request: Request) -> AsyncGenerator[Token, None]:
        """The tokens of one server. Raises `RetryElsewhereError` only before the first of them."""
        endpoint.breaker.begin()
        endpoint.num_running += 1
        begun = time.monotonic()
        began = False
        try:
            if not endpoint.verified:
                await self._verify(endpoint)
            async with aclosing(self._answer(endpoint, request)) as tokens:
                async for token in tokens:
                    if not began:
                        began = True
                        took = time.monotonic() - begun
                        endpoint.latency_s += (took - endpoint.latency_s) * (
                            _WEIGHT if endpoint.latency_s else 1
                        )
                        endpoint.breaker.succeed()
                    yield token
            endpoint.breaker.succeed()
        except RetryElsewhereError as failure:
            self._failed(endpoint, failure.error)
            if began:
                raise failure.error from None
            raise
        except EngineError as error:
            self._failed(endpoint, error)
            raise
        finally:
            endpoint.num_running -= 1
            endpoint.breaker.abandon()

    async def _verify(self, endpoint: Endpoint) -> None:
        """After a failure, ask whether it is the same model still."""
        try:
            await endpoint.refresh()
            await self._find_adapters(endpoint)
        except EngineError as error:
            endpoint.verified = False
            raise RetryElsewhereError(error) from None

    def _failed(self, endpoint: Endpoint, error: EngineError) -> None:
        """Note a failure. One that is a single request's is no sign that the server is down."""
        if isinstance(error, (RejectedRequestError, ServerBusyError)):
            return
        now = time.monotonic()
        wait_s = 1.0 if isinstance(error, EngineOverloadedError) else 0.0
        if endpoint.breaker.failures == 0:
            _LOG.warning("%s", error)
        endpoint.breaker.fail(now, str(error), at_least_s=wait_s)
        endpoint.verified = False

    async def _answer(self, endpoint: Endpoint, request: Request) -> AsyncGenerator[Token, None]:
        """Tokens of one request, begun with `forced_prefix` in the way that the server can."""
        query = self._build_request(endpoint, request)
        served = endpoint.served
        if served is None:
            raise AssertionError("it has been recognised")
        if served.dialect == "midfill":
            request.on_idle = partial(self._tell_idle, endpoint, query.id)
        held = request.forced_prefix
        if held and served.kind.healing is Healing.NONE:
            query = self._build_request(endpoint, request, (*request.tokens, *self._tokenizer.encode(held)))
        elif held and served.kind.healing is Healing.TOKENS:
            chosen: list[Token] = []
            async with aclosing(self._generate_forced_prefix(endpoint, request, chosen)) as tokens:
                async for token in tokens:
                    yield token
            ids = (*request.tokens, *(token.id for token in chosen))
            if len(chosen) >= request.max_new_tokens or not chosen:
                return
            query = replace(
                self._build_request(endpoint, request, ids),
                max_tokens=request.max_new_tokens - len(chosen),
            )
        elif held:
            query = replace(query, forced_prefix=held)
        written = served.kind.healing is not Healing.NONE or not held
        async with aclosing(self._tokens(endpoint, query, request)) as tokens:
            async for token in tokens:
                if not written:
                    # The server has read what it was to write.
                    yield Token(-1, held, None)
                    written = True
                yield token

    async def _generate_forced_prefix(
        self, endpoint: Endpoint, request: Request, chosen: list[Token]
    ) -> AsyncGenerator[Token, None]:
        """The tokens of `forced_prefix`, one request each; `chosen` gets them too, or is empty if it fails."""
        remaining = request.forced_prefix.encode()
        while remaining and len(chosen) < request.max_new_tokens:
            allowed = self._index.allowed(remaining)
            ids = (*request.tokens, *(token.id for token in chosen))
            query = replace(
                self._build_request(endpoint, request, ids),
                max_tokens=1,
                allowed_ids=tuple(allowed),
            )
            async with aclosing(self._tokens(endpoint, query, request)) as tokens:
                token = await anext(tokens, None)
            if token is None:
                chosen.clear()
                return
            if token.id < 0:
                raise RejectedRequestError(
                    f"{endpoint.address} does not tell the ids of its tokens, as vLLM does; "
                    '`engine_api = "openai"` does without them.'
                )
            chosen.append(token)
            yield token
            remaining = remaining[len(self._pieces[token.id]) :]

    def _build_request(
        self, endpoint: Endpoint, request: Request, ids: Sequence[int] | None = None
    ) -> RemoteRequest:
        served = endpoint.served
        if served is None:
            raise RetryElsewhereError(
                EngineUnavailableError(f"{endpoint.address} has not been recognised yet.")
            )
        ids = request.tokens if ids is None else ids
        prompt: Sequence[int] | str = ids
        suffix = ""
        stops: tuple[str, ...] = ()
        if isinstance(self._tokenizer, RenderedTokenizer):
            prompt = self._tokenizer.render(ids, bos=served.kind.takes_bos)
            stops = tuple(self._tokenizer.decode([token]) for token in sorted(request.stop_ids))
            if served.kind.takes_suffix:
                prompt, suffix = self._tokenizer.around(ids)
        return RemoteRequest(
            id=uuid.uuid4().hex,
            model=self._model_for(endpoint, served, request.adapter),
            prompt=prompt,
            suffix=suffix,
            max_tokens=request.max_new_tokens,
            stop_ids=() if stops else tuple(sorted(request.stop_ids)),
            stops=stops,
            idle=request.idle,
            # Our own server on this machine knows adapters by their keys; others by names, as models.
            adapter=request.adapter if self._spec.socket is not None else None,
        )

    def _model_for(self, endpoint: Endpoint, served: ServerInfo, adapter: str | None) -> str:
        """The model that a request names, which with an adapter is another."""
        if adapter == BASE:
            return served.base
        return endpoint.adapters.get(adapter or "", served.model)

    @cached_property
    def _pieces(self) -> Sequence[bytes]:
        return self._tokenizer.vocab_bytes()

    @cached_property
    def _index(self) -> TokenIndex:
        """Two seconds for a large vocabulary; only where healing needs it."""
        return TokenIndex(self._pieces, self._tokenizer.control_ids)

    async def _tokens(
        self, endpoint: Endpoint, query: RemoteRequest, request: Request
    ) -> AsyncGenerator[Token, None]:
        """What the server writes, as tokens: up to a stop id, a control token, or as many as were asked."""
        exact = not isinstance(self._tokenizer, RenderedTokenizer)
        stops = request.stop_ids | self._tokenizer.control_ids if exact else frozenset()
        decoder = self._tokenizer.stream()
        left = query.max_tokens
        own = endpoint.served is not None and endpoint.served.dialect == "midfill"
        async with aclosing(endpoint.ask(query, self._spec.first_token_s)) as pieces:
            async for piece in pieces:
                _update_stats(request.stats, piece)
                for token in _in_piece(piece, decoder if exact else None):
                    if token.id in stops or left <= 0:
                        return
                    # A piece of text may be several tokens; their probabilities tell how many.
                    count = 1 if token.id >= 0 else max(len(piece.logprobs), 1)
                    left -= count
                    request.stats.num_generated += count
                    request.stats.first_token_s = request.stats.first_token_s or time.monotonic()
                    yield token
                # Our own server's mark of the end is read as well: the connection can then be used again.
                if piece.done or (left <= 0 and not own):
                    return

    # Ahead of time

    async def _send_prewarm(self, endpoint: Endpoint, tokens: tuple[int, ...], adapter: str | None) -> None:
        """Compute a prompt. Whether it works is nobody's concern."""
        if endpoint.served is None or (limit := endpoint.served.kind.warm_tokens) is None:
            return
        query = self._build_request(endpoint, Request(tokens, limit, idle=True, adapter=adapter))
        with suppress(EngineError, RetryElsewhereError):
            async with aclosing(endpoint.ask(query, self._spec.first_token_s)) as pieces:
                async for _ in pieces:
                    pass

    def _tell_idle(self, endpoint: Endpoint, id_: str, idle: bool) -> None:
        """Somebody waits for a request now, or nobody does any more: our own server wants to know."""

        async def tell() -> None:
            with suppress(httpx2.HTTPError):
                await endpoint.client.post("/midfill/idle", json={"id": id_, "idle": idle})

        self._spawn(tell())

    def _stop_prewarming(self) -> None:
        if self._prewarming is not None:
            self._prewarming.cancel()
            self._prewarming = None

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _identity(served: ServerInfo) -> tuple[object, ...]:
    """What must be equal for one server to stand in for another."""
    return (served.model.rpartition("/")[2], served.family, served.tokenizer is None)


def _in_piece(piece: StreamEvent, decoder: TextStream | None) -> Iterator[Token]:
    """The tokens of a piece; one for all its text where the ids are not told or mean nothing here."""
    if decoder is not None and piece.ids:
        for at, token in enumerate(piece.ids):
            logprob = float(piece.logprobs[at]) if at < len(piece.logprobs) else None
            yield Token(token, decoder.push(token), logprob)
    elif piece.text:
        yield Token(-1, piece.text, float(sum(piece.logprobs)) if piece.logprobs else None)


def _update_stats(stats: Stats, piece: StreamEvent) -> None:
    """Note what the server says of its work."""
    stats.started_s = stats.started_s or time.monotonic()
    if piece.reused is not None:
        stats.num_reused = piece.reused
        stats.num_computed = stats.num_prompt - piece.reused if piece.computed is None else piece.computed

"""A model that a server runs: `Engine` over HTTP, on a team's machine or in another process here.

The prompt and the end of a suggestion are those of a model in this process; only the way to the model
differs. A request is cancelled by closing its stream. Nothing is sent twice except a request whose connection
failed before it was sent, or that a server has refused. Runs on the event loop.
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
from midfill.engine.remote.client.text_tokenizer import TextTokenizer
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
"""Switch to a server if its expected time is below this share of the current one's, which has the KV."""
_WEIGHT = 0.2

_CLOSED = "The engine was closed."


class RemoteEngine:
    """`Engine` on one or several servers."""

    def __init__(self, spec: RemoteSpec) -> None:
        self._spec = spec
        self._endpoints: list[Endpoint] = []
        self._model: ModelInfo | None = None
        self._tokenizer: Tokenizer = TextTokenizer()
        self._current: Endpoint | None = None
        self._prewarming: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._adapters: tuple[AdapterSource, ...] = ()
        self._closed = False

    @property
    def model(self) -> ModelInfo:
        """The model at the URL; see `Engine.model`."""
        if self._model is None or self._closed:
            raise EngineUnavailableError(_CLOSED if self._closed else "The engine has not been reached yet.")
        return self._model

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """The servers, for `midfill engine check`."""
        return self._endpoints

    async def start(self, progress: Progress) -> None:
        """Reach the servers and detect the model; return when one is ready. See `Engine.start`."""
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
        """Detect all servers. Raises `EngineError` if none answers or if their models differ."""
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
        self._tokenizer = first.tokenizer or TextTokenizer()
        return ModelInfo(
            # A server's names are shown to the user in many places.
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
        """Yield tokens as they arrive; see `Engine.generate`."""
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
                        await asyncio.sleep(random.uniform(0.05, 0.15))
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
        user: str = "",
    ) -> None:
        """Let the server compute a prompt, unless it has work of ours or requests cost money."""
        endpoint = self._current or next(iter(self._endpoints), None)
        if endpoint is None or endpoint.served is None or not endpoint.verified or endpoint.num_running:
            return
        if endpoint.served.kind.warm_tokens is not None:
            self._stop_prewarming()
            self._prewarming = self._spawn(self._send_prewarm(endpoint, tuple(tokens), adapter))

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Find these adapters on the servers, where each is a model; see `Adaptable.set_adapters`.

        Raises `AdapterError` if a server that answers does not have one. A server that is unreachable is
        asked when it returns; until it has an adapter, its requests use the base model.
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
        """Find the adapters again on a server that has returned. Raises `EngineError`."""
        endpoint.adapters = {}
        for one in self._adapters:
            try:
                endpoint.adapters[one.key] = await endpoint.find_adapter(one)
            except AdapterError as error:
                _LOG.warning("%s The model answers without it.", error)

    async def close(self) -> None:
        """Disconnect; see `Engine.close`."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._disconnect()

    async def _disconnect(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.client.aclose()

    # Choosing a server.

    def _choose(self, tried: Sequence[Endpoint]) -> Endpoint:
        """Return the server with the least expected latency; prefer the current one."""
        if self._closed:
            raise EngineUnavailableError(_CLOSED)
        now = time.monotonic()
        open_ = [one for one in self._endpoints if one not in tried and one.breaker.allows(now)]
        for unknown in [one for one in open_ if one.served is None]:
            # It was unreachable at the start; do not wait for it while there are others.
            open_.remove(unknown)
            unknown.breaker.begin()
            self._spawn(self._connect_late(unknown))
        if not open_:
            why = next(
                (one.breaker.why for one in self._endpoints if one.breaker.why),
                "No server of `engine` is available.",
            )
            raise EngineUnavailableError(why)

        def expected(one: Endpoint) -> float:
            stay = _SWITCH_RATIO if one is self._current else 1.0
            return one.latency_s * (1 + one.num_running) * stay

        self._current = min(open_, key=expected)
        return self._current

    async def _connect_late(self, endpoint: Endpoint) -> None:
        """Detect a server that was unreachable at the start."""
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

    # One request.

    async def _stream(self, endpoint: Endpoint, request: Request) -> AsyncGenerator[Token, None]:
        """Yield the tokens of one server. Raises `RetryElsewhereError` only before the first."""
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
        """After a failure, check that it is still the same model."""
        try:
            await endpoint.refresh()
            await self._find_adapters(endpoint)
        except EngineError as error:
            endpoint.verified = False
            raise RetryElsewhereError(error) from None

    def _failed(self, endpoint: Endpoint, error: EngineError) -> None:
        """Record a failure, unless it concerns a single request only."""
        if isinstance(error, (RejectedRequestError, ServerBusyError)):
            return
        now = time.monotonic()
        wait_s = 1.0 if isinstance(error, EngineOverloadedError) else 0.0
        if endpoint.breaker.failures == 0:
            _LOG.warning("%s", error)
        endpoint.breaker.fail(now, str(error), at_least_s=wait_s)
        endpoint.verified = False

    async def _answer(self, endpoint: Endpoint, request: Request) -> AsyncGenerator[Token, None]:
        """Yield the tokens of one request, with `forced_prefix` in the way that the server supports."""
        query = self._build_request(endpoint, request)
        served = endpoint.served
        if served is None:
            raise AssertionError("it has been detected")
        if served.dialect == "midfill":
            request.on_idle = partial(self._tell_idle, endpoint, query.id)
        prefix = request.forced_prefix
        if prefix and served.kind.healing is Healing.NONE:
            query = self._build_request(endpoint, request, (*request.tokens, *self._tokenizer.encode(prefix)))
        elif prefix and served.kind.healing is Healing.TOKENS:
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
        elif prefix:
            query = replace(query, forced_prefix=prefix)
        written = served.kind.healing is not Healing.NONE or not prefix
        async with aclosing(self._tokens(endpoint, query, request)) as tokens:
            async for token in tokens:
                if not written:
                    # It was part of the prompt, so the server does not write it.
                    yield Token(-1, prefix, None)
                    written = True
                yield token

    async def _generate_forced_prefix(
        self, endpoint: Endpoint, request: Request, chosen: list[Token]
    ) -> AsyncGenerator[Token, None]:
        """Yield the tokens of `forced_prefix`, one request each. Fill `chosen`; empty it on failure."""
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
                    f"{endpoint.address} does not report the ids of its tokens, as vLLM does; "
                    'set `engine_api = "openai"`, which works without them.'
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
                EngineUnavailableError(f"{endpoint.address} has not been detected yet.")
            )
        ids = request.tokens if ids is None else ids
        prompt: Sequence[int] | str = ids
        suffix = ""
        stops: tuple[str, ...] = ()
        if isinstance(self._tokenizer, TextTokenizer):
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
            # Our own server on this machine knows adapters by key; others know them by name, as models.
            adapter=request.adapter if self._spec.socket is not None else None,
        )

    def _model_for(self, endpoint: Endpoint, served: ServerInfo, adapter: str | None) -> str:
        """Return the model that a request names: with an adapter it is another one."""
        if adapter == BASE:
            return served.base
        return endpoint.adapters.get(adapter or "", served.model)

    @cached_property
    def _pieces(self) -> Sequence[bytes]:
        return self._tokenizer.vocab_bytes()

    @cached_property
    def _index(self) -> TokenIndex:
        """Takes two seconds for a large vocabulary; built only where healing needs it."""
        return TokenIndex(self._pieces, self._tokenizer.control_ids)

    async def _tokens(
        self, endpoint: Endpoint, query: RemoteRequest, request: Request
    ) -> AsyncGenerator[Token, None]:
        """Yield the server's output as tokens, up to a stop id, a control token, or the requested number."""
        exact = not isinstance(self._tokenizer, TextTokenizer)
        stops = request.stop_ids | self._tokenizer.control_ids if exact else frozenset()
        decoder = self._tokenizer.stream()
        left = query.max_tokens
        own = endpoint.served is not None and endpoint.served.dialect == "midfill"
        async with aclosing(endpoint.ask(query, self._spec.first_token_s)) as events:
            async for event in events:
                _update_stats(request.stats, event)
                for token in _tokens_of(event, decoder if exact else None):
                    if token.id in stops or left <= 0:
                        return
                    # A piece of text may be several tokens; the log-probabilities tell how many.
                    count = 1 if token.id >= 0 else max(len(event.logprobs), 1)
                    left -= count
                    request.stats.num_generated += count
                    request.stats.first_token_s = request.stats.first_token_s or time.monotonic()
                    yield token
                # Also read our own server's end mark, so that the connection can be used again.
                if event.done or (left <= 0 and not own):
                    return

    # Prewarming.

    async def _send_prewarm(self, endpoint: Endpoint, tokens: tuple[int, ...], adapter: str | None) -> None:
        """Compute a prompt. Failures are ignored."""
        if endpoint.served is None or (limit := endpoint.served.kind.warm_tokens) is None:
            return
        query = self._build_request(endpoint, Request(tokens, limit, idle=True, adapter=adapter))
        with suppress(EngineError, RetryElsewhereError):
            async with aclosing(endpoint.ask(query, self._spec.first_token_s)) as events:
                async for _ in events:
                    pass

    def _tell_idle(self, endpoint: Endpoint, id_: str, idle: bool) -> None:
        """Tell our own server that the priority of a request has changed."""

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
    """Return what must be equal for one server to replace another."""
    return (served.model.rpartition("/")[2], served.family, served.tokenizer is None)


def _tokens_of(event: StreamEvent, decoder: TextStream | None) -> Iterator[Token]:
    """Yield the tokens of an event; one for all its text if ids are not reported or mean nothing here."""
    if decoder is not None and event.ids:
        for at, token in enumerate(event.ids):
            logprob = float(event.logprobs[at]) if at < len(event.logprobs) else None
            yield Token(token, decoder.push(token), logprob)
    elif event.text:
        yield Token(-1, event.text, float(sum(event.logprobs)) if event.logprobs else None)


def _update_stats(stats: Stats, event: StreamEvent) -> None:
    """Record what the server reports about its work."""
    stats.started_s = stats.started_s or time.monotonic()
    if event.reused is not None:
        stats.num_reused = event.reused
        stats.num_computed = stats.num_prompt - event.reused if event.computed is None else event.computed

"""One model server: its connections, what it serves, its recent state, and one request to it.

Text goes to the URL that the user's own settings name and nowhere else: no redirect is followed, and a proxy
is used only if the environment names one. Every fault becomes one sentence, which stays the same while the
fault lasts. Nothing that is sent or received is logged. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from midfill import __version__
from midfill.engine.api import AdapterSource, LocalModel
from midfill.engine.remote.client import adapters
from midfill.engine.remote.client.circuit_breaker import CircuitBreaker
from midfill.engine.remote.client.detection import ServerInfo, detect, refusal
from midfill.engine.remote.client.dialects import (
    Dialect,
    InvalidResponseError,
    RemoteRequest,
    StreamEvent,
    StreamParser,
)
from midfill.errors import EngineError, EngineOverloadedError, EngineUnavailableError, SettingsError
from midfill.system.file_errors import why_unreadable

_CONNECT_S = 2.0
_BETWEEN_S = 5.0
"""Maximum time between two tokens; a stream without tokens for longer has died.

Unless the server sends comments, which mean that it is alive and the request waits. Decoding on a busy CPU
takes 0.1 to 1 s per token.
"""
_TRAILER_S = 0.02
_MOST_BYTES = 8_000_000
_KEPT_S = 60.0
"""How long an unused connection is kept, so that a user who pauses does not wait for TLS again."""

_LOST = (httpx2.NetworkError, httpx2.RemoteProtocolError)
_STREAMS = {"text/event-stream", "application/x-ndjson", "application/json"}


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """Where the engine is and how to ask it.

    Attributes:
        urls: one or several servers with the same model.
        model: the servers' name for the model; None for their only or first one.
        api: a key of `dialects.DIALECTS`, or "auto".
        key: the source of the API key, see `credentials`; None for none.
        ca: a file of certificates (PEM) to trust in addition to the system's.
        candidates: models on this machine whose vocabularies may be the servers'.
        first_token_s: how long to wait for a first token.
        socket: a Unix socket to reach the one URL through.
    """

    urls: tuple[str, ...]
    model: str | None = None
    api: str = "auto"
    key: str | None = None
    ca: Path | None = None
    candidates: tuple[LocalModel, ...] = ()
    first_token_s: float = 10.0
    socket: Path | None = None


class RetryElsewhereError(Exception):
    """No part of an answer was received: another server may be asked.

    `again`: the same server may be asked again too, because nothing was sent.
    """

    def __init__(self, error: EngineError, *, again: bool = False) -> None:
        super().__init__()
        self.error = error
        self.again = again


class LostError(EngineUnavailableError):
    """The connection could not be made, or ended before the answer: there may be another server by now."""


class RejectedRequestError(EngineError):
    """The server works, but rejects this one request."""


class ServerBusyError(EngineOverloadedError):
    """The server is alive, but this one request has waited too long."""


@dataclass(slots=True)
class _Wait:
    """How long the next token may take.

    Attributes:
        most_s: maximum for a server that is alive.
        began: when it was asked.
        last: when the newest token came.
        alive: when the newest comment came.
    """

    most_s: float
    began: float
    last: float | None = None
    alive: float | None = None

    @property
    def left_s(self) -> float:
        """Remaining time in seconds."""
        if self.last is None:
            until = self.began + self.most_s
        else:
            until = max(self.last, self.alive or 0.0) + _BETWEEN_S
            until = min(until, self.last + max(self.most_s, _BETWEEN_S))
        return max(until - time.monotonic(), 0.0)

    def error(self, address: str) -> EngineError:
        """Return the error for a timeout. The sentence stays the same while the fault lasts."""
        which = "first" if self.last is None else "further"
        if self.alive is not None and time.monotonic() - self.alive < _BETWEEN_S:
            return ServerBusyError(f"{address} is busy: no {which} token within {self.most_s:g} s.")
        if self.last is None:
            return EngineUnavailableError(f"{address} sent no first token within {self.most_s:g} s.")
        return EngineUnavailableError(f"{address} sent no further token for {_BETWEEN_S:g} s.")


class Endpoint:
    """One server: its connections, what it serves, its recent state.

    Attributes:
        served: what was detected; None before.
        verified: it was asked since the last failure; after a failure it may have another model.
        latency_s: moving average of the time to a first token; 0 before the first one.
        num_running: number of active requests.
        adapters: the server's names of the adapters, by the keys that requests use.
    """

    def __init__(self, url: str, spec: RemoteSpec, key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.breaker = CircuitBreaker()
        self.served: ServerInfo | None = None
        self.verified = False
        self.latency_s = 0.0
        self.num_running = 0
        self.adapters: dict[str, str] = {}
        self._spec = spec
        self._loading = asyncio.Lock()
        headers = {"User-Agent": f"midfill/{__version__}"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx2.Limits(max_connections=64, max_keepalive_connections=8, keepalive_expiry=_KEPT_S)
        transport = httpx2.AsyncHTTPTransport(uds=str(spec.socket)) if spec.socket is not None else None
        self.client = httpx2.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx2.Timeout(None, connect=_CONNECT_S, pool=_CONNECT_S),
            limits=limits,
            transport=transport,
            http2=_can_http2(),
            verify=_certificates(spec.ca),
            # HTTP_PROXY and the like, but never for a server on this machine.
            trust_env=spec.socket is None and not is_loopback(self.url),
            follow_redirects=False,
        )

    @property
    def address(self) -> str:
        """Host and port, for the user."""
        return "The shared engine" if self._spec.socket is not None else httpx2.URL(self.url).netloc.decode()

    async def refresh(self) -> ServerInfo:
        """Detect, or check again, what is served. Raises `EngineError`."""
        async with self._loading:
            if self.served is not None and self.verified:
                return self.served
            try:
                found = await detect(
                    self.client,
                    api=self.served.dialect if self.served else self._spec.api,
                    wanted=self.served.model if self.served else self._spec.model,
                    candidates=() if self.served else self._spec.candidates,
                )
            except httpx2.TransportError as error:
                raise self._failure(error) from None
            except TimeoutError:
                raise EngineUnavailableError(f"{self.address} does not answer; check `engine`.") from None
            known = self.served
            if known is not None and known.model in known.models and known.model not in found.models:
                raise EngineUnavailableError(
                    f"{self.address} now serves {found.models[0]}, not {known.model}; restart midfill."
                )
            if known is None:
                self.served = known = found
            self.verified = True
            return known

    async def find_adapter(self, source: AdapterSource) -> str:
        """Return the server's name of an adapter. Raises `EngineError`, `AdapterError`."""
        if self.served is None:
            raise EngineUnavailableError(f"{self.address} has not been detected yet.")
        try:
            return await adapters.find(self.client, self.served, source, is_local=is_loopback(self.url))
        except httpx2.TransportError as error:
            raise self._failure(error) from None
        except (TimeoutError, InvalidResponseError):
            raise EngineUnavailableError(f"{self.address} does not report which adapters it has.") from None

    def _failure(self, error: httpx2.TransportError) -> EngineUnavailableError:
        """Return the error for a failed connection, without the library's own words, which change."""
        why = {
            httpx2.ConnectTimeout: f"does not answer within {_CONNECT_S:.0f} s",
            httpx2.ConnectError: "cannot be reached",
            httpx2.ProxyError: "cannot be reached through the proxy that the environment names",
            httpx2.RemoteProtocolError: "violated HTTP or closed the connection",
            httpx2.ReadError: "closed the connection in the middle of an answer",
            httpx2.UnsupportedProtocol: "is not a URL that begins with http:// or https://",
            httpx2.PoolTimeout: "has no free connection for another request",
        }.get(type(error), "broke the connection")
        text = str(error).lower()
        if "certificate" in text:
            why = (
                "has a certificate that this machine does not trust "
                "(set `engine_ca` or SSL_CERT_FILE to your certificate file)"
            )
        kind = LostError if isinstance(error, _LOST) else EngineUnavailableError
        return kind(f"{self.address} {why}.")

    async def ask(self, query: RemoteRequest, first_token_s: float) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of an answer as they arrive. Closing the iterator cancels the request.

        Raises:
            RetryElsewhereError: nothing was received, so another server may be asked.
            ServerBusyError: no token comes for too long, but the server is alive.
            EngineError: the answer is invalid, breaks off, or has no token for too long.
        """
        if self.served is None:
            raise RetryElsewhereError(EngineUnavailableError(f"{self.address} has not been detected yet."))
        kind = self.served.kind
        wait = _Wait(first_token_s, time.monotonic())
        lines = StreamParser()
        num_bytes = 0
        done = False
        async with AsyncExitStack() as stack:
            response = await self._send(stack, kind.path, kind.body(query), wait)
            chunks = response.aiter_bytes()
            while not done:
                chunk = await self._next(chunks, wait)
                num_bytes += len(chunk or b"")
                if num_bytes > _MOST_BYTES:
                    raise EngineUnavailableError(f"{self.address} sent a response that is too long.")
                for event in self._parse(chunk, kind, lines, wait):
                    if event.error:
                        raise RejectedRequestError(event.error)
                    if event.text or event.ids:
                        wait.last = time.monotonic()
                    if event.done and not done:
                        done = True
                        await self._read_out(chunks)
                    yield event
                if chunk is None and not done:
                    raise LostError(f"{self.address} closed the connection in the middle of an answer.")

    def _parse(
        self, chunk: bytes | None, kind: Dialect, lines: StreamParser, wait: _Wait
    ) -> list[StreamEvent]:
        """Return the events that some bytes complete; None means the end of the stream."""
        num_comments = lines.num_comments
        try:
            found = [kind.read(one) if one else StreamEvent(done=True) for one in lines.take(chunk)]
        except InvalidResponseError as error:
            raise EngineUnavailableError(f"{self.address} sent an invalid response: {error}.") from None
        if lines.num_comments > num_comments:
            wait.alive = time.monotonic()
        return found

    async def _send(
        self, stack: AsyncExitStack, path: str, body: dict[str, object], wait: _Wait
    ) -> httpx2.Response:
        """Send a request and check the head of its response."""
        try:
            async with asyncio.timeout(wait.left_s):
                response = await stack.enter_async_context(self.client.stream("POST", path, json=body))
        except TimeoutError:
            raise wait.error(self.address) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise RetryElsewhereError(self._failure(error), again=True) from None
        except httpx2.TransportError as error:
            raise RetryElsewhereError(self._failure(error)) from None
        status = response.status_code
        if (why := refusal(status)) is not None:
            sentence = f"{self.address} {why}"
            if status in {429, 503}:
                raise RetryElsewhereError(EngineOverloadedError(sentence))
            if status in {400, 413, 422}:
                raise RejectedRequestError(sentence)
            raise RetryElsewhereError(EngineUnavailableError(sentence))
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in _STREAMS:
            raise EngineUnavailableError(
                f"{self.address} answered with {kind or 'no content type':.40}, which no model server does; "
                "check `engine`."
            )
        return response

    async def _read_out(self, chunks: AsyncIterator[bytes]) -> None:
        """Read what follows the end of an answer, so that the connection can be used again."""
        with suppress(TimeoutError, httpx2.HTTPError):
            async with asyncio.timeout(_TRAILER_S):
                async for _ in chunks:
                    pass

    async def _next(self, chunks: AsyncIterator[bytes], wait: _Wait) -> bytes | None:
        """Return the next bytes; None at the end."""
        try:
            async with asyncio.timeout(wait.left_s):
                return await anext(chunks, None)
        except TimeoutError:
            raise wait.error(self.address) from None
        except httpx2.DecodingError:
            raise EngineUnavailableError(
                f"{self.address} sent an invalid response: it is wrongly compressed."
            ) from None
        except httpx2.TransportError as error:
            raise self._failure(error) from None


def is_loopback(url: str) -> bool:
    """Return whether the URL is on this machine."""
    host = httpx2.URL(url).host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _certificates(ca: Path | None) -> ssl.SSLContext | bool:
    """Return the certificates to trust: the system's store, or SSL_CERT_FILE, and `engine_ca`."""
    if ca is None:
        return True
    try:
        context = ssl.create_default_context()
        context.load_verify_locations(cafile=str(ca))
    except OSError as error:  # `SSLError` is one
        why = "it has no certificates in PEM" if isinstance(error, ssl.SSLError) else why_unreadable(error)
        raise SettingsError(f"`engine_ca`: cannot read the certificates in {ca}: {why}.") from error
    return context


def _can_http2() -> bool:
    """Return whether the package for HTTP/2 is installed: it comes with the extra `http2`."""
    return importlib.util.find_spec("h2") is not None

"""One served engine: its connections, what it serves, how it has been doing, and one request to it.

Text goes to the URL that the user's own settings name and nowhere else: no redirect is followed, and a
proxy is used only if the environment names one. Whatever is no answer becomes one sentence, which stays the
same while the fault lasts.
Nothing that is sent or received is logged. Runs on the event loop.
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

_CONNECT_S = 2.0
_BETWEEN_S = 5.0
"""A stream without a token for so long has died, unless the server says by comments that it lives and the
request waits. Decoding on a busy CPU takes 0.1 to 1 s a token."""
_TRAILER_S = 0.02
_MOST_BYTES = 8_000_000
_KEPT_S = 60.0
"""How long a connection that nobody uses is kept. A typist who thinks for a while should not wait for TLS."""

_STREAMS = {"text/event-stream", "application/x-ndjson", "application/json"}


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """Where the engine is and how to ask it.

    Attributes:
        urls: one or several servers with the same model.
        model: as the servers call it; None for their only or first one.
        api: a key of `wire.DIALECTS`, or "auto".
        key: where the key comes from, see `credentials`; None for none.
        ca: a file of certificates (PEM) to trust beside the system's.
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
    """Nothing has come back: another server may be asked. `again`: so may this one, for nothing was sent."""

    def __init__(self, error: EngineError, *, again: bool = False) -> None:
        super().__init__()
        self.error = error
        self.again = again


class RejectedRequestError(EngineError):
    """The server is well, but does not take this one request."""


class ServerBusyError(EngineOverloadedError):
    """The server lives, but has not come to this one request for too long."""


@dataclass(slots=True)
class _Wait:
    """How long the next token may take.

    Attributes:
        most_s: the most, of a server that lives.
        began: when it was asked.
        last: when the newest token came; alive: when the newest comment did.
    """

    most_s: float
    began: float
    last: float | None = None
    alive: float | None = None

    @property
    def left_s(self) -> float:
        """Seconds from now on."""
        if self.last is None:
            until = self.began + self.most_s
        else:
            until = max(self.last, self.alive or 0.0) + _BETWEEN_S
            until = min(until, self.last + max(self.most_s, _BETWEEN_S))
        return max(until - time.monotonic(), 0.0)

    def error(self, address: str) -> EngineError:
        """What it means that the time is over. The sentence stays the same while the fault lasts."""
        which = "first" if self.last is None else "further"
        if self.alive is not None and time.monotonic() - self.alive < _BETWEEN_S:
            return ServerBusyError(f"{address} is busy: no {which} token within {self.most_s:g} s.")
        if self.last is None:
            return EngineUnavailableError(f"{address} gave no first token within {self.most_s:g} s.")
        return EngineUnavailableError(f"{address} gave no further token for {_BETWEEN_S:g} s.")


class Endpoint:
    """One server: its connections, what it serves, how it has been doing.

    Attributes:
        served: what was recognised; None before.
        verified: whether it has been asked since the last failure: it may have another model now.
        latency_s: of a first token, lately; 0 before the first one.
        num_running: requests under way.
        adapters: what the server calls the adapters that requests may name, by their keys.
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
            # HTTP_PROXY and the like; never for what is on this machine.
            trust_env=spec.socket is None and not is_loopback(self.url),
            follow_redirects=False,
        )

    @property
    def address(self) -> str:
        """Host and port, for the user."""
        return "The shared engine" if self._spec.socket is not None else httpx2.URL(self.url).netloc.decode()

    async def refresh(self) -> ServerInfo:
        """Find out, or find out again, what is served. Raises `EngineError`."""
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
                raise EngineUnavailableError(self.explain(error)) from None
            except TimeoutError:
                raise EngineUnavailableError(f"{self.address} does not answer; `engine` names it.") from None
            known = self.served
            if known is not None and known.model in known.models and known.model not in found.models:
                raise EngineUnavailableError(
                    f"{self.address} has {found.models[0]} now, not {known.model}; restart midfill to use that."
                )
            if known is None:
                self.served = known = found
            self.verified = True
            return known

    async def find_adapter(self, source: AdapterSource) -> str:
        """What the server calls an adapter; see `adapters.find`. Raises `EngineError`, `AdapterError`."""
        if self.served is None:
            raise EngineUnavailableError(f"{self.address} has not been recognised yet.")
        try:
            return await adapters.find(self.client, self.served, source, is_local=is_loopback(self.url))
        except httpx2.TransportError as error:
            raise EngineUnavailableError(self.explain(error)) from None
        except (TimeoutError, InvalidResponseError):
            raise EngineUnavailableError(f"{self.address} does not say which adapters it has.") from None

    def explain(self, error: httpx2.TransportError) -> str:
        """What a failed connection means, a sentence. Without the library's own words, which change."""
        why = {
            httpx2.ConnectTimeout: f"does not answer within {_CONNECT_S:.0f} s",
            httpx2.ConnectError: "cannot be reached",
            httpx2.ProxyError: "cannot be reached through the proxy that the environment names",
            httpx2.RemoteProtocolError: "does not speak HTTP as it should, or hung up",
            httpx2.ReadError: "hung up in the middle of an answer",
            httpx2.UnsupportedProtocol: "is no URL that begins with http:// or https://",
            httpx2.PoolTimeout: "has too many open connections of ours",
        }.get(type(error), "failed on the way")
        text = str(error).lower()
        if "certificate" in text:
            why = (
                "has a certificate that this machine does not trust "
                "(`engine_ca` or SSL_CERT_FILE names a file of yours)"
            )
        return f"{self.address} {why}."

    async def ask(self, query: RemoteRequest, first_token_s: float) -> AsyncGenerator[StreamEvent, None]:
        """The pieces of an answer as they come; closing the iterator hangs up, which ends the server's work.

        Raises:
            RetryElsewhereError: nothing has come back, so that another server may be asked.
            ServerBusyError: no token comes for too long, but the server says that it lives.
            EngineError: the answer is none, breaks off, or has no token for too long.
        """
        if self.served is None:
            raise RetryElsewhereError(EngineUnavailableError(f"{self.address} has not been recognised yet."))
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
                    raise EngineUnavailableError(f"{self.address} answers without an end.")
                for piece in self._pieces(chunk, kind, lines, wait):
                    if piece.error:
                        raise RejectedRequestError(piece.error)
                    if piece.text or piece.ids:
                        wait.last = time.monotonic()
                    if piece.done and not done:
                        done = True
                        await self._read_out(chunks)
                    yield piece
                if chunk is None and not done:
                    raise EngineUnavailableError(f"{self.address} hung up in the middle of an answer.")

    def _pieces(
        self, chunk: bytes | None, kind: Dialect, lines: StreamParser, wait: _Wait
    ) -> list[StreamEvent]:
        """What some bytes, or None at the end, complete."""
        num_comments = lines.num_comments
        try:
            found = [kind.read(one) if one else StreamEvent(done=True) for one in lines.take(chunk)]
        except InvalidResponseError as error:
            raise EngineUnavailableError(f"The answer of {self.address} makes no sense: {error}.") from None
        if lines.num_comments > num_comments:
            wait.alive = time.monotonic()
        return found

    async def _send(
        self, stack: AsyncExitStack, path: str, body: dict[str, object], wait: _Wait
    ) -> httpx2.Response:
        """Send a request and look at the head of its answer."""
        try:
            async with asyncio.timeout(wait.left_s):
                response = await stack.enter_async_context(self.client.stream("POST", path, json=body))
        except TimeoutError:
            raise wait.error(self.address) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise RetryElsewhereError(EngineUnavailableError(self.explain(error)), again=True) from None
        except httpx2.TransportError as error:
            raise RetryElsewhereError(EngineUnavailableError(self.explain(error))) from None
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
                f"{self.address} answers with {kind or 'no content type':.40}, as a model server does not; "
                "look at `engine`."
            )
        return response

    async def _read_out(self, chunks: AsyncIterator[bytes]) -> None:
        """Read what follows the end of an answer, a mark as a rule: then the connection can be used again."""
        with suppress(TimeoutError, httpx2.HTTPError):
            async with asyncio.timeout(_TRAILER_S):
                async for _ in chunks:
                    pass

    async def _next(self, chunks: AsyncIterator[bytes], wait: _Wait) -> bytes | None:
        """The next bytes; None at the end."""
        try:
            async with asyncio.timeout(wait.left_s):
                return await anext(chunks, None)
        except TimeoutError:
            raise wait.error(self.address) from None
        except httpx2.DecodingError:
            raise EngineUnavailableError(
                f"The answer of {self.address} makes no sense: it is wrongly packed."
            ) from None
        except httpx2.TransportError as error:
            raise EngineUnavailableError(self.explain(error)) from None


def is_loopback(url: str) -> bool:
    """Whether the URL is on this machine."""
    host = httpx2.URL(url).host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _certificates(ca: Path | None) -> ssl.SSLContext | bool:
    """Whom to trust: the system's store, which companies add theirs to, or SSL_CERT_FILE; and `engine_ca`."""
    if ca is None:
        return True
    try:
        context = ssl.create_default_context()
        context.load_verify_locations(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"`engine_ca`: {ca} cannot be read as certificates ({type(error).__name__})."
        ) from error
    return context


def _can_http2() -> bool:
    """Whether the package for it is installed: it comes with the extra `http2`."""
    return importlib.util.find_spec("h2") is not None

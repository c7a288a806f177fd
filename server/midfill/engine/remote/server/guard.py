"""Access control and rate limits of an `EngineApp`: ASGI middleware.

Browsers are refused by their `Origin`, and unknown host names by their `Host`, so that no web page can make a
browser send requests. Limits are per user; a token identifies the user. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from midfill.engine.remote.server.connections import connection_of

_MOST_BYTES = 2_000_000
_PER_SECOND = 20.0
_BURST = 60.0
_BYTES = 50_000
"""A body costs one further request per this many bytes."""
_MOST_AT_ONCE = 16
_MOST_PAGES_AT_ONCE = 8
"""GET requests, such as `/midfill/ready`, which lasts as long as the model loads."""
_REFUSAL_DELAY_S = 0.25
"""A refusal takes this long, so that a client that is refused repeatedly takes no time from others."""
_REQUEST_S = 600.0
"""Maximum duration of a request."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass(slots=True)
class _Bucket:
    """A user's token bucket: how many more requests may come at once, and how many are active."""

    left: float = _BURST
    at: float = field(default_factory=time.monotonic)
    running: int = 0
    reading: int = 0

    def take(self, now: float, *, read: bool = False) -> bool:
        """Return whether one more request may come now; `read` for a GET."""
        self.left, self.at = min(_BURST, self.left + (now - self.at) * _PER_SECOND), now
        full = self.reading >= _MOST_PAGES_AT_ONCE if read else self.running >= _MOST_AT_ONCE
        if self.left < 1 or full:
            return False
        self.left -= 1
        return True

    def enter(self, change: int, *, read: bool) -> None:
        """Record that a request begins (1) or ends (-1)."""
        if read:
            self.reading += change
        else:
            self.running += change


class Guard:
    """ASGI middleware.

    Args:
        app: the application to guard.
        tokens: names of users by token; None if only its owner can reach it.
        names: host names that clients may use.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        tokens: Mapping[str, str] | None,
        names: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._names = names
        self._buckets: dict[str, _Bucket] = {}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle an ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        user, refused = self._authorize(scope)
        if refused is not None:
            await _refuse(send, *refused)
            return
        with suppress(_ClientGoneError):
            await self._forward(user, scope, receive, _sender(scope, send))

    async def _forward(
        self, user: str | None, scope: Mapping[str, Any], receive: Receive, send: Send
    ) -> None:
        if user is None:
            await self._app(scope, _Limited(receive, None), send)
            return
        bucket, read = self._buckets[user], scope["method"] != "POST"
        bucket.enter(1, read=read)
        try:
            async with asyncio.timeout(_REQUEST_S):
                await self._app({**scope, "midfill.user": user}, _Limited(receive, bucket), send)
        except TimeoutError:
            # The response is incomplete, so nothing can follow on this connection.
            connection_of(scope).drop()
            await asyncio.sleep(0)  # lets it notice
        finally:
            bucket.enter(-1, read=read)

    def _authorize(self, scope: Mapping[str, Any]) -> tuple[str | None, tuple[int, str] | None]:
        """Return the user (None for the owner), and status and message of a refusal or None."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if b"origin" in headers:
            return None, (403, "Requests from web pages are not allowed.")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # Programs disagree on which one counts: a proxy may see another request.
            return None, (400, "Content-Length and Transfer-Encoding exclude each other; send one of them.")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or len(length) > 20 or int(length) > _MOST_BYTES:
            return None, (413, f"The request is too large; the limit is {_MOST_BYTES} bytes.")
        if self._tokens is None:
            return None, None
        host = headers.get(b"host", "").rpartition(":")[0] or headers.get(b"host", "")
        if host not in self._names:
            return None, (421, "The host name is not a name of this server (--name).")
        user = self._user(headers.get(b"authorization", ""))
        if user is None:
            return None, (401, "A token is required: Authorization: Bearer TOKEN.")
        connection = connection_of(scope)
        if not connection.registry.admit_user(connection, user):
            return user, (429, "You have too many open connections.")
        bucket = self._buckets.setdefault(user, _Bucket())
        if not bucket.take(time.monotonic(), read=scope["method"] != "POST"):
            return user, (429, "You send too many requests.")
        return user, None

    def _user(self, authorization: str) -> str | None:
        given = authorization.removeprefix("Bearer ").encode()
        found = None
        # Compare all tokens, so that the duration reveals nothing.
        for token, user in (self._tokens or {}).items():
            if hmac.compare_digest(token.encode(), given):
                found = user
        return found


class _Limited:
    """Receives a body up to the size limit; large bodies count as several requests."""

    def __init__(self, receive: Receive, bucket: _Bucket | None) -> None:
        self._receive = receive
        self._bucket = bucket
        self._num_bytes = 0

    async def __call__(self) -> Any:
        message = await self._receive()
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        if self._bucket is not None:
            self._bucket.left -= num_bytes / _BYTES
        if self._num_bytes > _MOST_BYTES:
            raise HTTPException(413, f"The request is too large; the limit is {_MOST_BYTES} bytes.")
        return message


class _ClientGoneError(Exception):
    """The client has disconnected."""


def _sender(scope: Mapping[str, Any], send: Send) -> Send:
    """Return a `send` that ends a response to a lost connection, and lets other tasks run between its parts.

    uvicorn drops what is sent to a lost connection, so a long answer would be computed to its end.
    """
    connection = connection_of(scope)

    async def send_on(message: Any) -> None:
        if connection.gone:
            raise _ClientGoneError
        await send(message)
        if message.get("more_body"):
            await asyncio.sleep(0)

    return send_on


async def _refuse(send: Send, status: int, why: str) -> None:
    await asyncio.sleep(_REFUSAL_DELAY_S)
    what = {"error": {"message": why, "type": "invalid_request_error", "param": None, "code": None}}
    body = json.dumps(what).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status == 400:
        # The end of the body is unknown.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

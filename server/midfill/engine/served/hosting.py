"""Where a `Service` listens, and who may ask it: one user's own socket, or a network with tokens and TLS.

Beyond this machine nothing is served without both. Browsers are refused by their `Origin`, and names that
are not ours by their `Host`, so that no web page can make a browser ask. Bodies are limited, and rates and
queues by user. One process each.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.exceptions import HTTPException

from midfill import textfiles
from midfill.engine.served.host import Host
from midfill.engine.served.service import Service
from midfill.errors import SettingsError

_LOG = logging.getLogger(__name__)

_MOST_BYTES = 2_000_000
_PER_SECOND = 20.0
_BURST = 60.0
_MOST_AT_ONCE = 16

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen.

    Attributes:
        socket: a Unix socket of this user's; None to listen on `host` and `port`.
        tokens: names of users by the token that each sends; none are asked for where it is empty.
        names: host names that clients may call it by, beside `host` and the loopback's.
        behind_proxy: something before it encrypts, so that it may do without TLS beyond the loopback.
    """

    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    tokens: Mapping[str, str] = field(default_factory=dict)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    names: tuple[str, ...] = ()
    behind_proxy: bool = False

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine's users can reach it."""
        try:
            return self.socket is not None or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        """Raise `SettingsError` for what would be open to others."""
        if self.socket is not None:
            return
        if not self.tokens:
            raise SettingsError(
                "Whoever can reach a port can ask it: name a file with lines of `user token` (--tokens FILE)."
            )
        if any(len(token) < 16 for token in self.tokens):
            raise SettingsError("A token is shorter than 16 characters; `openssl rand -hex 24` makes one.")
        if self.is_local or self.behind_proxy:
            return
        if self.tls_cert is None or self.tls_key is None:
            raise SettingsError(
                f"{self.host} is beyond this machine, where code must not go unencrypted: give --tls-cert "
                "and --tls-key, or --behind-proxy if something before it encrypts."
            )


def read_tokens(path: Path) -> dict[str, str]:
    """Users by token, from lines of `user token`. Raises `SettingsError`; so if others may read it."""
    try:
        if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SettingsError(f"Others may read {path}: chmod 600 {path}")
        rows = [line.split() for line in textfiles.read(path).splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"Cannot read the tokens in {path}: {str(error).rstrip('.')}.") from error
    if any(len(row) != 2 for row in rows) or not rows:
        raise SettingsError(f"{path} must have lines of `user token`.")
    return {token: user for user, token in rows}


@dataclass(slots=True)
class _Bucket:
    """A user's requests: how many more may come at once, and how many are under way."""

    left: float = _BURST
    at: float = field(default_factory=time.monotonic)
    running: int = 0

    def take(self, now: float) -> bool:
        """Whether one more may come now."""
        self.left, self.at = min(_BURST, self.left + (now - self.at) * _PER_SECOND), now
        if self.left < 1 or self.running >= _MOST_AT_ONCE:
            return False
        self.left -= 1
        return True


class Guard:
    """ASGI middleware: who may ask, how much and how often."""

    def __init__(self, app: Callable[..., Awaitable[None]], listen: Listen) -> None:
        self._app = app
        self._listen = listen
        self._names = {listen.host, "localhost", "127.0.0.1", "[::1]", "::1", *listen.names}
        self._buckets: dict[str, _Bucket] = {}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused, bucket = self._judge(headers)
        if refused is not None:
            await _refuse(send, *refused)
            return
        counted = scope["method"] == "POST" and bucket is not None
        if counted and bucket is not None:
            bucket.running += 1
        try:
            await self._app(scope, _Limited(receive), send)
        finally:
            if counted and bucket is not None:
                bucket.running -= 1

    def _judge(self, headers: Mapping[bytes, str]) -> tuple[tuple[int, str] | None, _Bucket | None]:
        if b"origin" in headers:
            return (403, "No web page may ask."), None
        if int(headers.get(b"content-length") or 0) > _MOST_BYTES:
            return (413, "The request is too large."), None
        if self._listen.socket is not None:
            return None, None
        host = headers.get(b"host", "").rpartition(":")[0] or headers.get(b"host", "")
        if host not in self._names:
            return (421, "That is not a name of this server (--name)."), None
        user = self._user(headers.get(b"authorization", ""))
        if user is None:
            return (401, "A token is wanted: Authorization: Bearer TOKEN."), None
        bucket = self._buckets.setdefault(user, _Bucket())
        return (
            (None, bucket)
            if bucket.take(time.monotonic())
            else ((429, "Too many requests of yours."), bucket)
        )

    def _user(self, authorization: str) -> str | None:
        given = authorization.removeprefix("Bearer ").encode()
        found = None
        # All are compared, so that the time tells nothing.
        for token, user in self._listen.tokens.items():
            if hmac.compare_digest(token.encode(), given):
                found = user
        return found


class _Limited:
    """What is received, up to the limit."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._num_bytes = 0

    async def __call__(self) -> Any:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > _MOST_BYTES:
            raise HTTPException(413, "The request is too large.")
        return message


async def _refuse(send: Send, status: int, why: str) -> None:
    body = f'{{"error": {{"message": "{why}"}}}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn sends them again when it has ended, and nothing could be put away."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See `run` for who listens to them."""
        yield


async def serve(host: Host, listen: Listen, announce: Callable[[str], None]) -> None:
    """Serve until the process is told to end, or has been idle for long.

    Args:
        host: what is served.
        listen: where.
        announce: called with the address when it listens.

    Raises `SettingsError` if it would be open to others, or the place is taken.
    """
    listen.check()
    sock = _open(listen)
    config = uvicorn.Config(
        Guard(Service(host, own=listen.socket is not None).app, listen),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        ssl_certfile=listen.tls_cert,
        ssl_keyfile=listen.tls_key,
    )
    server = _Server(config)

    def end() -> None:
        server.should_exit = True

    host.on_exit = end
    host.touch()
    inode = listen.socket.stat().st_ino if listen.socket is not None else 0
    announce(_address(listen, sock))
    try:
        await server.serve(sockets=[sock])
    finally:
        await host.close()
        if listen.socket is not None:
            _unlink_own(listen.socket, inode)
        sock.close()


def _open(listen: Listen) -> socket.socket:
    """A socket that listens."""
    try:
        if listen.socket is None:
            return socket.create_server((listen.host, listen.port))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Nobody else may connect, from the first moment on.
        before = os.umask(0o177)
        try:
            listen.socket.unlink(missing_ok=True)
            sock.bind(str(listen.socket))
        finally:
            os.umask(before)
        sock.listen(128)
    except OSError as error:
        place = listen.socket or f"{listen.host}:{listen.port}"
        raise SettingsError(f"Cannot listen on {place}: {error.strerror}.") from error
    return sock


def _unlink_own(path: Path, inode: int) -> None:
    """Remove the socket's file, unless another process has put its own there."""
    with suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()


def _address(listen: Listen, sock: socket.socket) -> str:
    if listen.socket is not None:
        return f"unix:{listen.socket}"
    scheme = "https" if listen.tls_cert else "http"
    name, port = sock.getsockname()[:2]
    return f"{scheme}://{name}:{port}"


def run(host: Host, listen: Listen) -> None:
    """`serve` in a process of its own: one line on stdout says where it listens, and is all that it says."""

    def announce(address: str) -> None:
        sys.stdout.write(address + "\n")
        sys.stdout.flush()
        # Whoever started it waits for the end of this.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    async def until_told() -> None:
        def end() -> None:
            host.on_exit()  # which is `serve`'s by then

        for signum in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):  # Windows
                asyncio.get_running_loop().add_signal_handler(signum, end)
        await serve(host, listen, announce)

    asyncio.run(until_told())

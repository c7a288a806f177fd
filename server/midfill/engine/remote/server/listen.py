"""Where a `EngineApp` listens: at one user's own socket, or in a network, with tokens and TLS.

Beyond this machine nothing is served without both. Who may ask is `guard`'s, how long a connection may take
`connections`'. One process each.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvicorn

from midfill.engine.remote.server.app import EngineApp
from midfill.engine.remote.server.connections import ConnectionLimits, ConnectionRegistry, protocol_of
from midfill.engine.remote.server.guard import Guard
from midfill.engine.remote.server.model_host import ModelHost
from midfill.errors import SettingsError
from midfill.system import text_files

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_ACCEPTED_AT_ONCE = 16
"""Connections that are accepted before anything else is done: so that many do not stop what is under way."""
_BACKLOG = 1024
_SEND_BUFFER = 131_072
"""Of each connection: the system would take megabytes, and it would not be seen that nobody reads."""
_OTHER_FILES = 128
"""Descriptors for everything but connections: the model's files, libraries, logs."""
_MOST_FILES = 16_384


@dataclass(frozen=True, slots=True)
class ListenSpec:
    """Where to listen.

    Attributes:
        socket: a Unix socket of this user's; None to listen on `host` and `port`.
        tokens: names of users by the token that each sends; none are asked for where it is empty.
        names: host names that clients may call it by, beside `host` and the loopback's.
        behind_proxy: something before it encrypts, so that it may do without TLS beyond the loopback. All
            connections come from there then, whoever asks.
        any_temperature: see `asked.read`.
    """

    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    tokens: Mapping[str, str] = field(default_factory=dict)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    names: tuple[str, ...] = ()
    behind_proxy: bool = False
    any_temperature: bool = False

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

    def limits(self) -> ConnectionLimits:
        """What connections may take; a socket of one's own has no anonymous."""
        limits = ConnectionLimits(total=_max_connections())
        if self.socket is not None:
            return replace(limits, anonymous=0, anonymous_per_address=0)
        return replace(limits, anonymous_per_address=0) if self.behind_proxy else limits


def read_tokens(path: Path) -> dict[str, str]:
    """Users by token, from lines of `user token`. Raises `SettingsError`; so if others may read it."""
    try:
        check_private(path)
        rows = [line.split() for line in text_files.read(path).splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"Cannot read the tokens in {path}: {str(error).rstrip('.')}.") from error
    if any(len(row) != 2 for row in rows) or not rows:
        raise SettingsError(f"{path} must have lines of `user token`.")
    return {token: user for user, token in rows}


def check_private(path: Path) -> None:
    """Raise `SettingsError` if others may read a file with a secret, `OSError` if there is none."""
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"Others may read {path}: chmod 600 {path}")


def raise_file_limit() -> None:
    """Have as many descriptors as this process may: each connection takes one."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _max_connections() -> int:
    """As many as there are descriptors for; 0 where that is not known."""
    if resource is None:
        return 0
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, min(soft, _MOST_FILES) - _OTHER_FILES) if soft != resource.RLIM_INFINITY else 0


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn sends them again when it has ended, and nothing could be put away."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See `run` for who listens to them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(_BACKLOG)  # who waits to be accepted waits in the kernel


async def serve(
    host: ModelHost,
    listen: ListenSpec,
    announce: Callable[[str], None],
    *,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve until the process is told to end, or has been idle for long.

    Args:
        host: what is served.
        listen: where.
        announce: called with the address when it listens.
        limits: of connections; None for `ListenSpec.limits`.

    Raises `SettingsError` if it would be open to others, or the place is taken.
    """
    listen.check()
    registry = ConnectionRegistry(limits or listen.limits(), _tls(listen))
    service = EngineApp(host, own=listen.socket is not None, any_temperature=listen.any_temperature)
    names = frozenset({listen.host, "localhost", "127.0.0.1", "[::1]", "::1", *listen.names})
    sock = _open(listen)
    config = uvicorn.Config(
        Guard(service.app, None if listen.socket is not None else listen.tokens, names),
        http=protocol_of(registry),
        log_config=None,
        # It would have a line for each request that is none.
        log_level=logging.ERROR,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
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


def _tls(listen: ListenSpec) -> ssl.SSLContext | None:
    """The certificate that is shown, with its key. Raises `SettingsError`."""
    if listen.tls_cert is None and listen.tls_key is None:
        return None
    if listen.tls_cert is None or listen.tls_key is None:
        raise SettingsError("--tls-cert and --tls-key go together: one of them is missing.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        check_private(listen.tls_key)
        # An encrypted key would make OpenSSL ask on the terminal.
        context.load_cert_chain(listen.tls_cert, listen.tls_key, password=lambda: b"")
    except OSError as error:  # `SSLError` is one
        why = error.strerror or "it is no PEM file, or the key is another certificate's or encrypted"
        raise SettingsError(f"Cannot use {listen.tls_cert} with {listen.tls_key}: {why}.") from error
    return context


def _open(listen: ListenSpec) -> socket.socket:
    """A socket that listens."""
    try:
        if listen.socket is None:
            sock = socket.create_server((listen.host, listen.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Nobody else may connect, from the first moment on.
        before = os.umask(0o177)
        try:
            listen.socket.unlink(missing_ok=True)
            sock.bind(str(listen.socket))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
    except OSError as error:
        place = listen.socket or f"{listen.host}:{listen.port}"
        raise SettingsError(f"Cannot listen on {place}: {error.strerror}.") from error
    return sock


def _unlink_own(path: Path, inode: int) -> None:
    """Remove the socket's file, unless another process has put its own there."""
    with suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()


def _address(listen: ListenSpec, sock: socket.socket) -> str:
    if listen.socket is not None:
        return f"unix:{listen.socket}"
    scheme = "https" if listen.tls_cert else "http"
    name, port = sock.getsockname()[:2]
    return f"{scheme}://{name}:{port}"


def run(host: ModelHost, listen: ListenSpec) -> None:
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

    raise_file_limit()
    asyncio.run(until_told())

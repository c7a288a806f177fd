"""Listen for an `EngineApp`: on a user's own Unix socket, or on a network, with tokens and TLS.

Nothing is served beyond this machine without both. `guard` decides who may ask, `connections` how long a
connection may take. One listener per process.
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
from midfill.system.file_errors import why_unreadable, why_unwritable

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_ACCEPTED_AT_ONCE = 16
"""Connections accepted before other work is done, so that many do not stall active requests."""
_BACKLOG = 1024
_SEND_BUFFER = 131_072
"""Send buffer per connection: the system's default of megabytes would hide that a client does not read."""
_OTHER_FILES = 128
"""Descriptors for everything but connections: the model's files, libraries, logs."""
_MOST_FILES = 16_384


@dataclass(frozen=True, slots=True)
class ListenSpec:
    """Where to listen.

    Attributes:
        socket: a Unix socket of this user's; None to listen on `host` and `port`.
        tokens: names of users by the token that each sends; no token is required if it is empty.
        names: host names that clients may use, besides `host` and the loopback's.
        behind_proxy: a proxy terminates TLS, so that none is needed beyond the loopback. All connections then
            come from the proxy.
        any_temperature: see `request_params.read`.
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
        """Whether only this machine's users can reach it."""
        try:
            return self.socket is not None or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        """Raise `SettingsError` for a listener that would be open to others."""
        if self.socket is not None:
            return
        if not self.tokens:
            raise SettingsError(
                "A network port needs tokens: give a file with lines of `user token` (--tokens FILE)."
            )
        if any(len(token) < 16 for token in self.tokens):
            raise SettingsError("A token has fewer than 16 characters; make one with `openssl rand -hex 24`.")
        if self.is_local or self.behind_proxy:
            return
        if self.tls_cert is None or self.tls_key is None:
            raise SettingsError(
                f"{self.host} can be reached from other machines, so code must be encrypted: give "
                "--tls-cert and --tls-key, or --behind-proxy if a proxy terminates TLS."
            )

    def limits(self) -> ConnectionLimits:
        """Return the limits of connections; a private socket has no anonymous clients."""
        limits = ConnectionLimits(total=_max_connections())
        if self.socket is not None:
            return replace(limits, anonymous=0, anonymous_per_address=0)
        return replace(limits, anonymous_per_address=0) if self.behind_proxy else limits


def read_tokens(path: Path) -> dict[str, str]:
    """Read users by token from lines of `user token`. Raises `SettingsError`, also if others may read it."""
    try:
        check_private(path)
        rows = [line.split() for line in text_files.read(path).splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"Cannot read the tokens in {path}: {why_unreadable(error)}.") from error
    if any(len(row) != 2 for row in rows) or not rows:
        raise SettingsError(f"{path} must consist of lines of `user token`.")
    return {token: user for user, token in rows}


def check_private(path: Path) -> None:
    """Raise `SettingsError` if others may read a file with a secret, `OSError` if there is no file."""
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"Other users may read {path}; run: chmod 600 {path}")


def raise_file_limit() -> None:
    """Raise the limit of open files as far as this process may: each connection takes one."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _max_connections() -> int:
    """Return the number of connections that there are descriptors for; 0 if that is unknown."""
    if resource is None:
        return 0
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, min(soft, _MOST_FILES) - _OTHER_FILES) if soft != resource.RLIM_INFINITY else 0


class _Server(uvicorn.Server):
    """A server that ignores signals.

    uvicorn would raise them again when it ends, so nothing could be cleaned up.
    """

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing; `run` handles signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening with a larger backlog; see `uvicorn.Server`."""
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(_BACKLOG)  # connections wait in the kernel to be accepted


async def serve(
    host: ModelHost,
    listen: ListenSpec,
    announce: Callable[[str], None],
    *,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve until the process is told to end, or has been idle for long.

    Args:
        host: the model.
        listen: where to listen.
        announce: called with the address when it listens.
        limits: of connections; None for `ListenSpec.limits`.

    Raises `SettingsError` if it would be open to others, or if the address is in use.
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
        # It would log a line for each invalid request.
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
    """Return the TLS context with the certificate and its key. Raises `SettingsError`."""
    if listen.tls_cert is None and listen.tls_key is None:
        return None
    if listen.tls_cert is None or listen.tls_key is None:
        raise SettingsError("--tls-cert and --tls-key must be given together.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for file in (listen.tls_cert, listen.tls_key):
        try:
            file.open("rb").close()
        except OSError as error:
            raise SettingsError(f"Cannot read {file}: {why_unreadable(error)}.") from error
    try:
        check_private(listen.tls_key)
        # For an encrypted key OpenSSL would ask for the password on the terminal.
        context.load_cert_chain(listen.tls_cert, listen.tls_key, password=lambda: b"")
    except OSError as error:  # `SSLError` is one
        why = (
            error.strerror
            or "it is not a PEM file, or the key is encrypted or belongs to another certificate"
        )
        raise SettingsError(f"Cannot use {listen.tls_cert} with {listen.tls_key}: {why}.") from error
    return context


def _open(listen: ListenSpec) -> socket.socket:
    """Return a listening socket."""
    try:
        if listen.socket is None:
            sock = socket.create_server((listen.host, listen.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Nobody else may connect, not even before a chmod.
        before = os.umask(0o177)
        try:
            listen.socket.unlink(missing_ok=True)
            sock.bind(str(listen.socket))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
    except OSError as error:
        place = listen.socket or f"{listen.host}:{listen.port}"
        why = error.strerror if listen.socket is None else why_unwritable(error)
        raise SettingsError(f"Cannot listen on {place}: {why}.") from error
    return sock


def _unlink_own(path: Path, inode: int) -> None:
    """Remove the socket's file, unless another process has replaced it."""
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
    """Run `serve` in this process; the only line on stdout is the address."""

    def announce(address: str) -> None:
        sys.stdout.write(address + "\n")
        sys.stdout.flush()
        # The parent process waits for the end of stdout.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    async def until_told() -> None:
        def end() -> None:
            host.on_exit()  # set by `serve` by then

        for signum in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):  # Windows
                asyncio.get_running_loop().add_signal_handler(signum, end)
        await serve(host, listen, announce)

    raise_file_limit()
    asyncio.run(until_told())

"""Connections of an `EngineApp`: how long a request may take to arrive, how many connections are allowed.

uvicorn limits neither, so a client that sends half a request would keep a descriptor forever. Here a
connection is closed when a request's head or body, a TLS handshake, or the client's reading takes too long.
An anonymous connection, which has not sent a valid token yet, makes room for the next one: half a request is
worth less than a new one. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_KEY = "midfill.connection"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of connections.

    Attributes:
        head_s: time from the first byte of a request (on a new connection: from its beginning, the handshake
            of TLS included) to the end of its head.
        body_s: time from there to the end of its body.
        unread_s: time in which a client must read what is ready for it.
        anonymous_per_address: connections from one address without a valid token yet; 0 for any number.
        anonymous: those from all addresses; 0 for any number.
        per_user: connections of one user.
        total: all connections; 0 for any number.
        discarded_bytes: bytes read of a body that was refused, so that the client can read the refusal.
    """

    head_s: float = 10.0
    body_s: float = 10.0
    unread_s: float = 10.0
    anonymous_per_address: int = 32
    anonymous: int = 128
    per_user: int = 64
    total: int = 0
    discarded_bytes: int = 8_000_000


@dataclass(slots=True)
class ConnectionRegistry:
    """The open connections, each group oldest first."""

    limits: ConnectionLimits
    tls: ssl.SSLContext | None = None
    _anonymous: dict[str, dict[Connection, None]] = field(default_factory=dict)  # by address
    _users: dict[str, dict[Connection, None]] = field(default_factory=dict)
    _all: dict[Connection, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._all)

    def enter(self, one: Connection) -> None:
        """Add a connection; others may be closed for it."""
        limits = self.limits
        self._all[one] = None
        mine = self._anonymous.setdefault(one.address, {})
        mine[one] = None
        if one.address and limits.anonymous_per_address and len(mine) > limits.anonymous_per_address:
            next(iter(mine)).drop()
        if limits.anonymous and sum(map(len, self._anonymous.values())) > limits.anonymous:
            # Of the address with the most: other addresses must not make room for it.
            crowd = max(self._anonymous, key=lambda address: len(self._anonymous[address]))
            next(iter(self._anonymous[crowd])).drop()
        if limits.total and len(self._all) > limits.total:
            (self._first_idle() or one).drop()

    def admit_user(self, one: Connection, user: str) -> bool:
        """Record that a connection has sent a valid token. Return whether the user may have one more."""
        if one.user != user:
            self._forget(one)
            one.user = user
        mine = self._users.setdefault(user, {})
        if one not in mine:
            if len(mine) >= self.limits.per_user:
                unused = next((other for other in mine if other.is_idle), None)
                if unused is None:
                    one.user = ""
                    self._anonymous.setdefault(one.address, {})[one] = None
                    return False
                unused.drop()
            mine[one] = None
        return True

    def leave(self, one: Connection) -> None:
        """Remove a connection that has ended, or is about to."""
        self._all.pop(one, None)
        self._forget(one)

    def _first_idle(self) -> Connection | None:
        anonymous = (one for one in self._all if not one.user)
        return next(anonymous, None) or next((one for one in self._all if one.is_idle), None)

    def _forget(self, one: Connection) -> None:
        for groups, name in ((self._anonymous, one.address), (self._users, one.user)):
            group = groups.get(name, {})
            group.pop(one, None)
            if not group:
                groups.pop(name, None)


class Connection(H11Protocol):
    """uvicorn's protocol for one connection, with deadlines."""

    registry: ConnectionRegistry  # of a subclass per server; see `protocol_of`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `connection_of` finds it there.
        self.app_state = {**self.app_state, _KEY: self}
        self.address = ""
        self.user = ""
        self._tcp: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._handshake: asyncio.Task[None] | None = None
        self._arriving = ""  # which part of a request is awaited
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._num_discarded = 0

    @property
    def gone(self) -> bool:
        """True if the client can no longer receive anything."""
        return self.transport.is_closing()

    @property
    def is_idle(self) -> bool:
        """True if no request is active."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the TLS handshake, or HTTP if there is no TLS."""
        self._tcp = transport
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        self._await("head", self.registry.limits.head_s)
        self.registry.enter(self)
        if transport.is_closing():
            return
        if self.registry.tls is None:
            super().connection_made(transport)
        else:
            # The next bytes belong to the handshake.
            transport.pause_reading()
            self._handshake = self.loop.create_task(self._encrypt(transport, self.registry.tls))

    async def _encrypt(self, raw: asyncio.Transport, context: ssl.SSLContext) -> None:
        seconds = self.registry.limits.head_s
        try:
            transport = await self.loop.start_tls(
                raw, self, context, server_side=True, ssl_handshake_timeout=seconds
            )
        except (OSError, asyncio.CancelledError):  # `SSLError` is one
            raw.abort()
            self._end()
            return
        if transport is None or transport.is_closing():
            raw.abort()
            self._end()
            return
        super().connection_made(transport)
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up; see `asyncio.Protocol`."""
        self._end()
        if self.transport is not None:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle data; during the TLS handshake keep it for later."""
        if self.transport is None:
            self._early.append(data)
            return
        if self.conn.our_state is h11.DONE:
            # The request was answered before its body had ended.
            self._num_discarded += len(data)
            if self._num_discarded > self.registry.limits.discarded_bytes:
                self.drop()
                return
        super().data_received(data)
        self._set_deadline()

    def on_response_complete(self) -> None:
        """Set the deadline of the next request; see `H11Protocol`."""
        super().on_response_complete()
        self._set_deadline()

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP; drop the connection if a response has begun already."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.drop()
            return
        super().send_400_response(msg)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; see `H11Protocol`."""
        super().timeout_keep_alive_handler()
        self._set_deadline()

    def pause_writing(self) -> None:
        """Start the deadline for reading: the client does not read what is ready."""
        if self.flow is not None:
            super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Stop the deadline for reading."""
        if self._unread is not None and self.transport is not None and not self.transport.is_closing():
            self._unread.cancel()
            self._unread = None
        if self.flow is not None:
            super().resume_writing()

    def drop(self) -> None:
        """Close the connection at once, whatever is active."""
        self.registry.leave(self)
        if self._handshake is not None:
            self._handshake.cancel()
        if (transport := self.transport or self._tcp) is not None:
            transport.abort()

    def _set_deadline(self) -> None:
        """Set the deadline of the part of a request that is awaited now."""
        limits = self.registry.limits
        state = self.conn.their_state
        if self.transport.is_closing():
            # The client may never read what is still to be sent.
            self._await("", 0)
            self._watch_reader()
        elif state is h11.SEND_BODY:
            self._await("body", limits.body_s)
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            self._await("head", limits.head_s)
        elif state is not h11.IDLE or self.cycle is not None:
            self._await("", 0)
            self._num_discarded = 0

    def _await(self, part: str, seconds: float) -> None:
        if part == self._arriving:
            return
        self._arriving = part
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._on_deadline) if part else None

    def _watch_reader(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(self.registry.limits.unread_s, self.drop)

    def _on_deadline(self) -> None:
        """Refuse or drop the connection: the awaited part has not arrived."""
        if self._arriving == "head" and self.transport is not None and self.conn.trailing_data[0]:
            with_reason = h11.Response(
                status_code=408, headers=[(b"connection", b"close"), (b"content-length", b"0")]
            )
            for event in (with_reason, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()
            self._set_deadline()
        else:
            self.drop()

    def _end(self) -> None:
        self.registry.leave(self)
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()


def protocol_of(registry: ConnectionRegistry) -> type[Connection]:
    """Return the class of a server's connections."""
    return type("Connection", (Connection,), {"registry": registry})


def connection_of(scope: Any) -> Connection:
    """Return the connection of an ASGI request."""
    connection: Connection = scope["state"][_KEY]
    return connection

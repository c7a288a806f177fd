"""Frames of the base protocol: a byte stream to message bodies, and message bodies to a file descriptor.

Knows nothing of JSON, LSP or pygls. `FrameReader` is pure; `FrameWriter` has a thread that writes.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator

from midfill.system.log_stream import write_all

# Nothing an editor sends is larger; a length beyond it is garbage, not a message.
_MAX_BODY_BYTES = 1 << 30
_MAX_HEADER_BYTES = 1 << 16
_CONTENT_LENGTH = re.compile(rb"content-length[ \t]*:[ \t]*(\d{1,20})[ \t]*\Z", re.IGNORECASE)
_HEADER = re.compile(rb"[!-9;-~]+[ \t]*:")
# How long `FrameWriter.close` waits for frames that the client has not read yet.
_CLOSE_S = 2.0


class FrameReader:
    """Split a byte stream into message bodies. Never raises.

    Garbage is skipped up to the next valid header, and reported once.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._length: int | None = None
        self._in_body = False
        self._in_garbage = False

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """Take bytes; yield each complete body, and None where garbage began."""
        self._buffer += data
        while True:
            if self._in_body:
                length = self._length or 0
                if len(self._buffer) < length:
                    return
                body = bytes(self._buffer[:length])
                del self._buffer[:length]
                self._in_body, self._length = False, None
                yield body
                continue
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > _MAX_HEADER_BYTES:
                    # The tail may hold the beginning of a real header.
                    del self._buffer[: -_MAX_HEADER_BYTES // 2]
                    yield from self._note_garbage()
                return
            line = bytes(self._buffer[:end]).rstrip(b"\r")
            del self._buffer[: end + 1]
            yield from self._read_header(line)

    def _read_header(self, line: bytes) -> Iterator[None]:
        # Searched for at the end of the line: garbage without a line end may stand before a header.
        if match := _CONTENT_LENGTH.search(line[-_MAX_HEADER_BYTES:]):
            length = int(match[1])
            if length > _MAX_BODY_BYTES:
                self._length = None
                yield from self._note_garbage()
            else:
                self._length = length
                self._in_garbage = False
        elif not line:
            self._in_body = self._length is not None
        elif not _HEADER.match(line):
            yield from self._note_garbage()

    def _note_garbage(self) -> Iterator[None]:
        if not self._in_garbage:
            self._in_garbage = True
            yield None


class FrameWriter:
    """Write frames on a separate thread, so that a client that does not read never blocks the event loop.

    Args:
        descriptor: the file descriptor to write to.
        on_broken: called on the writer thread, once, when the other end is closed.
    """

    def __init__(self, descriptor: int, on_broken: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_broken = on_broken
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="midfill-writer", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue one frame. Returns at once."""
        self._queue.put(data)

    def close(self) -> None:
        """Write what is queued and end the thread; wait two seconds at most."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            try:
                write_all(self._descriptor, data)
            except OSError:
                self._on_broken()
                return


def to_frame(body: bytes) -> bytes:
    """Return a message body with its header."""
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)

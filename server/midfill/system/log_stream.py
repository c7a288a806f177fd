"""Write to stderr without ever blocking.

An editor need not read its server's stderr, and then the pipe is full after 64 kB. So the server's output is
queued and written by a thread; what exceeds the queue is dropped and counted. This applies to everything that
is written to `sys.stderr` while the server runs: the log, warnings, tracebacks of threads, output of
libraries. Where possible, descriptor 2 itself does not block either, for C libraries, the interpreter's crash
handler and child processes.

Knows nothing of logging or of the protocol. Any thread may write.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Iterator

_MAX_BYTES = 1 << 20
_END_S = 1.0


class Outlet(io.BufferedIOBase):
    """A binary stream whose writes never block.

    Args:
        descriptor: the destination; blocking or not.
    """

    name = "<midfill>"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._queued: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_dropped = 0
        self._busy = False
        self._ending = False
        threading.Thread(target=self._run, name="midfill-log", daemon=True).start()

    def writable(self) -> bool:
        """Return True: the stream is for writing."""
        return True

    def fileno(self) -> int:
        """Return the descriptor, for the crash handler, which cannot use the queue."""
        return self._descriptor

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override] # Buffer: 3.12
        """Queue bytes, or drop them if the queue is full; never block."""
        copy = bytes(data)
        with self._changed:
            if self._num_bytes + len(copy) > _MAX_BYTES:
                self._num_dropped += copy.count(b"\n")
            elif not self._ending:
                self._queued.append(copy)
                self._num_bytes += len(copy)
                self._changed.notify_all()
        return len(copy)

    def end(self) -> None:
        """Flush the queue, for at most a second, and drop all later output."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._queued or self._busy), _END_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queued or self._ending)
                if not self._queued:
                    return
                data = b"".join(self._queued)
                self._queued.clear()
                self._num_bytes = 0
                if self._num_dropped:
                    data += b"midfill: %d lines of the log were dropped here (stderr was not read)\n" % (
                        self._num_dropped
                    )
                    self._num_dropped = 0
                self._busy = True
            # The other end is closed, or the disk is full; try again with later lines.
            with contextlib.suppress(OSError):
                write_all(self._descriptor, data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all data, also to a non-blocking descriptor. Raises `OSError`."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            wait_for(descriptor, writable=True)


def read_some(descriptor: int, num_bytes: int) -> bytes:
    """Read from a descriptor, also from a non-blocking one; b"" at the end. Raises `OSError`."""
    while True:
        try:
            return os.read(descriptor, num_bytes)
        except BlockingIOError:
            wait_for(descriptor, writable=False)


def wait_for(descriptor: int, *, writable: bool) -> None:
    """Wait until a non-blocking descriptor can be written to, or read from."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT if writable else select.POLLIN)
    poll.poll()


def as_text(outlet: Outlet) -> io.TextIOWrapper:
    """Return a text stream into an outlet. Characters that UTF-8 cannot encode are escaped."""
    return io.TextIOWrapper(outlet, "utf-8", "backslashreplace", write_through=True)


@contextlib.contextmanager
def unblocked() -> Iterator[None]:
    """Replace `sys.stderr` by a stream that never blocks, within the context."""
    before = sys.stderr
    outlet = Outlet(_stderr_without_waiting())
    sys.stderr = as_text(outlet)
    try:
        yield
    finally:
        sys.stderr = before
        outlet.end()


def _stderr_without_waiting() -> int:
    """Make descriptor 2 non-blocking if possible; return another descriptor for the same destination."""
    try:
        status = os.fstat(2)
    except OSError:
        # Descriptor 2 is closed. The next file to be opened would get its number, and our output.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        return null
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(status.st_mode) and sys.platform == "linux":
            # Open the pipe again, since the flag would apply to all processes that share it with our parent.
            own = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK)
            os.dup2(own, 2)
            return own
        if stat.S_ISSOCK(status.st_mode) and not any(_is_same(status, number) for number in (0, 1)):
            os.set_blocking(2, False)
    return os.dup(2)


def _is_same(status: os.stat_result, descriptor: int) -> bool:
    try:
        other = os.fstat(descriptor)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (other.st_dev, other.st_ino)

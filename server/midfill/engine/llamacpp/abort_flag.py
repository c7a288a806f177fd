"""A flag that native code reads during a pass, and a thread that raises it when the pass is to be aborted.

llama.cpp calls its abort callback before every operation, a thousand times a pass. A Python function would
need the interpreter lock each time, which another thread may hold for 5 ms. So the callback is a C function
that reads one byte: `strlen` of the standard library, which returns 0 for an empty text and 1 for one of one
character. The thread polls `interrupted` only while a pass runs.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_S = 0.002
"""Interval of polling: a part of the 10 ms that an aborted pass may take to end."""


class AbortFlag:
    """The flag and its thread.

    Attributes:
        function: address of the callback.
        address: address of its argument.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        self.function = ctypes.cast(library.strlen, ctypes.c_void_p)
        self.address = ctypes.addressof(self._text)
        self._watch = _Watch(self._text)
        weakref.finalize(self, self._watch.end)

    @contextmanager
    def raised_when(self, interrupted: Callable[[], bool] | None) -> Iterator[None]:
        """Raise the flag once `interrupted()` is true inside the block; None for never."""
        self._text[0] = b"\1" if interrupted is not None and interrupted() else b"\0"
        if interrupted is None or self._text[0] == b"\1":
            yield
            return
        self._watch.begin(interrupted)
        try:
            yield
        finally:
            self._watch.stop()


class _Watch:
    """The thread's state, which does not refer to its owner."""

    def __init__(self, text: ctypes.Array[ctypes.c_char]) -> None:
        self._text = text
        self._changed = threading.Condition()
        self._interrupted: Callable[[], bool] | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    def begin(self, interrupted: Callable[[], bool]) -> None:
        """Begin to poll."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="midfill-abort", daemon=True)
            self._thread.start()
        with self._changed:
            self._interrupted = interrupted
            self._changed.notify()

    def stop(self) -> None:
        """Stop polling; the flag does not change any more."""
        with self._changed:
            self._interrupted = None
            self._changed.notify()

    def end(self) -> None:
        """End the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._ended:
                if self._interrupted is None:
                    self._changed.wait()
                elif self._interrupted():
                    self._text[0] = b"\1"
                    self._interrupted = None
                else:
                    self._changed.wait(_POLL_S)

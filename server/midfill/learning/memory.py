"""The memory that learning takes, and giving it back. Runs no model, imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_back() -> None:
    """Give the system what has been freed; of a large model that is gone, glibc else keeps nearly half."""
    # Modules refer to each other in circles, which stay until somebody has made enough new objects.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)

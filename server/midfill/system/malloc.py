"""The C library's heap: what is freed goes back to the system, where glibc would keep it for itself.

Does nothing with another C library.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

# glibc's number for the size from which on a block is the system's own, and that size in bytes.
_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def trim() -> None:
    """Give back what has been freed, 100 MB after loading a model, by whatever thread."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def give_large_blocks_back_at_once() -> None:
    """From now on, in the whole process, large blocks go back as soon as they are freed.

    It costs time, since each new block's pages are cleared.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)

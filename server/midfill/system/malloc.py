"""Return freed memory from glibc's heap to the system. Does nothing with another C library."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# glibc's parameter for the size from which on a block is mapped separately, and that size in bytes.
_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def trim() -> None:
    """Return freed memory of all threads to the system: 100 MB after loading a model."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def give_large_blocks_back_at_once() -> None:
    """Make large blocks return to the system as soon as they are freed, from now on, in the whole process.

    This costs time, since the pages of each new block are cleared.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)

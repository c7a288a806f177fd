"""Turns of the processes that share a test run: a serial test runs while all others wait.

Every test holds `running` while it runs, a serial one alone. Each goes through `gate` first, which a serial
test keeps while it waits: otherwise the others, one after the other, would never let it in.
"""

import contextlib
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where tests run in one process
    fcntl = None


@contextlib.contextmanager
def turn(folder, *, alone):
    """Wait for a turn among the processes that use `folder`, and have it within the block."""
    with (Path(folder) / "gate").open("w") as gate, (Path(folder) / "running").open("w") as running:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Not left to closing: a child that a test has forked may have the files open for longer.
            fcntl.flock(running, fcntl.LOCK_UN)
            fcntl.flock(gate, fcntl.LOCK_UN)

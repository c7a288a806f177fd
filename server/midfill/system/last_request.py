"""When a server on this machine last asked its model for a waiting user: the time of an empty file.

Background work (training an adapter) makes the file, looks at its time and pauses while it is recent. Servers
set the time of a file that is there, and make none. Any thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from midfill.system.folders import state_folder
from midfill.system.private import private_folder

# Setting the time takes some microseconds; more often would not change what the training does.
_EVERY_S = 0.25

_last_s = 0.0


def marker_path() -> Path:
    """Return the path of the file. `MIDFILL_STATE` names another folder."""
    return state_folder() / "activity"


def is_due() -> bool:
    """Return whether `mark` would set the time now. Takes no system call."""
    return time.monotonic() - _last_s >= _EVERY_S


def mark() -> None:
    """Record that a user is being served now. Never fails: without the file nothing is recorded."""
    global _last_s  # noqa: PLW0603 - one file, one clock
    if not is_due():
        return
    _last_s = time.monotonic()
    with contextlib.suppress(OSError):
        os.utime(marker_path())


def make_marker() -> None:
    """Make the file, so that servers record their requests from now on. Never fails."""
    path = marker_path()
    with contextlib.suppress(OSError):
        private_folder(path.parent, tighten="MIDFILL_STATE" not in os.environ)
        if not path.exists():
            path.touch(mode=0o600)
            os.utime(path, (0, 0))


def seconds_since() -> float:
    """Return the seconds since the last request; infinite if there was none."""
    try:
        return max(0.0, time.time() - marker_path().stat().st_mtime)
    except OSError:
        return float("inf")

"""A file whose date says when a server on this machine last asked its model for somebody who waits.

Work that can wait (training an adapter) makes it, looks at it and stands aside. Servers touch it where it
is, and make nothing. The file is empty. Any thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from midfill.system.private import private_folder
from midfill.system.state import state_path

# Touching it costs some microseconds; more often would tell nobody more.
_EVERY_S = 0.25

_last_s = 0.0


def activity_path() -> Path:
    """The file. `MIDFILL_STATE` names another folder."""
    return state_path().with_name("activity")


def is_due() -> bool:
    """Whether `note` has something to do; costs nothing."""
    return time.monotonic() - _last_s >= _EVERY_S


def note() -> None:
    """Somebody is being served now. Never fails: where nothing can be written, nobody is told."""
    global _last_s  # noqa: PLW0603 - one file, one clock
    if not is_due():
        return
    _last_s = time.monotonic()
    with contextlib.suppress(OSError):
        os.utime(activity_path())


def watch() -> None:
    """Make the file, so that servers have something to touch."""
    path = activity_path()
    with contextlib.suppress(OSError):
        private_folder(path.parent, tighten="MIDFILL_STATE" not in os.environ)
        if not path.exists():
            path.touch(mode=0o600)
            os.utime(path, (0, 0))


def seconds_since() -> float:
    """How long ago that was; infinite if never."""
    try:
        return max(0.0, time.time() - activity_path().stat().st_mtime)
    except OSError:
        return float("inf")

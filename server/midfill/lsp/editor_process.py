"""The editor's process: notice when it ends, even if it leaves the server's input open.

Knows nothing of LSP. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from functools import partial

import psutil

_LOG = logging.getLogger(__name__)

_CHECK_S = 5.0


async def wait_for_end(process_id: int) -> bool:
    """Wait until the editor's process has ended. Return False at once if it cannot be watched.

    The number comes from the editor and means nothing here if the two run in different containers. So it
    counts only if that process is an ancestor of this one.
    """
    process = _ancestor(process_id)
    if process is None:
        _LOG.info(
            "the editor's process %d is not watched, since it did not start this one; "
            "the server ends when its input does",
            process_id,
        )
        return False
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):  # an old kernel, or it has just ended
            await _wait_for_pidfd(os.pidfd_open(process_id), process)
    # psutil compares the time of birth, too: another process may get the number.
    while _is_alive(process):  # noqa: ASYNC110 - no event exists for this elsewhere
        await asyncio.sleep(_CHECK_S)
    return True


def _ancestor(process_id: int) -> psutil.Process | None:
    """Return the process with this number among the ancestors of this one; None if there is none."""
    try:
        return next((one for one in psutil.Process().parents() if one.pid == process_id), None)
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


async def _wait_for_pidfd(descriptor: int, process: psutil.Process) -> None:
    """Wait until the process of a pidfd has ended; return at once if its number was not `process`'s."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(descriptor, partial(_resolve, ended))
    try:
        if _is_alive(process):
            await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

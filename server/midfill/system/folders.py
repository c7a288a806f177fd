"""The user's folders for what midfill keeps: data that cannot be fetched again, and state of this machine.

Models lie in the cache folder of `models.store`. Nothing here makes a folder; see `private.private_folder`.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the folder of what cannot be fetched again: adapters, trainings, calibrations.

    `MIDFILL_DATA` names another one.
    """
    if chosen := os.environ.get("MIDFILL_DATA"):
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_data_path("midfill")


def state_folder() -> Path:
    """Return the folder of counts and other state of this machine. `MIDFILL_STATE` names another one."""
    chosen = os.environ.get("MIDFILL_STATE")
    return Path(chosen) if chosen else platformdirs.user_state_path("midfill")

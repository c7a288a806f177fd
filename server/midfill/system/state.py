"""The folder for what midfill has counted and seen on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def state_path() -> Path:
    """Return the file of acceptance counts. `MIDFILL_STATE` names another folder."""
    folder = os.environ.get("MIDFILL_STATE")
    return (Path(folder) if folder else platformdirs.user_state_path("midfill")) / "feedback.json"

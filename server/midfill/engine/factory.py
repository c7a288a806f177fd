"""Make the engine that runs a model in this process. Importing it imports no torch and no OpenVINO."""

from __future__ import annotations

from midfill.engine.api import Engine, EngineSpec
from midfill.engine.local import LocalEngine
from midfill.engine.supervisor import Supervisor


def create(spec: EngineSpec) -> Engine:
    """Return an engine that runs a model in this process; nothing is loaded before `start`.

    It is loaded again when a forward pass hangs or its thread dies.
    """
    return Supervisor(lambda: LocalEngine(spec))

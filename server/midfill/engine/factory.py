"""Make the engine that runs a model in this process. Importing it imports neither torch nor OpenVINO."""

from __future__ import annotations

from dataclasses import replace

from midfill.engine.api import Engine, EngineSpec
from midfill.engine.local import LocalEngine
from midfill.engine.supervisor import Supervisor


def create(spec: EngineSpec) -> Engine:
    """Return an engine that runs a model in this process; nothing is loaded before `start`.

    The model is loaded again when a forward pass hangs or the engine thread dies; if its GPU has failed, it
    is loaded on the CPU.
    """
    dtype = spec.dtype if spec.dtype == "float32" else "auto"
    spare = replace(spec, device="cpu", dtype=dtype)
    return Supervisor(
        lambda: LocalEngine(spec), on_cpu=None if spec.device == "cpu" else lambda: LocalEngine(spare)
    )

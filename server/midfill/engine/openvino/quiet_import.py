"""Import OpenVINO without its telemetry.

Importing the package loads a client that counts its uses in ~/intel and can send events to its makers unless
the user has declined. midfill must not do that. The package has a stub for when that client is not installed,
and gets the stub here. Import OpenVINO from this module only.
"""

from __future__ import annotations

import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # this is how Python spells "not to be had"

import openvino as ov  # noqa: E402 - only now
from openvino import op, opset15  # noqa: E402

__all__ = ["op", "opset15", "ov"]

"""Import OpenVINO without its telemetry, and with a bound on what oneDNN keeps.

Importing the package loads a client that counts its uses in ~/intel and can send events to its makers unless
the user has declined. midfill must not do that. The package has a stub for when that client is not installed,
and gets the stub here. Import OpenVINO from this module only.

OpenVINO and the oneDNN in it keep what they compile for each new number of input tokens, a megabyte each, up
to 5,000 and 1,024 of them: with the default model 118 MB after 64 lengths. Compiling again takes no time that
could be measured beside a pass (server/docs/experiments/047-bounded-caches-of-openvino.md).
"""

from __future__ import annotations

import os
import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # this is how Python spells "not to be had"

CACHED_SHAPES = 20
"""Maximum number of input lengths to keep compiled code for."""

# Read by oneDNN when it compiles for the first time; there is no other way to it.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(CACHED_SHAPES))

import openvino as ov  # noqa: E402 - only now
from openvino import op, opset15  # noqa: E402

__all__ = ["CACHED_SHAPES", "op", "opset15", "ov"]

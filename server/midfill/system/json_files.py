"""JSON of files whose author nobody knows: models, adapters, indices, and what midfill itself has kept.

How much memory a text takes as Python objects is decided by how many values it has, not by its length, so
both are counted before it is read. Whatever is wrong with a file is a `ValueError` or an `OSError`. Any
thread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
MAX_VALUES = 1 << 22
"""The largest vocabularies have a million merges: two values each, and one for the pair."""


class JSONFileError(ValueError):
    """A file is no JSON that is read here; the message says why in a few words."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES) -> Any:
    """Return the value of a JSON file.

    Raises:
        JSONFileError: it is no JSON, too large, has too many values, or is nested too deeply.
        OSError: it cannot be read.
    """
    if not path.is_file():
        # Also a pipe or a device, which would never be read to its end.
        raise FileNotFoundError(2, "there is no such file", str(path))
    with path.open("rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise JSONFileError(f"it is larger than {max_bytes >> 20} MB")
    return parse_json(data, max_values=max_values)


def parse_json(data: bytes, *, max_values: int = MAX_VALUES) -> Any:
    """Return the value of a JSON text. Raises `JSONFileError`."""
    if sum(map(data.count, (b",", b"[", b"{", b":"))) > 2 * max_values:
        raise JSONFileError(f"it has more than {max_values} values")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise JSONFileError("it is nested too deeply") from error
    except MemoryError as error:
        raise JSONFileError("it does not fit in memory") from error
    except ValueError as error:
        # The text itself is in a `UnicodeDecodeError`, and may be of any length.
        raise JSONFileError(f"it is no valid JSON: {str(error)[:200]}") from error

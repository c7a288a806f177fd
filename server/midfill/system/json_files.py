"""Read JSON files that are not trusted: of models, adapters, indices, and midfill's own.

The memory of JSON as Python objects depends on the number of its values, not on its length, so both are
limited before it is parsed. Anything wrong with a file raises a `ValueError` or an `OSError`. Any thread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
MAX_VALUES = 1 << 22
"""The largest vocabularies have a million merges, of three values each (two texts and the pair)."""


class JSONFileError(ValueError):
    """A file is not JSON, or exceeds a limit; the message says why in a few words."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES) -> Any:
    """Return the value of a JSON file.

    Raises:
        JSONFileError: it is not JSON, is too large, has too many values, or is nested too deeply.
        OSError: it cannot be read.
    """
    if not path.is_file():
        # Also refuses a pipe or a device, which could block for ever.
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
        # The message of a `UnicodeDecodeError` contains the text, which may be of any length.
        raise JSONFileError(f"it is not valid JSON: {str(error)[:200]}") from error

"""URIs by which editors name documents."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def file_of(uri: str) -> Path | None:
    """Return the absolute path of a `file:` URI; None for any other. Does not touch the disk."""
    try:
        parts = urlsplit(uri)
        if parts.scheme != "file" or parts.netloc not in {"", "localhost"}:
            return None
        path = Path(url2pathname(parts.path))
        return path if path.is_absolute() and "\0" not in str(path) else None
    except ValueError:
        return None

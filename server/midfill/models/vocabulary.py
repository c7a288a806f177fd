"""The tokenizer of a model, whatever it is: a folder or a GGUF file. Any thread."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from midfill.errors import ModelError
from midfill.models.gguf import tokenizer_from_gguf
from midfill.models.tokenizer import FastTokenizer, load_tokenizer


def tokenizer_of(path: Path) -> FastTokenizer:
    """Return the tokenizer of a model's folder or file; the latest one is kept. Raises `ModelError`."""
    if not path.is_file():
        return load_tokenizer(path)
    try:
        facts = path.stat()
    except OSError as error:
        raise ModelError(f"The model file {path} cannot be read: {error.strerror}.") from error
    return _kept(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=1)
def _kept(path: Path, _size: int, _mtime_ns: int) -> FastTokenizer:
    """Return the tokenizer of a file of this size and date: two seconds of work for a large vocabulary."""
    return tokenizer_from_gguf(path)

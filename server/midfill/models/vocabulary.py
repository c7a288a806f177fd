"""The tokenizer of a model, whatever it is: a folder or a GGUF file. Any thread."""

from __future__ import annotations

from pathlib import Path

from midfill.models.gguf import tokenizer_from_gguf
from midfill.models.tokenizer import FastTokenizer, load_tokenizer


def tokenizer_of(path: Path) -> FastTokenizer:
    """Return the tokenizer of a model's folder or file. Raises `ModelError`."""
    return tokenizer_from_gguf(path) if path.is_file() else load_tokenizer(path)

"""Real vocabularies for the tests that want them; they are data beside the repository, not part of it."""

from pathlib import Path

import pytest

from midfill.models import catalogue, store
from midfill.models.gguf import tokenizer_from_gguf
from midfill.models.tokenizer import load_tokenizer

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data():
    """The folder of data beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the data of ../shared are not here: {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def vocabulary():
    """The tokenizer of a real model by name; "qwen2.5-coder" is that of the default model."""
    cached = {}

    def get(name):
        if name not in cached:
            cached[name] = _installed(name) if name == "qwen2.5-coder" else _from_gguf(name)
        return cached[name]

    return get


def _installed(name):
    found = store.find(catalogue.DEFAULT)
    if found is None:
        pytest.skip(f"the vocabulary of {name} is not here: run `midfill model pull {catalogue.DEFAULT}`")
    return load_tokenizer(found.path)


def _from_gguf(name):
    path = SHARED_DATA / "vocabs" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"the vocabularies of ../shared are not here: {path}")
    return tokenizer_from_gguf(path)

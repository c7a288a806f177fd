"""Real vocabularies for the tests that want them; they are data beside the repository, not part of it."""

from pathlib import Path

import pytest

from midfill.fim.templates import FAMILIES
from midfill.models import catalogue, store
from midfill.models.gguf import tokenizer_from_gguf
from midfill.models.gguf_file import open_gguf
from midfill.models.gguf_tokenizer import tokenizer_json
from midfill.models.tokenizer import FastTokenizer, load_tokenizer

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


# Families whose own vocabularies are not here: Llama's, which theirs are made of, with their sentinels.
SENTENCEPIECE = ("codellama", "codestral")


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
            if name in SENTENCEPIECE:
                cached[name] = _with_sentinels(name)
            else:
                cached[name] = _installed(name) if name == "qwen2.5-coder" else _from_gguf(name)
        return cached[name]

    return get


def _installed(name):
    found = store.find(catalogue.DEFAULT)
    if found is None:
        pytest.skip(f"the vocabulary of {name} is not here: run `midfill model pull {catalogue.DEFAULT}`")
    return load_tokenizer(found.path)


def _path(name):
    path = SHARED_DATA / "vocabs" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"the vocabularies of ../shared are not here: {path}")
    return path


@pytest.fixture(scope="session")
def vocabulary_file():
    """The GGUF file with the vocabulary of a real model, by name."""
    return _path


def _from_gguf(name):
    return tokenizer_from_gguf(_path(name))


def _with_sentinels(family):
    row = FAMILIES[family]
    with open_gguf(_path("llama-spm")) as file:
        description = tokenizer_json(file.metadata, "llama-spm")
        taken = len(file.metadata["tokenizer.ggml.tokens"])
    known = {token["content"] for token in description["added_tokens"]}
    for name in (*row.sentinels, row.stops[0]):
        if name not in known:
            token = {"id": taken, "content": name, "special": True, "normalized": False}
            token |= {"single_word": False, "lstrip": False, "rstrip": False}
            description["added_tokens"].append(token)
            taken += 1
    return FastTokenizer(description)

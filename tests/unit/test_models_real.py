"""The default model as users get it: fetched once, converted once, read in seconds."""

import json

import pytest

from midfill.models import catalogue, fetch, store
from midfill.models.tokenizer import load_tokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow]


def silent(message, share):
    pass


@pytest.fixture(scope="module")
def model():
    return fetch.pull(catalogue.DEFAULT, silent)


def test_the_default_model_is_complete(model):
    assert store.find(catalogue.DEFAULT) == model
    assert model.family == "qwen2.5-coder"
    store.check_folder(model.path)
    config = store.read_config(model.path)
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (896, 24, 151_936)
    assert config["tie_word_embeddings"] is True
    assert json.loads((model.path / "midfill.json").read_text())["name"] == catalogue.DEFAULT


def test_its_tokenizer_is_that_of_qwen(model):
    tokenizer = load_tokenizer(model.path)
    assert [tokenizer.token_id(f"<|fim_{part}|>") for part in ("prefix", "middle", "suffix", "pad")] == [
        151_659,
        151_660,
        151_661,
        151_662,
    ]
    assert tokenizer.num_ids == 151_665
    assert {151_643, 151_645, *range(151_659, 151_665)} <= tokenizer.control_ids
    assert tokenizer.encode("def add(a, b):\n    return ") == [750, 912, 2877, 11, 293, 982, 262, 470, 220]

"""In which form a base fits."""

import json
import math

import pytest
from planted_adapters import write_base

from midfill.errors import AdapterError
from midfill.settings import Settings
from midfill.training import memory
from midfill.training.plan import _memory as sentence

SETTINGS = Settings()


@pytest.fixture
def model(tmp_path):
    """As wide as a real one, by what it says of itself: activations count."""
    folder = write_base(tmp_path / "base").path
    config = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 150_000}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def estimate(model, wanted, free, num_processes=1):
    return memory.estimate(model, wanted, SETTINGS, free, num_processes)


def test_the_quickest_form_is_chosen_that_fits(model):
    float32, int8 = (memory.needed(model, form, SETTINGS).total() for form in memory.FORMS)
    assert int8 < float32
    for free, form in ((float32, "float32"), (float32 - 1, "int8"), (int8, "int8")):
        room = estimate(model, "auto", free)
        assert room["base_weights"] == memory.choose_form(room) == form
        assert f"the base model would be held in {form}" in sentence(room)
    assert "not enough for either" in sentence(estimate(model, "auto", int8 - 1))


def test_too_little_memory_is_said_with_the_remedies(model):
    int8 = memory.needed(model, "int8", SETTINGS).total()
    with pytest.raises(AdapterError, match=r"about 0\.\d GB .* in int8, and 0\.\d GB are free. Close other"):
        memory.choose_form(estimate(model, "auto", int8 - 1))
    with pytest.raises(AdapterError, match="fewer --processes"):
        memory.choose_form(estimate(model, "auto", int8, 2), 2)
    # An estimate may be wrong, and there may be swap: who names a form gets it.
    room = estimate(model, "float32", int8)
    assert memory.choose_form(room) == "float32"
    assert "not enough for float32" in sentence(room)


def test_the_two_engines_of_the_evaluation_count(model):
    need = memory.needed(model, "int8", SETTINGS)
    learning = need.weights + need.adapter + need.activations + need.holes
    libraries = need.total() - learning
    assert need.engines < learning, "so small a model learns in more than it answers in"
    large = memory.Need(1e9, 1e8, 3e8, 0, 3e9)
    assert math.isclose(large.total(), 3e9 + libraries)
    assert math.isclose(large.total(2), 3e9 + 2 * libraries)
    assert math.isclose(large.total(3), 4.2e9 + 3 * libraries)

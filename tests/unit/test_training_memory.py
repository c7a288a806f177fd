"""In which form a base fits."""

import json
import math

import pytest
import torch
from planted_adapters import write_base

from midfill.engine.torch.devices import CPU, Device
from midfill.errors import AdapterError, EngineError
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


def gpu(free, capability=(8, 9), index=0):
    return Device(f"cuda:{index}", "cuda", "RTX", 8 << 30, lambda: int(free), capability)


def test_a_gpu_has_its_own_estimate(model):
    need = memory.needed(model, "bfloat16", SETTINGS).on_gpu
    assert need < memory.needed(model, "float32", SETTINGS).on_gpu
    device, room = memory.place(model, "auto", SETTINGS, [gpu(need)])
    assert (device.torch_name, memory.choose_form(room)) == ("cuda:0", "bfloat16")
    assert "in bfloat16 on RTX; " in sentence(room)
    # Its bfloat16 is emulated.
    _, old = memory.place(model, "auto", SETTINGS, [gpu(4e9, (7, 5))])
    assert old["base_weights"] == "float32"


def test_what_does_not_fit_into_a_gpu_is_trained_on_the_cpu_if_no_device_was_named(model):
    small = gpu(memory.needed(model, "bfloat16", SETTINGS).on_gpu - 1)
    assert memory.place(model, "auto", SETTINGS, [small]) == (CPU, None)
    named = Settings(device="cuda")
    with pytest.raises(AdapterError, match=r"needs about 1\.\d GB of the RTX's memory .* set device to cpu"):
        memory.place(model, "auto", named, [small])
    # No backward pass, and so less.
    assert memory.place(model, "auto", named, [small], learns=False)[0] is small


def test_the_setting_of_the_device_counts(model):
    assert memory.place(model, "auto", Settings(device="cpu"), [gpu(8e9)]) == (CPU, None)
    assert memory.place(model, "int8", SETTINGS, [gpu(8e9)]) == (CPU, None)
    with pytest.raises(AdapterError, match="On the RTX the base model is held in bfloat16, not in int8"):
        memory.place(model, "int8", Settings(device="cuda"), [gpu(8e9)])
    with pytest.raises(EngineError, match='"cuda:1" was not found'):
        memory.place(model, "auto", Settings(device="cuda:1"), [gpu(8e9)])


def test_each_process_has_its_own_gpu(model):
    gpus = [gpu(8e9, index=index) for index in range(3)]
    for wanted, rank, name in (("auto", 0, "cuda:0"), ("auto", 2, "cuda:2"), ("cuda:1", 1, "cuda:2")):
        device, _ = memory.place(model, "auto", Settings(device=wanted), gpus, rank=rank)
        assert device.torch_name == name
    with pytest.raises(EngineError, match='"cuda:3" was not found; torch sees 3'):
        memory.place(model, "auto", SETTINGS, gpus, rank=3)


def test_out_of_memory_while_training_is_a_sentence(model):
    message = r"the RTX has no memory left\. Close .* set device to cpu"
    with pytest.raises(AdapterError, match=message), memory.out_of_memory(gpu(8e9)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    with pytest.raises(AdapterError, match="the computer has no memory left"), memory.out_of_memory(CPU):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="another"), memory.out_of_memory(CPU):
        raise RuntimeError("another fault")

"""What an adapter's folder must be like. Products are compared with PEFT's in tests/engine/test_lora.py."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from planted_adapters import LAYERS, change_tensors, write_adapter, write_base

from midfill.adapters.format import fingerprint_of, layers_of, read
from midfill.errors import AdapterError

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def refusal(folder, layers=LAYERS) -> str:
    with pytest.raises(AdapterError) as caught:
        read(folder, layers)
    return str(caught.value)


def test_an_adapter_is_read(tmp_path):
    adapter = read(write_adapter(tmp_path / "a"), LAYERS)
    assert set(adapter.branches) == {name for name in LAYERS if "v_proj" not in name}
    assert adapter.rank == 2
    assert adapter.base == "base"
    branch = adapter.branches["model.layers.1.mlp.up_proj"]
    assert (branch.down.shape, branch.up.shape, branch.scale) == ((2, 8), (16, 2), 2.0)
    assert adapter.num_parameters == 2 * (2 * 16 + 2 * 24)


def test_a_digest_is_that_of_the_content(tmp_path):
    folder = write_adapter(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    write_adapter(tmp_path / "c", seed=1)
    write_adapter(tmp_path / "d", lora_alpha=5)
    digests = [read(tmp_path / name, LAYERS).digest for name in "abcd"]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_weights_of_16_bits(tmp_path):
    folder = write_adapter(tmp_path / "a")
    value = np.full((2, 8), 1.5, ml_dtypes.bfloat16)
    change_tensors(folder, **{KEY: value})
    down = read(folder, LAYERS).branches["model.layers.0.self_attn.q_proj"].down
    assert down.dtype == np.float32
    assert (down == 1.5).all()


def test_scales(tmp_path):
    scale = "model.layers.0.self_attn.q_proj"
    plain = read(write_adapter(tmp_path / "a", rank=4, r=4, lora_alpha=8), LAYERS)
    rooted = read(write_adapter(tmp_path / "b", rank=4, r=4, lora_alpha=8, use_rslora=True), LAYERS)
    assert plain.branches[scale].scale == 2.0
    assert rooted.branches[scale].scale == 4.0


def test_rank_and_alpha_patterns(tmp_path):
    folder = write_adapter(
        tmp_path / "a", rank_pattern={"layers.0.self_attn.q_proj": 1}, alpha_pattern={"up_proj": 6}
    )
    change_tensors(
        folder, **{KEY: np.ones((1, 8), np.float32), KEY.replace("_A", "_B"): np.ones((8, 1), np.float32)}
    )
    branches = read(folder, LAYERS).branches
    assert branches["model.layers.0.self_attn.q_proj"].down.shape == (1, 8)
    assert branches["model.layers.0.self_attn.q_proj"].scale == 4.0
    assert branches["model.layers.1.self_attn.q_proj"].scale == 2.0
    assert branches["model.layers.1.mlp.up_proj"].scale == 3.0


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "up_proj"]},
    ],
)
def test_ways_to_choose_the_same_layers(tmp_path, choice):
    assert len(read(write_adapter(tmp_path / "a", **choice), LAYERS).branches) == 4


@pytest.mark.parametrize("choice", [{}, {"layers_pattern": "layers"}])
def test_only_some_layers(tmp_path, choice):
    folder = write_adapter(tmp_path / "a", layers_to_transform=[1], **choice)
    assert "2 tensors that the model has no place for" in refusal(folder) or "layers.0" in refusal(folder)
    only = {name: shape for name, shape in LAYERS.items() if "layers.1" in name}
    assert set(
        read(write_adapter(tmp_path / "b", layers=only, layers_to_transform=[1], **choice), LAYERS).branches
    ) < set(only)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(" + "x" * 300, "(a+)+", "([a-z]"])
def test_expressions_that_may_take_for_ever(tmp_path, pattern):
    assert "not supported" in refusal(write_adapter(tmp_path / "a", target_modules=pattern))
    assert "not supported" in refusal(write_adapter(tmp_path / "b", rank_pattern={pattern: 2}))


def test_a_missing_key(tmp_path):
    folder = write_adapter(tmp_path / "a")
    change_tensors(folder, **{KEY: None})
    assert KEY in refusal(folder)


def test_an_unexpected_key(tmp_path):
    folder = write_adapter(tmp_path / "a")
    change_tensors(folder, **{KEY.replace("layers.0", "layers.9"): np.zeros((2, 8), np.float32)})
    assert "layers.9" in refusal(folder)


def test_keys_of_another_naming(tmp_path):
    """PEFT only warns of these and behaves as the base model."""
    folder = write_adapter(tmp_path / "a")
    value = read(folder, LAYERS).branches["model.layers.0.self_attn.q_proj"].down
    change_tensors(folder, **{KEY: None, KEY.replace("lora_A.", "lora_A.default."): value})
    assert "does not fit" in refusal(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, bad):
    folder = write_adapter(tmp_path / "a")
    value = np.ones((2, 8), np.float32)
    value[1, 3] = bad
    change_tensors(folder, **{KEY: value})
    assert "not finite" in refusal(folder)


def test_a_wrong_shape(tmp_path):
    folder = write_adapter(tmp_path / "a")
    change_tensors(folder, **{KEY: np.ones((2, 9), np.float32)})
    assert "(2, 9)" in refusal(folder)
    change_tensors(folder, **{KEY: np.ones((3, 8), np.float32)})
    assert "(3, 8)" in refusal(folder)


def test_integers_are_no_weights(tmp_path):
    folder = write_adapter(tmp_path / "a")
    change_tensors(folder, **{KEY: np.ones((2, 8), np.int8)})
    assert "I8" in refusal(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("megatron_config", {"x": 1}),
        ("megatron_core", None),
        ("modules_to_save", ["lm_head"]),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("target_parameters", ["x"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("r", 0),
        ("r", 100_000),
        ("r", "2"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("peft_type", "LOHA"),
        ("an_option_of_next_year", 7),
        ("target_modules", None),
        ("target_modules", 7),
        ("target_modules", ["nothing"]),
        ("rank_pattern", [1]),
    ],
)
def test_options_that_are_not_served(tmp_path, option, value):
    folder = write_adapter(tmp_path / "a", **{option: value})
    if option == "megatron_core":  # a name that is of no use without the other one
        assert read(folder, LAYERS)
    else:
        assert str(folder) in refusal(folder)


@pytest.mark.parametrize("stores", [True, False])
def test_how_the_base_stores_its_weights_does_not_matter(tmp_path, stores):
    assert read(write_adapter(tmp_path / "a", fan_in_fan_out=stores), LAYERS)


def test_a_pickled_adapter_is_not_opened(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is pickled" in refusal(folder)


def test_damaged_files(tmp_path):
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    assert "damaged" in refusal(folder)
    weights.write_bytes(b"\xff" * 16 + content)
    assert "damaged" in refusal(folder)
    for text in ("", "[]", "{", "\xff", "[" * 100_000, json.dumps({"peft_type": "LORA"}) + " " * (1 << 20)):
        (folder / "adapter_config.json").write_text(text, encoding="latin-1")
        assert "not an adapter" in refusal(folder) or "not a LoRA adapter" in refusal(folder)


def test_what_is_no_file_is_not_read(tmp_path):
    folder = write_adapter(tmp_path / "a")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "no adapter" in refusal(folder)
    assert "There is no folder" in refusal(tmp_path / "nowhere")


def test_the_layers_of_a_model(tmp_path):
    assert layers_of(write_base(tmp_path / "base").path) == LAYERS


def test_a_fingerprint_tells_models_of_one_shape_apart(tmp_path):
    one, same, other = (
        write_base(tmp_path / name, seed=seed).path for name, seed in (("1", 0), ("2", 0), ("3", 1))
    )
    assert fingerprint_of(one) == fingerprint_of(same) != fingerprint_of(other)

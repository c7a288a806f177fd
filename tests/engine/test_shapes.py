"""Models of a known shape with random weights: that they are models, and of that shape."""

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from midfill.bench.shapes import SHAPES, write_shape
from midfill.errors import MidfillError

# Facts of the published models.
PARAMETERS = {
    "tiny_starcoder_py": 164_144_128,
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen2.5-coder-7b": 7_615_616_512,
    "starcoderbase-7b": 7_327_263_232,
}
SMALL = {
    "qwen2": {"num_hidden_layers": 2, "hidden_size": 56, "intermediate_size": 96, "vocab_size": 3_000},
    "gpt_bigcode": {"n_layer": 2, "n_embd": 48, "n_inner": 96, "n_positions": 256, "vocab_size": 3_000},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_weights_as_the_real_model(name):
    config = dict(SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["tiny_starcoder_py", "qwen2.5-coder-0.5b"])
async def test_it_runs_and_equals_generate(name, tmp_path):
    model = write_shape(name, tmp_path / "model", changes=SMALL[SHAPES[name]["model_type"]])
    async with tiny.running(model) as engine:
        tokenizer = engine.model.tokenizer
        ids = tokenizer.encode("def add(a, b):\n    return ")
        found = await tiny.collect_ids(engine, ids)
        assert tokenizer.token_id("<|endoftext|>") in tokenizer.control_ids
        assert len(tokenizer.vocab_bytes()) == engine.model.tokenizer.num_ids == 3_000
        assert all(tokenizer.decode([id_]) for id_ in range(3_000))
    assert found == tiny.oracle(tiny.reference(model.path), ids, 16, tokenizer.control_ids)


def test_the_same_seed_gives_the_same_files_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("midfill.bench.shapes._SHARD_ELEMENTS", 50_000)
    shares = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_shape("qwen2.5-coder-0.5b", folder, changes=SMALL["qwen2"], report=shares.append)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert shares[-1] == 1
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_unknown_shape_is_answered_with_the_list(tmp_path):
    with pytest.raises(MidfillError, match=r"There is no shape 'gpt-5'\. Use one of: tiny_starcoder_py, "):
        write_shape("gpt-5", tmp_path)

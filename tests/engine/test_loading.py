"""What is wrong with a model folder is said in a sentence; nothing crashes, nothing is run."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from midfill.errors import EngineError, EngineUnavailableError, ModelError


@pytest.fixture
def model(tmp_path):
    return tiny.write_model("llama", tmp_path / "model")


@pytest.fixture
def weights(model):
    return model.path / "model.safetensors"


async def failure(model, **options) -> str:
    with pytest.raises(ModelError) as caught:
        async with tiny.running(model, **options):
            pass
    return str(caught.value)


def change(weights, **tensors):
    content = {**load_file(weights), **tensors}
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, weights)


NORM = "model.layers.1.input_layernorm.weight"
LINEAR = "model.layers.1.mlp.up_proj.weight"


async def test_a_header_length_of_2_to_the_60(model, weights):
    weights.write_bytes(struct.pack("<Q", 1 << 60) + weights.read_bytes()[8:])
    assert "damaged" in await failure(model)


@pytest.mark.parametrize("keep", [0, 4, 100, 50_000])
async def test_a_truncated_file(model, weights, keep):
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "damaged or cut short" in await failure(model)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", [NORM, LINEAR, "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_values_that_are_not_finite(model, weights, dtype, name, value):
    tensor = load_file(weights)[name].clone()
    tensor.view(-1)[-3] = value
    change(weights, **{name: tensor})
    message = await failure(model, dtype=dtype)
    assert name in message
    assert "not finite" in message


async def test_a_file_that_has_not_the_hash_of_the_manifest(model, weights):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    manifest = {"files": {weights.name: {"bytes": weights.stat().st_size, "sha256": digest}}}
    (model.path / "midfill.json").write_text(json.dumps(manifest))
    async with tiny.running(model):
        pass
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "SHA-256 has changed" in await failure(model)


async def test_a_missing_tensor(model, weights):
    change(weights, **{LINEAR: None})
    assert LINEAR in await failure(model)


async def test_an_unexpected_tensor(model, weights):
    change(weights, **{"model.layers.7.surprise": torch.zeros(3)})
    assert "model.layers.7.surprise" in await failure(model)


async def test_a_wrong_shape(model, weights):
    change(weights, **{LINEAR: torch.zeros(3, 3)})
    message = await failure(model)
    assert "(3, 3)" in message
    assert LINEAR in message


async def test_integers_in_place_of_weights(model, weights):
    change(weights, **{NORM: torch.zeros(48, dtype=torch.int64)})
    assert "I64" in await failure(model)


async def test_old_buffers_are_ignored(model, weights):
    change(weights, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    async with tiny.running(model) as engine:
        assert engine.model.architecture == "llama"


async def test_pickled_weights_are_not_opened(model, weights):
    weights.rename(model.path / "pytorch_model.bin")
    message = await failure(model)
    assert "pytorch_model.bin is pickled" in message


async def test_no_configuration(model):
    (model.path / "config.json").unlink()
    assert "config.json" in await failure(model)


async def test_an_unknown_architecture(model):
    tiny.edit_json(model.path / "config.json", model_type="no-such-model", auto_map={"AutoConfig": "x.Y"})
    assert "config.json" in await failure(model)


async def test_shards_are_read_and_must_lie_in_the_folder(model, weights):
    tensors = load_file(weights)
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in chosen}, model.path / file)
        weight_map |= dict.fromkeys(chosen, file)
    async with tiny.running(model) as engine:
        expected = await tiny.collect_ids(engine, [1, 2, 3])
    weights.unlink()
    index = model.path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    async with tiny.running(model) as engine:
        assert await tiny.collect_ids(engine, [1, 2, 3]) == expected
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))
    assert "outside" in await failure(model)


async def test_after_a_failed_start_requests_hear_the_reason(model, weights):
    weights.unlink()
    engine = tiny.LocalEngine(tiny.EngineSpec(model, device="cpu"))
    with pytest.raises(ModelError):
        await engine.start(lambda *_: None)
    with pytest.raises(EngineUnavailableError, match=r"no model\.safetensors"):
        await tiny.collect(engine, [1])
    await engine.close()


async def test_closing_while_it_loads(model):
    closing = []
    engine = tiny.LocalEngine(tiny.EngineSpec(model, device="cpu", dtype="float32"))
    loop = tiny.asyncio.get_running_loop()

    def progress(message, share):
        if not closing:
            closing.append(tiny.asyncio.run_coroutine_threadsafe(engine.close(), loop))

    with pytest.raises(EngineUnavailableError, match="closed while it loaded"):
        await engine.start(progress)
    await tiny.asyncio.wrap_future(closing[0])


@pytest.mark.parametrize("options", [{"device": "abacus"}, {"dtype": "int3"}, {"device": "cuda:99"}])
async def test_what_cannot_be_had_is_named(model, options):
    with pytest.raises(EngineError, match=next(iter(options.values()))):
        async with tiny.running(model, **options):
            pass


async def test_progress_is_reported(model):
    seen = []
    engine = tiny.LocalEngine(tiny.EngineSpec(model, device="cpu", dtype="float32"))
    await engine.start(lambda message, share: seen.append((message, share)))
    await engine.close()
    assert [message for message, share in seen if share is None] == ["importing torch", "warming up"]
    shares = [share for message, share in seen if message == "loading weights"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1 << 21, 10**12])
def test_a_size_that_no_model_has_is_refused_before_it_takes_memory(model, key, value):
    from midfill.engine.torch.weights import _empty_model

    file = model.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    # Some of them transformers refuses itself.
    with pytest.raises(ModelError, match=r"config\.json"):
        _empty_model(model.path, torch.float32)

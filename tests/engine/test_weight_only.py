"""Layers with 8-bit and 4-bit weights compute what layers with the expanded weights compute."""

from __future__ import annotations

import adapters
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from stepping import Sequences, expected, prompts
from torch import nn
from torch.nn import functional

from midfill.engine.adapters.loaded import read
from midfill.engine.torch import weight_only
from midfill.engine.torch.memory import GROUP
from midfill.engine.torch.quantize import Int8Embedding, Int8Weight
from midfill.engine.torch.runner import TorchRunner
from midfill.engine.torch.weight_only import Int4Linear, Int4Weight, Int8WeightLinear
from midfill.engine.torch.weights import build_model
from midfill.errors import ModelError
from midfill.models.safetensors_io import find_tensors

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows=96, width=2 * GROUP, seed=0):
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed))


def blocks(tensor, size=17):
    return [tensor[start : start + size] for start in range(0, len(tensor), size)]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_weight_is_off_by_half_a_step_at_most(dtype):
    exact = weight()
    packed = Int4Weight.of(exact.shape, blocks(exact), dtype)
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.shape == (96, GROUP)
    assert packed.scales.shape == (2, 96, 2)
    groups = exact.view(96, 2, GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    off = (packed.expanded(0, 96).float() - exact).view(96, 2, GROUP).abs().amax(-1)
    # A stored scale is off by one part in 2^8 at most, which counts eight times at the ends.
    slack = 0.5 + 10 * torch.finfo(dtype).eps
    assert bool((off <= slack * step + 2 * torch.finfo(dtype).eps * exact.abs().max()).all())


def test_values_of_a_4_bit_grid_are_kept():
    codes = torch.randint(0, 16, (32, GROUP), generator=torch.Generator().manual_seed(1))
    codes[:, :2] = torch.tensor([0, 15])
    exact = (codes - 8) * 0.25 + 1.5
    assert torch.equal(Int4Weight.of(exact.shape, [exact], torch.bfloat16).expanded(0, 32).float(), exact)


def test_equal_values_and_zeros_are_kept():
    exact = torch.cat([torch.zeros(1, GROUP), torch.full((1, GROUP), 0.375)])
    found = Int4Weight.of(exact.shape, [exact], torch.float32).expanded(0, 2)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(value):
    exact = weight()
    exact[40, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        Int4Weight.of(exact.shape, blocks(exact), torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 7])
def test_products_are_those_with_the_expanded_weight(dtype, packed, bias, count):
    held = Int4Weight.of((96, 2 * GROUP), [weight()], dtype)
    shift = torch.randn(96).to(dtype) if bias else None
    layer = Int4Linear(held, shift, CPU, packed=packed)
    assert layer.kernel == ("packed" if packed else "plain")
    inputs = weight(count, seed=2).to(dtype)[None]
    exact = functional.linear(inputs.float(), held.expanded(0, 96).float())
    exact = exact if shift is None else exact + shift.float()
    tolerance = 16 * torch.finfo(dtype).eps * float(exact.abs().max())
    with torch.inference_mode():
        output = layer(inputs)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rows", [8, 24])
def test_a_shape_that_has_no_packed_product_gets_a_plain_one(rows):
    layer = Int4Linear(
        Int4Weight.of((rows, GROUP), [weight(rows, GROUP)], torch.float32), None, CPU, packed=True
    )
    assert layer.kernel == "plain"


@pytest.mark.parametrize("dtype", TYPES)
def test_8_bit_weights_with_wide_activations(dtype):
    held = Int8Weight(torch.Size((96, 100)), [weight(96, 100)])
    layer = Int8WeightLinear(held, None, CPU, dtype)
    inputs = weight(5, 100, seed=3).to(dtype)
    exact = inputs.float() @ (held.values.float() * held.scales.float()[:, None]).T
    with torch.inference_mode():
        output = layer(inputs)
    assert output.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=tolerance)


def test_large_weights_are_expanded_in_blocks(monkeypatch):
    held = Int4Weight.of((96, 2 * GROUP), [weight()], torch.float32)
    layer = Int4Linear(held, None, CPU, packed=False)
    inputs = weight(3, seed=4)
    with torch.inference_mode():
        whole = layer(inputs)
        monkeypatch.setattr(weight_only, "_BLOCK_ELEMENTS", 20 * 2 * GROUP)
        torch.testing.assert_close(layer(inputs), whole, rtol=1e-5, atol=1e-5)


WIDE = {"hidden_size": 64, "intermediate_size": 128}


def write(kind, folder):
    return tiny.write_model(kind, folder, **({"n_embd": 64} if kind == "gpt_bigcode" else WIDE)).path


def build(path, dtype, *, fused, packed, compute=torch.float32):
    return build_model(
        path,
        find_tensors(path),
        dtype,
        CPU,
        num_threads=1,
        ahead={},
        report=lambda _: None,
        fused=fused,
        compute=compute,
        packed=packed,
    )


def write_expanded(path, folder, dtype):
    """Write the model whose weights are those that the quantized one has."""
    tensors = load_file(path / "model.safetensors")
    embeddings = ("embed_tokens.weight", "wte.weight")
    exact = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or name.endswith("wpe.weight"):
            exact[name] = tensor
        elif name.endswith(embeddings) or dtype == "int8" or tensor.shape[1] % GROUP:
            held = Int8Weight(tensor.shape, [tensor])
            exact[name] = held.values.float() * held.scales.float()[:, None]
        else:
            exact[name] = Int4Weight.of(tensor.shape, [tensor], torch.float32).expanded(0, len(tensor))
    tied = "lm_head.weight" not in exact
    if tied:
        name = next(name for name in tensors if name.endswith(embeddings))
        head = tensors[name]
        exact["lm_head.weight"] = (
            exact[name].clone()
            if dtype == "int8"
            else Int4Weight.of(head.shape, [head], torch.float32).expanded(0, len(head))
        )
    folder.mkdir()
    for file in path.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_text(file.read_text())
    tiny.edit_json(folder / "config.json", tie_word_embeddings=False)
    save_file(exact, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("dtype", "packed"), [("int8", False), ("int4", False), ("int4", True)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_bigcode", "starcoder2"])
def test_tokens_equal_generate_of_the_expanded_weights(tmp_path, kind, dtype, fused, packed):
    path = write(kind, tmp_path / "model")
    model = build(path, dtype, fused=fused, packed=packed)
    linears = [one for one in model.modules() if isinstance(one, (Int4Linear, Int8WeightLinear))]
    assert not [
        one for one in model.modules() if type(one) in (nn.Linear, nn.Embedding) and len(one.weight) > 600
    ]
    if dtype == "int4":
        assert {one.kernel for one in linears} >= {"packed" if packed else "plain"}
    exact = write_expanded(path, tmp_path / "expanded", dtype)
    [prompt] = prompts(1, 70)
    running = Sequences(TorchRunner(model, dtype, CPU), [prompt])
    for _ in range(20):
        running.step([0])
    assert running.tokens[0] == expected(exact, prompt, 20)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_every_layer_has_the_type_of_the_activations(tmp_path, compute):
    model = build(write("qwen2", tmp_path), "int4", fused=True, packed=True, compute=compute)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    floats = {one.dtype for one in [*model.parameters()] if one.is_floating_point() and one.numel()}
    assert floats == {compute}
    with torch.inference_mode():
        assert model(torch.arange(20)[None]).logits.dtype == compute


def test_a_tensor_at_fault_is_named(tmp_path):
    path = write("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = float("inf")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values"):
        build(path, "int4", fused=True, packed=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
@pytest.mark.parametrize("kind", ["qwen2", "gpt_bigcode"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_an_adapter_on_few_bits_gives_what_peft_gives_on_the_expanded_weights(tmp_path, kind, dtype):
    path = write(kind, tmp_path / "model")
    folder = adapters.write_adapter(path, tmp_path / "adapter", adapters.TARGETS[kind])
    runner = TorchRunner(build(path, dtype, fused=True, packed=True), dtype, CPU)
    adapter = read(folder, path)
    runner.prepare({"key": adapter})()
    exact = adapters.peft_model(write_expanded(path, tmp_path / "expanded", dtype), folder)
    ids = list(range(40))
    with torch.inference_mode():
        expected_logits = exact(torch.tensor([ids])).logits[0, -1]
        plain = exact.get_base_model()
        with exact.disable_adapter():
            base_logits = plain(torch.tensor([ids])).logits[0, -1]
    found = torch.from_numpy(runner.probe(ids, "key"))
    torch.testing.assert_close(found, expected_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(runner.probe(ids, None)), base_logits, rtol=1e-3, atol=1e-3)
    assert float((expected_logits - base_logits).abs().max()) > 0.1

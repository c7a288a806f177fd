from __future__ import annotations

import pytest
import tiny
import torch

from midfill.engine.torch.loading import load_runner
from midfill.engine.torch.quantize import Int8Linear, Int8Weight, supported

pytestmark = pytest.mark.skipif(not supported(), reason="the int8 kernels are for x86")


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Linear:
    return Int8Linear(Int8Weight(weight.shape, weight.split(5)), bias)


@pytest.mark.parametrize("rows", [1, 2, 65])
def test_the_product_is_close_even_beside_an_outlier_row(rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    bias = torch.randn(96, generator=generator)
    inputs = torch.randn(1, rows, 64, generator=generator)
    inputs[0, 0] *= 1000
    expected = torch.nn.functional.linear(inputs, weight, bias)
    error = (linear(weight, bias)(inputs) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.03


def test_rows_of_zeros_are_harmless():
    weight = torch.zeros(8, 16)
    assert linear(weight)(torch.zeros(1, 3, 16)).abs().max() == 0
    assert linear(torch.ones(8, 16))(torch.zeros(1, 1, 16)).abs().max() == 0


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        linear(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("kind", ["gpt_bigcode", "qwen2", "llama"])
def test_an_int8_model_is_close_to_fp32(tmp_path, kind):
    # Weights like a trained model's, not those that make argmax easy.
    tiny.write_model(kind, tmp_path, initializer_range=0.1)
    model = tiny.build(tmp_path, "int8")
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    ids = torch.arange(200)[None]
    with torch.inference_mode():
        expected = tiny.reference(tmp_path)(ids).logits.log_softmax(-1)
        found = model(ids).logits.log_softmax(-1)
    assert found.dtype == torch.float32
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert divergence < 0.02
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_the_weight_that_is_made_during_the_import_is_the_one_in_the_file(tmp_path, tied):
    tiny.write_model("qwen2", tmp_path, tie_word_embeddings=tied)
    runner, met = load_runner(
        tmp_path,
        device="cpu",
        dtype="int8",
        num_threads=2,
        report=lambda _: None,
        meanwhile=lambda: "met",
    )
    assert met == "met"
    ids = torch.arange(200)[None]
    runner._model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        assert torch.equal(runner._model(ids).logits, tiny.build(tmp_path, "int8")(ids).logits)

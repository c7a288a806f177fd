"""An adapter changes the logits exactly as PEFT alone does; one that does not fit is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from midfill.engine.lora import attach_adapter
from midfill.engine.quantize import supported
from midfill.errors import AdapterError

# PEFT 0.21 asks transformers 5.23 for a property by its old name; the oracle here is plain PEFT.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "llama": "all-linear",
}


def write_adapter(model_path, folder, targets, **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(tiny.reference(model_path), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    tiny.write_model("qwen2", tmp_path / "model")
    return write_adapter(tmp_path / "model", tmp_path / "adapter", TARGETS["qwen2"])


def ours(tmp_path, dtype="float32"):
    return tiny.build(tmp_path / "model", dtype)


@pytest.mark.parametrize("kind", list(TARGETS))
async def test_logits_and_tokens_equal_peft(tmp_path, kind):
    model = tiny.write_model(kind, tmp_path / "model")
    folder = write_adapter(model.path, tmp_path / "adapter", TARGETS[kind])
    expected = PeftModel.from_pretrained(tiny.reference(model.path), folder).eval()
    found = ours(tmp_path)
    attach_adapter(found, folder)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, expected(ids).logits)
        assert not torch.allclose(expected(ids).logits, tiny.reference(model.path)(ids).logits)
    async with tiny.running(model, adapter=folder) as engine:
        assert engine.model.adapter == "adapter"
        control = engine.model.tokenizer.control_ids
        prompt = list(range(90))
        assert await tiny.collect_ids(engine, prompt) == tiny.oracle(expected, prompt, 16, control)


@pytest.mark.skipif(not supported(), reason="the int8 kernels are for x86")
def test_an_adapter_on_an_int8_base_stays_close(adapter, tmp_path):
    expected = PeftModel.from_pretrained(tiny.reference(tmp_path / "model"), adapter).eval()
    found = ours(tmp_path, "int8")
    attach_adapter(found, adapter)
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        difference = found(ids).logits - expected(ids).logits
        assert difference.norm() / expected(ids).logits.norm() < 0.2


def refusal(tmp_path, adapter) -> str:
    with pytest.raises(AdapterError) as caught:
        attach_adapter(ours(tmp_path), adapter)
    return str(caught.value)


def change(adapter, **tensors):
    file = adapter / "adapter_model.safetensors"
    content = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, file)


def first_key(adapter) -> str:
    return min(load_file(adapter / "adapter_model.safetensors"))


def test_a_pickled_adapter_is_not_opened(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin is pickled" in refusal(tmp_path, adapter)


def test_a_missing_key(adapter, tmp_path):
    key = first_key(adapter)
    change(adapter, **{key: None})
    assert key in refusal(tmp_path, adapter)


def test_an_unexpected_key(adapter, tmp_path):
    change(adapter, **{"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 48)})
    assert "layers.9" in refusal(tmp_path, adapter)


def test_values_that_are_not_finite(adapter, tmp_path):
    key = first_key(adapter)
    change(adapter, **{key: torch.full((4, 48), float("nan"))})
    assert "not finite" in refusal(tmp_path, adapter)


def test_an_adapter_of_another_size_or_architecture(adapter, tmp_path):
    tiny.write_model("qwen2", tmp_path / "model", hidden_size=64)
    assert "does not fit" in refusal(tmp_path, adapter)
    tiny.write_model("gpt_bigcode", tmp_path / "other")
    (tmp_path / "model").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "model")
    assert "does not fit" in refusal(tmp_path, adapter)


def test_a_damaged_file(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "damaged" in refusal(tmp_path, adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "IA3"},
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kinds_that_are_not_served(adapter, tmp_path, options):
    tiny.edit_json(adapter / "adapter_config.json", **options)
    refusal(tmp_path, adapter)


def test_no_configuration(adapter, tmp_path):
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(tmp_path, adapter)

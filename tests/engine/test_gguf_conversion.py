"""Converted models compute what the originals do, for every architecture that is converted.

The files are written with the gguf library's own table of names, and with llama.cpp's permutation, so
that the converter's tables are checked against another source.
"""

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
import transformers

from midfill.models import gguf as conversion
from midfill.models.gguf import convert

VOCAB = tiny_gguf.VOCAB_SIZE
ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

MODELS = {
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**ROPE, tie_word_embeddings=True, rope_theta=1e6)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **ROPE, tie_word_embeddings=False, rope_scaling={"rope_type": "linear", "factor": 4.0}
        )
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**ROPE, head_dim=32, tie_word_embeddings=True)
    ),
    "starcoder2": lambda: transformers.Starcoder2ForCausalLM(
        transformers.Starcoder2Config(**ROPE, sliding_window=None, tie_word_embeddings=True)
    ),
    "starcoder": lambda: transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(
            vocab_size=VOCAB,
            n_positions=256,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_inner=128,
            activation_function="gelu_pytorch_tanh",
            multi_query=True,
            tie_word_embeddings=True,
        )
    ),
}


def silent(message, share):
    pass


def permuted(weight, num_heads):
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def write_gguf(path, name, model):
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(1 if name == "starcoder" else 2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    if name != "starcoder":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if name == "llama":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    if name == "gemma":
        writer.add_key_length(32)
    tiny_gguf.add_vocabulary(writer)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, 2)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = value.float().numpy()
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            weight = permuted(weight, 4 if "q_proj" in key else 2)
        if name == "gemma" and key.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), weight)
    tiny_gguf.write(path, writer)


def test_every_architecture_is_checked_here():
    assert sorted(MODELS) == conversion.supported_architectures()


@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_has_the_logits_of_the_original(tmp_path, name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if key.endswith("norm.weight"):
                # Whole sixteenths: exact in bfloat16 with and without the 1 that a Gemma file adds.
                parameter.copy_(torch.round(parameter * 16) / 16)
            parameter.copy_(parameter.to(torch.bfloat16).float())
    write_gguf(tmp_path / "m.gguf", name, model)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert(tmp_path / "m.gguf", folder, silent)
    converted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(converted) is type(model)
    ids = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=0)

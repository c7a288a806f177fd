"""Converted models compute what the originals do, for every architecture that is converted.

The files are written with the gguf library's own table of names, and with llama.cpp's permutation, so
that the converter's tables are checked against another source.
"""

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
    tiny_gguf.write_transformers(tmp_path / "m.gguf", name, model)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert(tmp_path / "m.gguf", folder, silent)
    converted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(converted) is type(model)
    ids = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=0)

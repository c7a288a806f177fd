"""The seeds' two prompts, with StarCoder2's real vocabulary, against plain transformers calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from midfill.models.gguf_file import open_gguf
from midfill.models.gguf_tokenizer import tokenizer_json

VOCABULARY = Path(__file__).parents[3] / "shared/data/vocabs/ggml-vocab-starcoder.gguf"
HELLO = "def print_hello_world():"
PREFIX, SUFFIX = "def print_one_two_three():\n    print('one')\n    ", "\n    print('three')"
FIM = f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>"

pytestmark = [
    pytest.mark.skipif(
        not VOCABULARY.exists(), reason=f"the vocabularies of ../shared are not here: {VOCABULARY}"
    ),
    # PEFT 0.21 asks transformers 5.23 for a property by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny.write_model("gpt_bigcode", folder, vocab_size=49152, n_embd=32)
    with open_gguf(VOCABULARY) as file:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(file.metadata, VOCABULARY.name)))
    return model


@pytest.fixture(scope="module")
def peft_checkpoint(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny.reference(checkpoint.path), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """How the engine's tokenizer says the same: text never becomes a sentinel, sentinels go by name."""
    if prompt == HELLO:
        return tokenizer.encode(HELLO)
    prefix, suffix, middle = (tokenizer.token_id(f"<fim_{part}>") for part in ("prefix", "suffix", "middle"))
    return [prefix, *tokenizer.encode(PREFIX), suffix, *tokenizer.encode(SUFFIX), middle]


@pytest.mark.parametrize("prompt", [HELLO, FIM], ids=["hello", "fim"])
async def test_ids_and_tokens_of_the_plain_calls(checkpoint, prompt):
    inputs = tiny.plain_tokenizer(checkpoint.path)(prompt, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    ids = inputs["input_ids"][0].tolist()
    async with tiny.running(checkpoint) as engine:
        tokenizer = engine.model.tokenizer
        assert prompt_ids(tokenizer, prompt) == ids
        expected = tiny.oracle(model, ids, 20, tokenizer.control_ids)
        assert await tiny.collect_ids(engine, ids, 20) == expected


@pytest.mark.parametrize("prompt", [HELLO, FIM], ids=["hello", "fim"])
async def test_the_same_with_an_adapter(checkpoint, peft_checkpoint, prompt):
    base = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    model = PeftModel.from_pretrained(base, peft_checkpoint).eval()
    ids = tiny.plain_tokenizer(checkpoint.path)(prompt)["input_ids"]
    async with tiny.running(checkpoint, adapter=peft_checkpoint) as engine:
        expected = tiny.oracle(model, ids, 20, engine.model.tokenizer.control_ids)
        assert await tiny.collect_ids(engine, ids, 20) == expected

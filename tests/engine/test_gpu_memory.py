"""The memory of models on GPUs that people have, computed from their shapes."""

from __future__ import annotations

import json
import struct

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from midfill.bench.shapes import SHAPES
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.torch import graph_shapes, memory
from midfill.engine.torch.devices import Device
from midfill.engine.torch.loading import choose_format
from midfill.engine.torch.memory import RESERVE_BYTES, need, size_in_catalogue, size_of
from midfill.engine.torch.weight_only import Int4Weight
from midfill.engine.torch.weights import build_model
from midfill.errors import EngineError
from midfill.models import catalogue
from midfill.models.safetensors_io import find_tensors
from midfill.settings import Settings

CONTEXT_BYTES = 400e6
"""What a CUDA process takes before it allocates anything, about."""

DESKTOP_BYTES = 400e6
"""What a desktop with a browser takes, about."""


def card(gib):
    """The memory of a card that midfill finds free."""
    return gib * 2**30 - CONTEXT_BYTES - DESKTOP_BYTES


def write_headers(name, folder):
    """A model's folder whose file has no content but its size: nothing but the shapes is read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header, end = {}, 0
    for tensor, value in model.state_dict().items():
        if tensor == "lm_head.weight" and SHAPES[name].get("tie_word_embeddings", True):
            continue
        begin, end = end, end + value.numel() * 2
        header[tensor] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


NAMES = {
    "tiny_starcoder_py": "tiny-starcoder-py",
    **{name: name for name in SHAPES if name != "tiny_starcoder_py"},
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_catalogues_numbers_are_those_of_the_models_files(tmp_path, shape):
    found = size_of(write_headers(shape, tmp_path / "model"))
    entry = catalogue.entries()[NAMES[shape]]
    said = size_in_catalogue(entry)
    assert (said.weights, said.embedding, said.tied, said.kv_values, said.context) == (
        found.weights,
        found.embedding,
        found.tied,
        found.kv_values,
        found.context,
    )
    assert found.lora_width > 0


@pytest.mark.parametrize("entry", catalogue.entries().values(), ids=lambda entry: entry.name)
def test_every_model_of_the_catalogue_has_numbers_for_a_gpu(entry):
    size = size_in_catalogue(entry)
    assert 0.02 * size.weights < size.embedding < size.weights / 2
    assert size.weight_bytes("int4") < size.weight_bytes("int8") < size.weight_bytes("bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_bigcode"])
def test_the_estimate_of_the_weights_is_what_a_loaded_model_takes(tmp_path, kind, dtype):
    wide = (
        {"n_embd": 256, "n_positions": 32}
        if kind == "gpt_bigcode"
        else {"hidden_size": 256, "intermediate_size": 512}
    )
    path = tiny.write_model(kind, tmp_path, **wide).path
    tensors = {}

    def count(module):
        for one in [*module.parameters(), *module.buffers(), *vars(module).values()]:
            if isinstance(one, torch.Tensor):
                tensors[one.data_ptr()] = one.untyped_storage().nbytes()

    model = build_model(
        path,
        find_tensors(path),
        dtype,
        torch.device("cpu"),
        num_threads=1,
        ahead={},
        report=lambda _: None,
        compute=torch.bfloat16,
        packed=False,
    )
    for module in model.modules():
        count(module)
        for cell in getattr(getattr(module, "_product", None), "__closure__", None) or ():
            if isinstance(cell.cell_contents, Int4Weight):
                for one in (cell.cell_contents.codes, cell.cell_contents.scales):
                    tensors[one.data_ptr()] = one.nbytes
    assert size_of(path).weight_bytes(dtype) == pytest.approx(sum(tensors.values()), rel=0.1)


def fit(name, gib, prompt_tokens):
    """Format and tokens per slot of a model on an NVIDIA card since Ampere, and what is left."""
    size = size_in_catalogue(catalogue.entries()[name])
    needs = {dtype: need(size, dtype, prompt_tokens) for dtype in ("bfloat16", "int4")}
    dtype = memory.first_that_fits(needs, card(gib))
    if dtype is None:
        return None
    free = card(gib) - size.weight_bytes(dtype)
    tokens = graph_shapes.capacity(size.context, size.token_bytes(dtype), NUM_SLOTS, int(free), prompt_tokens)
    left = free - NUM_SLOTS * (tokens + graph_shapes.WIDTHS[-1]) * size.token_bytes(dtype)
    assert left > RESERVE_BYTES
    return dtype, tokens


@pytest.mark.parametrize(
    ("name", "gib", "dtype"),
    [
        ("qwen2.5-coder-7b", 8, "int4"),
        ("qwen2.5-coder-7b", 12, "int4"),
        ("qwen2.5-coder-7b", 24, "bfloat16"),
        ("qwen2.5-coder-3b", 8, "int4"),
        ("qwen2.5-coder-1.5b", 4, "int4"),
        ("qwen2.5-coder-1.5b", 8, "bfloat16"),
        ("qwen2.5-coder-0.5b", 4, "bfloat16"),
        ("starcoder2-3b", 12, "bfloat16"),
    ],
)
def test_what_fits_into_a_card_with_eight_thousand_tokens(name, gib, dtype):
    chosen, tokens = fit(name, gib, 8192)
    assert chosen == dtype
    assert tokens >= 8192


def test_what_does_not_fit():
    assert fit("qwen2.5-coder-7b", 6, 8192) is None
    assert fit("seed-coder-8b", 6, 704) is None


@pytest.mark.parametrize(
    ("gib", "family", "expected"),
    [
        (1, None, None),
        (3, "qwen2.5-coder", ("qwen2.5-coder-0.5b", "bfloat16")),
        (3, "starcoder", ("starcoderbase-1b", "int4")),
        (6, "qwen2.5-coder", ("qwen2.5-coder-3b", "int4")),
        (6, None, ("mellum-4b", "int4")),
        (8, None, ("seed-coder-8b", "int4")),
    ],
)
def test_the_largest_model_that_fits_is_named(gib, family, expected):
    found = memory.largest_that_fits(("bfloat16", "int4"), card(gib), Settings().longest_prompt, family)
    assert found == expected


def test_a_model_that_does_not_fit_is_one_sentence_with_one_that_does(tmp_path):
    path = write_headers("qwen2.5-coder-7b", tmp_path / "model")
    model = tiny.LocalModel("qwen2.5-coder-7b", path, "qwen2.5-coder")

    def chosen(gib, dtype="auto", prompt_tokens=704, capability=(8, 9)):
        device = Device("cuda:0", "cuda", "RTX", gib << 30, lambda: int(card(gib)), capability)
        return choose_format(model, device, dtype, prompt_tokens=prompt_tokens, adapters=False)

    assert chosen(8) == chosen(8, prompt_tokens=8192) == "int4"
    assert chosen(8, capability=(7, 5)) == "int4"
    assert chosen(24) == "bfloat16"
    assert chosen(24, capability=(7, 5)) == "float16"
    with pytest.raises(EngineError) as caught:
        chosen(4)
    assert str(caught.value).startswith("qwen2.5-coder-7b needs 6.1 GB of the RTX's memory in int4, with its")
    assert str(caught.value).endswith(
        "and 3.5 GB are free; qwen2.5-coder-3b would fit (int4). Run: midfill model pull qwen2.5-coder-3b && "
        "midfill model use qwen2.5-coder-3b"
    )
    with pytest.raises(
        EngineError, match=r"needs 16\.8 GB .* in bfloat16, .* it would fit in int4\. Set dtype"
    ):
        chosen(8, "bfloat16")


def test_the_longest_prompt_follows_from_the_settings():
    assert Settings().longest_prompt == 256 + 128 + 64
    more = Settings(prefix_tokens=6000, context=("open",), context_tokens=1500, max_new_tokens=100)
    assert more.longest_prompt == 6000 + 128 + 1500 + 100

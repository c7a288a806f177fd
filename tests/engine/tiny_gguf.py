"""GGUF files of tiny random models, written with the gguf library from transformers' own models."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

# GPT-2's byte alphabet in the order of its vocabulary, a few merges, and marks of every kind.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ALPHABET = [*map(chr, _PRINTABLE), *(chr(256 + i) for i in range(256 - len(_PRINTABLE)))]
MERGES = ["d e", "de f", "Ġ def", "Ċ Ċ"]
CONTROL = ["<|endoftext|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
PADDING = 3
TOKENS = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *CONTROL]
VOCAB_SIZE = len(TOKENS) + PADDING


def token_id(text: str) -> int:
    return TOKENS.index(text)


def add_vocabulary(writer: gguf.GGUFWriter, pre: str = "qwen2") -> None:
    tokens = TOKENS + [f"[PAD{i}]" for i in range(len(TOKENS), VOCAB_SIZE)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = [1] * (len(TOKENS) - len(CONTROL)) + [3, 3, 3, 4, 4] + [5] * PADDING
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(token_id("<|im_end|>"))
    writer.add_pad_token_id(token_id("<|endoftext|>"))
    writer.add_bos_token_id(token_id("<|endoftext|>"))


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def write_transformers(path: Path, name: str, model, vocabulary=add_vocabulary) -> Path:
    """Write one of transformers' models in float32.

    Args:
        path: of the file.
        name: llama.cpp's name of the architecture.
        model: the model.
        vocabulary: adds the vocabulary to a writer.
    """
    config = model.config
    is_bigcode = name == "starcoder"
    kv_heads = 1 if is_bigcode else config.num_key_value_heads
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = config.n_inner or 4 * config.n_embd if is_bigcode else config.intermediate_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-6))
    writer.add_layer_norm_eps(1e-5)
    if not is_bigcode:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if config.rope_parameters["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if name == "gemma":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    vocabulary(writer)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = value.float().numpy()
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            weight = permuted(weight, config.num_attention_heads if "q_proj" in key else kv_heads)
        if name == "gemma" and key.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), weight)
    return write(path, writer)


def write(path: Path, writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_qwen2(
    path: Path,
    *,
    seed: int = 0,
    quants: dict[str, str] | None = None,
    head: str | None = None,
    change: dict[str, np.ndarray | None] | None = None,
    pre: str = "qwen2",
) -> dict[str, np.ndarray]:
    """A Qwen2 of two layers and 64 channels, without transformers. Returns the values, by GGUF name.

    Args:
        path: of the file.
        seed: of the random values.
        quants: ggml types by GGUF name; F32 for all others.
        head: None for none, "same" for the embedding again, "own" for random values.
        change: values to put in, or None to leave a weight out.
        pre: the pre-tokenizer's name.
    """
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCAB_SIZE, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        for name, shape in {
            "attn_q.weight": (64, 64),
            "attn_q.bias": (64,),
            "attn_k.weight": (32, 64),
            "attn_k.bias": (32,),
            "attn_v.weight": (32, 64),
            "attn_v.bias": (32,),
            "attn_output.weight": (64, 64),
            "ffn_gate.weight": (128, 64),
            "ffn_up.weight": (128, 64),
            "ffn_down.weight": (64, 128),
            "attn_norm.weight": (64,),
            "ffn_norm.weight": (64,),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    values = {name: rng.standard_normal(shape, np.float32) * 0.1 for name, shape in shapes.items()}
    if head is not None:
        own = rng.standard_normal((VOCAB_SIZE, 64), np.float32)
        values["output.weight"] = values["token_embd.weight"] if head == "same" else own
    for name, value in (change or {}).items():
        if value is None:
            del values[name]
        else:
            values[name] = value
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    add_vocabulary(writer, pre)
    for name, value in values.items():
        kind = gguf.GGMLQuantizationType[(quants or {}).get(name, "F32")]
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    write(path, writer)
    return values

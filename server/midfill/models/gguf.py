"""Convert a GGUF file to a folder for torch and OpenVINO: config.json, tokenizer.json, model.safetensors.

Done once per file. The weights are dequantised block by block and written directly to the safetensors file in
bfloat16, so a model of any size takes little memory. Knows how llama.cpp's converter renames and rearranges
the weights of each supported architecture; nothing of the cache or of downloads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from midfill.errors import ModelError
from midfill.models.gguf_file import GGUFFile, TensorInfo, open_gguf
from midfill.models.gguf_tokenizer import tokenizer_json
from midfill.models.tokenizer import FastTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Progress = Callable[[str, float | None], None]

# Values dequantised at a time. Measured on 2 cores: 200 million values per second; blocks that do not fit in
# the processor's cache (4 million values) reach 35 to 60.
_BLOCK_VALUES = 262_144

# From this cosine similarity on, a file's separate head is taken for the embedding, quantised with more bits.
# Measured on Qwen2.5-Coder-0.5B Q4: 0.999; heads that were trained separately are far below.
_TIED_COSINE = 0.98

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GATED_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "layer": "model.layers.{}.",
}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How to convert one architecture's weights and metadata to transformers' names and layout.

    Attributes:
        model_type: transformers' name.
        model_class: the class for `architectures` in config.json.
        names: names of the weights outside the layers, and the prefix of a layer ("layer").
        layer: names of the weights inside a layer.
        biased: GGUF names of the weights that also have a bias.
        config: metadata key, without the architecture's prefix, by config.json key; one that ends in "?" may
            be missing.
        constants: further config.json keys.
        interleaved: whether query and key rows were permuted for llama.cpp's rotary embedding.
        norm_offset: the number that llama.cpp's converter added to the norms' weights.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    layer: Mapping[str, str]
    biased: frozenset[str]
    config: Mapping[str, str]
    constants: Mapping[str, Any]
    interleaved: bool = False
    norm_offset: float = 0.0


_ROPE_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base?",
}
_RMS_CONFIG = _ROPE_CONFIG | {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}

_ARCHITECTURES = {
    "qwen2": _Architecture(
        model_type="qwen2",
        model_class="Qwen2ForCausalLM",
        names=_LLAMA_NAMES,
        layer=_ATTENTION | _GATED_MLP,
        biased=frozenset({"attn_q", "attn_k", "attn_v"}),
        config=_RMS_CONFIG,
        constants={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "llama": _Architecture(
        model_type="llama",
        model_class="LlamaForCausalLM",
        names=_LLAMA_NAMES,
        layer=_ATTENTION | _GATED_MLP,
        biased=frozenset(),
        config=_RMS_CONFIG | {"head_dim": "attention.key_length?"},
        constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        interleaved=True,
    ),
    "gemma": _Architecture(
        model_type="gemma",
        model_class="GemmaForCausalLM",
        names=_LLAMA_NAMES,
        layer=_ATTENTION | _GATED_MLP,
        biased=frozenset(),
        config=_RMS_CONFIG | {"head_dim": "attention.key_length"},
        constants={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        norm_offset=1.0,
    ),
    "starcoder2": _Architecture(
        model_type="starcoder2",
        model_class="Starcoder2ForCausalLM",
        names=_LLAMA_NAMES,
        layer=_ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        biased=frozenset(_ATTENTION) | {"ffn_up", "ffn_down", "output_norm"},
        config=_ROPE_CONFIG | {"norm_epsilon": "attention.layer_norm_epsilon"},
        constants={"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": None},
    ),
    "starcoder": _Architecture(
        model_type="gpt_bigcode",
        model_class="GPTBigCodeForCausalLM",
        names={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "layer": "transformer.h.{}.",
        },
        layer={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        biased=frozenset(
            {"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"}
        ),
        config={
            "n_embd": "embedding_length",
            "n_inner": "feed_forward_length",
            "n_layer": "block_count",
            "n_head": "attention.head_count",
            "n_positions": "context_length",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        # llama.cpp supports the multi-query form only, and always computes GELU by tanh.
        constants={"activation_function": "gelu_pytorch_tanh", "multi_query": True},
    ),
}


@dataclass(frozen=True, slots=True)
class _Weight:
    """One weight of the result and its source.

    Attributes:
        name: transformers' name.
        source: the tensor in the GGUF file.
        head_rows: rows per attention head if their permutation must be undone, else 0.
        subtract: a number to subtract from every value.
    """

    name: str
    source: TensorInfo
    head_rows: int = 0
    subtract: float = 0.0


def supported_architectures() -> list[str]:
    """Return the values of `general.architecture` that `convert` supports."""
    return sorted(_ARCHITECTURES)


def model_type_of(metadata: Mapping[str, Any]) -> str:
    """Return transformers' `model_type` of a file; llama.cpp's name if the architecture has no conversion."""
    name = str(metadata.get("general.architecture"))
    return _ARCHITECTURES[name].model_type if name in _ARCHITECTURES else name


def tokenizer_from_gguf(path: Path) -> FastTokenizer:
    """Return the tokenizer inside a GGUF file, which may have no weights.

    Raises:
        ModelError: the file or its vocabulary cannot be used.
    """
    with open_gguf(path) as file:
        return tokenizer_from_metadata(file.metadata, path)


def tokenizer_from_metadata(metadata: Mapping[str, Any], path: Path) -> FastTokenizer:
    """Return the tokenizer of a GGUF file's metadata; see `tokenizer_from_gguf`."""
    return FastTokenizer(tokenizer_json(metadata, str(path)))


def converted_bytes(path: Path) -> int:
    """Return the disk space in bytes that `convert` needs, within a few percent."""
    with open_gguf(path) as file:
        values = sum(tensor.num_rows * tensor.shape[-1] for tensor in file.tensors.values())
    return values * 2 + 50_000_000


def convert(path: Path, folder: Path, progress: Progress) -> None:
    """Write config.json, tokenizer.json, tokenizer_config.json and model.safetensors into a folder.

    Args:
        path: the GGUF file.
        folder: an existing, empty folder; after an error it is incomplete, and the caller deletes it.
        progress: told the share of the weights that is done.

    Raises:
        ModelError: the file is damaged, or of an architecture or vocabulary that is not supported.
    """
    with open_gguf(path) as file:
        architecture = _architecture(file)
        description = tokenizer_json(file.metadata, str(path))
        tokenizer = FastTokenizer(description)
        weights, tied = _plan(file, architecture)
        config = _config(file, architecture, tied=tied)
        _check_ids(config, tokenizer, path)
        _write_json(folder / "tokenizer.json", description)
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(config, file))
        _write_json(folder / "config.json", config)
        with (folder / "model.safetensors").open("wb") as out:
            _write_weights(file, weights, out, progress)


def _architecture(file: GGUFFile) -> _Architecture:
    name = file.metadata.get("general.architecture")
    known = _ARCHITECTURES.get(name) if isinstance(name, str) else None
    if known is None:
        raise ModelError(
            f"{file.path} has the architecture {name!r}; midfill can convert "
            f"{', '.join(supported_architectures())}. Use the model's safetensors version."
        )
    if not file.tensors:
        raise ModelError(f"{file.path} has a vocabulary but no weights, so it cannot be used as a model.")
    return known


def _config(file: GGUFFile, architecture: _Architecture, *, tied: bool) -> dict[str, Any]:
    metadata = file.metadata
    prefix = metadata["general.architecture"]
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "torch_dtype": "bfloat16",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": tied,
    }
    for key, source in architecture.config.items():
        value = metadata.get(f"{prefix}.{source.rstrip('?')}")
        if isinstance(value, float):
            value = float(f"{value:.7g}")  # 1e-06 is stored as the float32 9.99999997e-07
        if isinstance(value, int | float):
            config[key] = value
        elif not source.endswith("?"):
            raise ModelError(
                f"{file.path} cannot be converted: it has no usable value for {prefix}.{source}."
            )
    config |= architecture.constants
    scaling = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if scaling == "linear":
        factor = metadata.get(f"{prefix}.rope.scaling.factor", 1.0)
        config["rope_scaling"] = {"type": "linear", "rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise ModelError(
            f"{file.path} uses the RoPE scaling {scaling!r}, which midfill cannot convert. Use the model's "
            "safetensors version."
        )
    for name in ("bos", "eos", "padding"):
        if isinstance(token := metadata.get(f"tokenizer.ggml.{name}_token_id"), int):
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    return config


def _check_ids(config: Mapping[str, Any], tokenizer: FastTokenizer, path: Path) -> None:
    """Check that the token ids in config.json exist and are control tokens. Raises `ModelError`."""
    if tokenizer.num_ids > config["vocab_size"]:
        raise ModelError(
            f"{path} is inconsistent: {tokenizer.num_ids} tokens, but {config['vocab_size']} embeddings."
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (token := config.get(key)) is not None and token not in tokenizer.control_ids:
            raise ModelError(f"{path} is inconsistent: its {key}, {token}, is not a control token.")


def _tokenizer_config(config: Mapping[str, Any], file: GGUFFile) -> dict[str, Any]:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    named = {
        f"{name}_token": tokens[config[f"{name}_token_id"]]
        for name in ("bos", "eos", "pad")
        if f"{name}_token_id" in config
    }
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A matrix of a GGUF file, as an adapter sees it.

    Attributes:
        tensor: its name in the file.
        shape: outputs, inputs.
        head_rows: rows per attention head if they are permuted in the file, else 0.
    """

    tensor: str
    shape: tuple[int, int]
    head_rows: int


def linear_layers(file: GGUFFile) -> dict[str, LinearLayer]:
    """Return the matrices of a file by their modules' names in transformers, embeddings included.

    Raises `ModelError` if the architecture is not supported, or the file has other weights.
    """
    return {
        weight.name.removesuffix(".weight"): LinearLayer(
            weight.source.name, (weight.source.shape[0], weight.source.shape[1]), weight.head_rows
        )
        for weight in _weights(file, _architecture(file))
        if weight.name.endswith(".weight") and len(weight.source.shape) == 2
    }


def permuted(rows: NDArray[np.float32], head_rows: int) -> NDArray[np.float32]:
    """Return rows of queries or keys in the order of llama.cpp's rotary embedding."""
    halves = rows.reshape(-1, 2, head_rows // 2, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _plan(file: GGUFFile, architecture: _Architecture) -> tuple[list[_Weight], bool]:
    """Return all weights of the result, and whether head and embedding are tied. Raises `ModelError`."""
    return _tie(file, _weights(file, architecture))


def _weights(file: GGUFFile, architecture: _Architecture) -> list[_Weight]:
    """Return all weights of the file.

    Raises:
        ModelError: a weight is missing, or the file has one that the architecture does not know.
    """
    left = dict(file.tensors)
    prefix = file.metadata["general.architecture"]
    heads = {
        "attn_q": file.metadata.get(f"{prefix}.attention.head_count"),
        "attn_k": file.metadata.get(f"{prefix}.attention.head_count_kv"),
    }
    weights: list[_Weight] = []
    for name, target in _expected(file, architecture):
        if name == "output.weight" and name not in left:
            continue  # no head of its own: the embedding's
        source = left.pop(name, None)
        if source is None:
            raise ModelError(f"{file.path} cannot be converted: the weight {name!r} is missing.")
        kind = name.split(".")[-2]
        head_rows = 0
        if architecture.interleaved and kind in heads:
            count = heads[kind]
            if not isinstance(count, int) or count < 1 or source.shape[0] % (2 * count):
                raise ModelError(
                    f"{file.path} cannot be converted: the rows of {name!r} do not divide into its heads."
                )
            head_rows = source.shape[0] // count
        is_norm = kind.endswith("norm")
        weights.append(_Weight(target, source, head_rows, architecture.norm_offset if is_norm else 0.0))
    if left:
        raise ModelError(
            f"{file.path} has weights that midfill does not know, such as {min(left)!r}. "
            "Use the model's safetensors version."
        )
    return weights


def _expected(file: GGUFFile, architecture: _Architecture) -> Iterator[tuple[str, str]]:
    """Iterate over (name in the file, name in the result) of all weights and biases."""
    blocks = file.metadata.get(f"{file.metadata['general.architecture']}.block_count")
    if not isinstance(blocks, int) or not 0 < blocks <= len(file.tensors):
        raise ModelError(f"{file.path} is damaged: its metadata gives {blocks!r} layers. Fetch it again.")
    pairs = [(name, name, target) for name, target in architecture.names.items() if name != "layer"]
    for i in range(blocks):
        layer = architecture.names["layer"].format(i)
        pairs += [(name, f"blk.{i}.{name}", layer + part) for name, part in architecture.layer.items()]
    for name, source, target in pairs:
        yield f"{source}.weight", f"{target}.weight"
        if name in architecture.biased:
            yield f"{source}.bias", f"{target}.bias"


def _tie(file: GGUFFile, weights: list[_Weight]) -> tuple[list[_Weight], bool]:
    """If embedding and head are the same matrix, keep the one with more bits only."""
    import numpy as np

    by_source = {weight.source.name: weight for weight in weights}
    embedding = by_source["token_embd.weight"]
    head = by_source.get("output.weight")
    if head is None:
        return weights, True
    if head.source.shape != embedding.source.shape:
        raise ModelError(f"{file.path} is inconsistent: head and embedding differ in shape.")
    sampled = range(0, embedding.source.num_rows, max(1, embedding.source.num_rows // 256))
    cosines = []
    for row in sampled:
        a, b = file.rows(embedding.source, row, 1)[0], file.rows(head.source, row, 1)[0]
        if (norm := float(np.linalg.norm(a) * np.linalg.norm(b))) > 0:
            cosines.append(float(a @ b) / norm)
    if not cosines or sum(cosines) / len(cosines) < _TIED_COSINE:
        return weights, False
    best = max(embedding.source, head.source, key=lambda tensor: tensor.row_bytes)
    kept = [weight for weight in weights if weight is not head]
    kept[kept.index(embedding)] = _Weight(embedding.name, best)
    return kept, True


def _write_weights(file: GGUFFile, weights: list[_Weight], out: BinaryIO, progress: Progress) -> None:
    """Write the weights as one safetensors file: 8 bytes of header length, a JSON header, raw values.

    Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + weight.source.num_rows * weight.source.shape[-1] * 2
        header[weight.name] = {
            "dtype": "BF16",
            "shape": list(weight.source.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    out.write(len(raw).to_bytes(8, "little"))
    out.write(raw)
    written = 0
    for weight in weights:
        for block in _blocks(file, weight):
            out.write(block.data)
            written += block.nbytes
        progress("converting the weights", written / end)


def _blocks(file: GGUFFile, weight: _Weight) -> Iterator[NDArray[np.uint16]]:
    """Iterate over blocks of a weight's rows, as the bits of bfloat16."""
    import numpy as np

    source = weight.source
    step = max(1, _BLOCK_VALUES // source.shape[-1])
    if weight.head_rows:
        step = max(1, step // weight.head_rows) * weight.head_rows
    for first in range(0, source.num_rows, step):
        rows = file.rows(source, first, min(step, source.num_rows - first))
        if not np.isfinite(rows).all():
            raise ModelError(
                f"{file.path} is damaged: {source.name!r} has values that are NaN or infinite. "
                "Fetch it again."
            )
        if weight.head_rows:
            # llama.cpp interleaves the two halves of a head's rotary pairs; transformers has one half after
            # the other. Inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
            rows = rows.reshape(-1, weight.head_rows // 2, 2, rows.shape[-1]).swapaxes(1, 2)
        if weight.subtract:
            rows = rows - np.float32(weight.subtract)
        yield _bfloat16(np.ascontiguousarray(rows))


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the values as bits of bfloat16, rounded to nearest, ties to even."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

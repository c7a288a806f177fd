"""Model folders with known shapes and random weights, to measure speed without the real weights.

A model's speed depends on its shape, not on the values of its weights. The vocabulary has a piece for every
id, so that the output can be decoded. The tensors' names and sizes are those of transformers' modules.
Writing needs torch; importing this module does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midfill.errors import MidfillError
from midfill.models.store import LocalModel

if TYPE_CHECKING:
    import torch

_QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "eos_token_id": 151_643,
    "bos_token_id": 151_643,
}
_BIGCODE = {
    "model_type": "gpt_bigcode",
    "vocab_size": 49_152,
    "n_positions": 8_192,
    "multi_query": True,
    "eos_token_id": 0,
    "bos_token_id": 0,
}


def _qwen(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **others: Any) -> dict[str, Any]:
    return {
        **_QWEN,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        **others,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny_starcoder_py": {
        **_BIGCODE,
        "n_embd": 768,
        "n_layer": 20,
        "n_head": 12,
        "n_inner": 3_072,
        "activation_function": "gelu_pytorch_tanh",
    },
    "qwen2.5-coder-0.5b": _qwen(896, 24, 14, 2, 4_864),
    "qwen2.5-coder-1.5b": _qwen(1_536, 28, 12, 2, 8_960),
    "qwen2.5-coder-7b": _qwen(3_584, 28, 28, 4, 18_944, vocab_size=152_064, tie_word_embeddings=False),
    "starcoderbase-7b": {
        **_BIGCODE,
        "n_embd": 4_096,
        "n_layer": 42,
        "n_head": 32,
        "n_inner": 16_384,
        "activation_function": "gelu",
    },
}
"""config.json of each, by name. Sources: the models' own configurations on the hub."""

_SENTINELS = {
    "qwen2": ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    "gpt_bigcode": ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
}
_FAMILIES = {"qwen2": "qwen2.5-coder", "gpt_bigcode": "starcoder"}
_SHARD_ELEMENTS = 1 << 29
_STANDARD_DEVIATION = 0.02
_NOISE_ELEMENTS = 1 << 22


def write_shape(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    report: Callable[[float], None] = lambda _share: None,
) -> LocalModel:
    """Write a model of this shape, in bfloat16, into a folder, which is made if it is missing.

    Takes 2 bytes per weight on disk and never holds more than 1 GB of weights. The same name and seed give
    the same files. `changes` overrides parts of the configuration, such as fewer layers for a test.

    Raises:
        MidfillError: there is no such shape; the message lists them.
    """
    if name not in SHAPES:
        raise MidfillError(f"There is no shape {name!r}. Use one of: {', '.join(SHAPES)}.")
    config = SHAPES[name] | dict(changes or {})
    kind = config["model_type"]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", _tokenizer(config["vocab_size"], _SENTINELS[kind]))
    _write_json(folder / "config.json", {"dtype": "bfloat16", **config})
    _write_weights(folder, seed, report)
    return LocalModel(f"random:{name}", folder, _FAMILIES[kind], "random weights")


def _tokenizer(vocab_size: int, sentinels: tuple[str, ...]) -> dict[str, Any]:
    """Return a tokenizer.json of bytes, groups of letters that no text is encoded to, and the sentinels."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [chr(code) for code in range(ord("A"), ord("z") + 1) if chr(code).isalpha()]
    made_up = ("".join(parts) for size in (2, 3, 4) for parts in product(letters, repeat=size))
    pieces = [*alphabet, *(next(made_up) for _ in range(vocab_size - len(alphabet) - len(sentinels)))]
    ids = {piece: id_ for id_, piece in enumerate((*pieces, *sentinels))}
    bytes_of_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[name], "content": name, "special": True, **flags} for name in sentinels],
        "pre_tokenizer": bytes_of_text,
        "decoder": bytes_of_text,
        "model": {"type": "BPE", "vocab": {piece: ids[piece] for piece in pieces}, "merges": []},
    }


def _write_weights(folder: Path, seed: int, report: Callable[[float], None]) -> None:
    import torch
    from safetensors.torch import save_file

    shapes = _tensors(folder)
    total = sum(shape.numel() for shape in shapes.values())
    shards = list(_shards(shapes))
    noise = torch.empty(_NOISE_ELEMENTS).normal_(
        0.0, _STANDARD_DEVIATION, generator=torch.Generator().manual_seed(seed)
    )
    noise_bf16 = noise.to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _tensor(name, shapes[name], noise_bf16, len(weight_map)) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        done += sum(tensor.numel() for tensor in tensors.values())
        report(done / total)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _tensors(folder: Path) -> dict[str, torch.Size]:
    """Return names and shapes of the parameters that transformers would save, tied ones once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _shards(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Iterate over groups of names, of at most `_SHARD_ELEMENTS` each; a larger tensor is alone."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if group and size + shape.numel() > _SHARD_ELEMENTS:
            yield group
            group, size = [], 0
        group.append(name)
        size += shape.numel()
    if group:
        yield group


def _tensor(name: str, shape: torch.Size, noise: torch.Tensor, place: int) -> torch.Tensor:
    """Return ones for the scales of norms, zeros for biases, noise for all others.

    The noise is one block, drawn once and rolled by `place`: drawing 7e9 numbers takes minutes.
    """
    import torch

    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    rolled = noise.roll(7919 * place + len(name))
    repeats = -(-shape.numel() // rolled.numel())
    return rolled.repeat(repeats)[: shape.numel()].reshape(shape).contiguous()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")

"""Base models and adapters of a few numbers, as files; no model library is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = {
    f"model.layers.{number}.{part}": shape
    for number in range(2)
    for part, shape in {
        "self_attn.q_proj": (8, 8),
        "self_attn.v_proj": (4, 8),
        "mlp.up_proj": (16, 8),
    }.items()
}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "up_proj"],
    "bias": "none",
    "init_lora_weights": True,
}


@dataclass(frozen=True)
class Base:
    name: str
    path: Path
    family: str | None = None


def write_base(folder: Path, *, seed: int = 0) -> Base:
    numbers = np.random.default_rng(seed)
    tensors = {f"{name}.weight": numbers.normal(size=shape) for name, shape in LAYERS.items()}
    tensors["model.embed_tokens.weight"] = numbers.normal(size=(32, 8))
    tensors["model.norm.weight"] = numbers.normal(size=8)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.astype(np.float32) for key, value in tensors.items()}, folder / "model.safetensors")
    return Base("base", folder)


def write_adapter(folder: Path, *, seed: int = 0, layers=LAYERS, rank: int = 2, **config: object) -> Path:
    """An adapter of q_proj and up_proj."""
    numbers = np.random.default_rng(seed)
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        if name.endswith(("q_proj", "up_proj")):
            tensors[f"base_model.model.{name}.lora_A.weight"] = numbers.normal(size=(rank, inputs))
            tensors[f"base_model.model.{name}.lora_B.weight"] = numbers.normal(size=(outputs, rank))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def change_tensors(folder: Path, **changes: object) -> None:
    """Put tensors into an adapter's file, or take those out that are None."""
    tensors = load_file(folder / "adapter_model.safetensors") | changes
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, folder / "adapter_model.safetensors")

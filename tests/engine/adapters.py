"""Random adapters of tiny models, written by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from midfill.adapters.format import digest_of
from midfill.engine.api import AdapterSource

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = {
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama": "all-linear",
    "starcoder2": ["q_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
}


def write_adapter(model_path: Path, folder: Path, targets, *, seed: int = 1, **options) -> Path:
    """PEFT's own folder, with values large enough to change what the model writes."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}, target_modules=targets
    )
    adapted = get_peft_model(tiny.reference(model_path), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.save_pretrained(folder)
    return folder


def source(folder: Path) -> AdapterSource:
    return AdapterSource(digest_of(folder), folder.name, folder)


def peft_model(model_path: Path, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(tiny.reference(model_path), folder).eval()

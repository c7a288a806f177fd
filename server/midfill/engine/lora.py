"""A LoRA adapter in PEFT format on top of a loaded model.

PEFT does the loading and stays the reference; this module refuses, before or after, what PEFT would
accept with a warning or run as code: pickled weights, missing or unexpected keys, values that are not
finite. The adapter is not merged: the base stays as it is, in whatever form. Runs on the engine thread only.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from midfill.errors import AdapterError

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"

_REFUSED_OPTIONS = {
    "megatron_config": "names a Python module to import",
    "modules_to_save": "replaces whole layers",
    "use_dora": "needs the base weights unquantised",
}
"""Options of `LoraConfig` that are not served, and why."""

_WEIGHT_INITS = (True, False, None, "gaussian")
"""Values of `init_lora_weights` that leave the base weights alone; the others rewrite them."""


def attach_adapter(model: Any, path: Path) -> None:
    """Put the adapter of the folder `path` into `model`, in place.

    Raises:
        AdapterError: it is no LoRA adapter, it is damaged, or it belongs to another model. `model` must not
            be used then.
    """
    _check_config(path)
    keys = _check_weights(path)
    try:
        with warnings.catch_warnings():
            # PEFT only warns of keys that do not fit. They are compared below, and are errors.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # PEFT 0.21 asks transformers 5.23 for a property by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted = PeftModel.from_pretrained(
                model,
                str(path),
                is_trainable=False,
                autocast_adapter_dtype=False,
                torch_device=str(model.device),
            )
    except Exception as error:  # PEFT raises whatever its layers and torch raise
        raise AdapterError(
            f"The adapter {path} does not fit the model: {_first_line(error)} "
            "Use an adapter trained on this model."
        ) from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(expected - keys):
        raise AdapterError(f"The adapter {path} lacks {len(missing)} tensors, for example {missing[0]}.")
    if unknown := sorted(keys - expected):
        raise AdapterError(
            f"The adapter {path} has {len(unknown)} tensors that the model has no place for, "
            f"for example {unknown[0]}. Use an adapter trained on this model."
        )
    model.eval()
    model.requires_grad_(requires_grad=False)


def _check_config(path: Path) -> None:
    try:
        config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is no adapter: {_CONFIG} cannot be read ({error}).") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is no LoRA adapter; other kinds are not served.")
    for option, reason in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise AdapterError(f"The adapter {path} uses {option}, which {reason}; it is not served.")
    if config.get("init_lora_weights") not in _WEIGHT_INITS:
        raise AdapterError(
            f"The adapter {path} was started with init_lora_weights={config['init_lora_weights']!r}, "
            "which changes the base weights; convert it to a plain LoRA with PEFT first."
        )


def _check_weights(path: Path) -> set[str]:
    """The names of the adapter's tensors."""
    weights = path / _WEIGHTS
    if not weights.is_file():
        pickled = (
            " (adapter_model.bin is pickled and is not opened)"
            if (path / "adapter_model.bin").exists()
            else ""
        )
        raise AdapterError(f"The adapter {path} has no {_WEIGHTS}{pickled}. Save it with safe serialization.")
    try:
        with safe_open(weights, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in names:
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point() or not tensor.numel():
                    raise AdapterError(
                        f"{name} in {weights} is no weight ({tensor.dtype}, {tuple(tensor.shape)})."
                    )
                if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
                    raise AdapterError(f"{name} in {weights} holds values that are not finite.")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{weights} is damaged or cut short ({error}).") from error
    return names


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].rstrip(" .:")
    return f"{line or type(error).__name__}."

"""The GPUs that llama.cpp's library can use, and how many layers of a model fit on one.

Run on CPUs only so far: what is here about GPUs is tested with numbers, not on a GPU. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midfill.engine.llamacpp import bindings
from midfill.engine.llamacpp.bindings import library
from midfill.errors import EngineError
from midfill.models.gguf_file import GGUFFile

INSTALL = bindings.INSTALL

HINT = "for builds of the library for GPUs see docs/llama-cpp.md"

POOL_CELLS = 8192
"""Usual size of the pool of keys and values, in tokens."""

_VALUE_BYTES = {bindings.F32: 4.0, bindings.F16: 2.0, bindings.Q8_0: 34 / 32}

_RESERVE_BYTES = 1 << 30
"""Memory that is left to the display and to other programs."""

_PASS_BYTES = 400 << 20
"""Memory for the intermediate results of a pass, estimated generously."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU.

    Attributes:
        name: the library's name, for example "CUDA0", "Vulkan0" or "MTL0".
        description: its maker's name.
        free_bytes, total_bytes: its memory.
        handle: for the library.
    """

    name: str
    description: str
    free_bytes: int
    total_bytes: int
    handle: int = 0

    def __str__(self) -> str:
        """Return the device for `midfill doctor`."""
        free, total = self.free_bytes / 1e9, self.total_bytes / 1e9
        return f"{self.name} ({self.description}), {free:.1f} of {total:.1f} GB free"


def gpus() -> list[Gpu]:
    """Return the GPUs. Raises `EngineError` if the library cannot be used."""
    found = bindings.gpus(library())
    return [Gpu(name, description, free, total, handle) for handle, name, description, free, total in found]


def choose(device: str, found: Sequence[Gpu]) -> Gpu | None:
    """Return the GPU to use, or None for the CPU.

    Args:
        device: "cpu", "auto" for the one with the most free memory, "cuda" or "cuda:N" for one of NVIDIA's.
        found: see `gpus`.

    Raises:
        EngineError: there is no such device.
    """
    if device == "cpu":
        return None
    if device == "auto":
        return max(found, key=lambda gpu: gpu.free_bytes, default=None)
    number = device.partition(":")[2] or "0"
    for gpu in found:
        if gpu.name == f"CUDA{number}":
            return gpu
    names = ", ".join(gpu.name for gpu in found) or "no GPU"
    raise EngineError(
        f'llama.cpp\'s library finds no device "{device}", but {names}. Use device auto or cpu; {HINT}.'
    )


def layers_that_fit(gpu: Gpu, file: GGUFFile, kv_type: int) -> int:
    """Return how many layers of a model to put on a GPU, the output layer included.

    Args:
        gpu: the device.
        file: the model.
        kv_type: type of keys and values.
    """
    model_bytes = sum(tensor.num_rows * tensor.row_bytes for tensor in file.tensors.values())
    num_layers, kv_bytes = _kv_bytes(file.metadata, kv_type)
    room = gpu.free_bytes - _RESERVE_BYTES - _PASS_BYTES
    # Layers are of about the same size; the output layer, with the embedding, counts as one more.
    layer_bytes = (model_bytes + kv_bytes) / (num_layers + 1)
    return max(0, min(num_layers + 1, int(room / layer_bytes)))


def _kv_bytes(metadata: Mapping[str, Any], kv_type: int) -> tuple[int, int]:
    """Return the number of layers, and the size of the keys and values of a pool of usual size."""

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{metadata.get('general.architecture')}.{key}", default)
        return max(value) if isinstance(value, list) else int(value)

    num_layers = number("block_count", 1)
    num_heads = max(1, number("attention.head_count", 1))
    width = number("attention.key_length", number("embedding_length", 0) // num_heads)
    values = 2 * num_layers * number("attention.head_count_kv", num_heads) * width * POOL_CELLS
    return num_layers, int(values * _VALUE_BYTES[kv_type])

"""The safetensors files of a model folder: which tensor is where, and tensors block by block.

A file is opened anew for every block of a tensor and closed after it, so that little of it is in
memory at any time. Nothing pickled is read. Knows files, not modules; imports torch but not
transformers. Runs on the engine thread and, while a model loads, on a few threads of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from midfill.errors import ModelError

_BLOCK_ELEMENTS = 1 << 19
"""Tensors are read in blocks of about this many elements. A file's map counts as memory while it is open,
and larger scratch memory leaves holes between the layers: with 2^22 a 0.5b model ends 0.4 GB higher."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_blocks(
    file: Path, name: str, shape: torch.Size, num_elements: int = _BLOCK_ELEMENTS
) -> Iterator[torch.Tensor]:
    """A tensor as consecutive blocks of its rows, each a view of the file that is gone with the block.

    Shape and type are checked; whether the values are finite is not.
    """
    num_rows = shape[0] if shape else 1
    step = max(1, num_elements * num_rows // max(1, shape.numel()))
    for start in range(0, num_rows, step):
        try:
            with safe_open(file, framework="pt") as tensors:
                part = tensors.get_slice(name)
                found = tuple(part.get_shape())
                block: torch.Tensor | None = None
                if found == tuple(shape):
                    block = part[start : start + step] if shape else tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read from {file}: {error}. Pull the model again.") from error
        if block is None:
            raise ModelError(f"{name} in {file} has shape {found}, the configuration says {tuple(shape)}.")
        if block.dtype not in _FLOATS:
            raise ModelError(f"{name} in {file} is {block.dtype}; only 16- and 32-bit floats can be used.")
        yield block


def find_tensors(path: Path) -> dict[str, Path]:
    """The file of each tensor in the folder. Raises `ModelError` if a file is missing or damaged."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.is_file():
        names = [single]
    elif index.is_file():
        names = _shards(index)
    else:
        pickled = next(iter([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]), None)
        hint = f" ({pickled.name} is pickled and is not opened)" if pickled is not None else ""
        raise ModelError(f"{path} has no model.safetensors{hint}. Pull the model again or convert it.")
    files: dict[str, Path] = {}
    for file in names:
        try:
            with safe_open(file, framework="pt") as tensors:
                files.update(dict.fromkeys(tensors.keys(), file))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or cut short ({error}). Pull the model again.") from error
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error!r}). Pull the model again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names a file outside of its folder: {name!r}.")
    return [index.parent / name for name in names]


def shape_of(file: Path, name: str) -> torch.Size:
    """The shape of a tensor. Raises `ModelError` if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return torch.Size(tensors.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{name} cannot be read from {file}: {error}. Pull the model again.") from error

"""The safetensors files of a model folder: which tensor is where, and tensors block by block.

A file is opened anew for every block of a tensor and closed after it, so that little of it is in
memory at any time. Nothing pickled is read. Knows files, not modules; imports neither torch nor
transformers. Runs on the engine thread and, while a model loads, on a few threads of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401 - with it numpy, and so safetensors, knows bfloat16
from safetensors import SafetensorError, safe_open

from midfill.errors import ModelError

_BLOCK_ELEMENTS = 1 << 19
"""Tensors are read in blocks of about this many elements. A file's map counts as memory while it is open,
and larger scratch memory leaves holes between the layers: with 2^22 a 0.5b model ends 0.4 GB higher."""

_FLOATS = {"F32", "F16", "BF16"}


def read_blocks(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    num_elements: int = _BLOCK_ELEMENTS,
    *,
    framework: Literal["pt", "np"] = "pt",
) -> Iterator[Any]:
    """A tensor as consecutive blocks of its rows, each a view of the file that is gone with the block.

    The blocks are tensors of torch ("pt") or arrays of numpy ("np").

    Shape and type are checked; whether the values are finite is not.
    """
    num_rows = shape[0] if shape else 1
    step = max(1, num_elements * num_rows // max(1, math.prod(shape)))
    for start in range(0, num_rows, step):
        try:
            with safe_open(file, framework=framework) as tensors:
                part = tensors.get_slice(name)
                found = tuple(part.get_shape())
                kind = part.get_dtype()
                block = None
                if found == tuple(shape) and kind in _FLOATS:
                    block = part[start : min(num_rows, start + step)] if shape else tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read from {file}: {error}. Pull the model again.") from error
        if found != tuple(shape):
            raise ModelError(f"{name} in {file} has shape {found}, the configuration says {tuple(shape)}.")
        if kind not in _FLOATS:
            raise ModelError(f"{name} in {file} is {kind}; only 16- and 32-bit floats can be used.")
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
            with safe_open(file, framework="np") as tensors:
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


def shape_of(file: Path, name: str) -> tuple[int, ...]:
    """The shape of a tensor. Raises `ModelError` if it cannot be read."""
    try:
        with safe_open(file, framework="np") as tensors:
            return tuple(tensors.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{name} cannot be read from {file}: {error}. Pull the model again.") from error

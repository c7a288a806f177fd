"""Read the safetensors files of a model folder: the location of each tensor, and tensors block by block.

A file is opened for each block of a tensor and closed after it, so that little of it is in memory at any
time. Nothing pickled is read. Works on files, knows no modules; imports neither torch nor transformers. Runs
on the engine thread and, while a model loads, on a few loader threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401 - with it numpy, and so safetensors, knows bfloat16
from safetensors import SafetensorError, safe_open

from midfill.errors import ModelError
from midfill.system.json_files import read_json

_BLOCK_ELEMENTS = 1 << 19
"""Tensors are read in blocks of about this many elements. A mapped file counts as memory while it is open,
and larger buffers fragment the heap: with 2^22 a 0.5b model takes 0.4 GB more."""

# The 90,000 tensors of a model with 671 billion weights, in all its files, take 10 MB.
_MAX_HEADER_BYTES = 16 << 20
_MAX_NAME_CHARS = 500

_FLOATS = {"F32", "F16", "BF16"}


def read_blocks(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    num_elements: int = _BLOCK_ELEMENTS,
    *,
    framework: Literal["pt", "np"] = "pt",
) -> Iterator[Any]:
    """Iterate over consecutive blocks of a tensor's rows, each valid only until the next one.

    The blocks are torch tensors ("pt") or numpy arrays ("np"). Shape and type are checked; that the values
    are finite is not. Raises `ModelError`.
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
            raise ModelError(
                f"{name} in {file} has shape {found}, but by the configuration it should be {tuple(shape)}."
            )
        if kind not in _FLOATS:
            raise ModelError(f"{name} in {file} has type {kind}; only 16- and 32-bit floats are supported.")
        yield block


def find_tensors(path: Path) -> dict[str, Path]:
    """Return the file of each tensor in the folder. Raises `ModelError` if a file is missing or damaged."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.is_file():
        names = [single]
    elif index.is_file():
        names = _shards(index)
    else:
        pickled = next(iter([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]), None)
        hint = f" ({pickled.name} is pickled and is never loaded)" if pickled is not None else ""
        raise ModelError(f"{path} has no model.safetensors{hint}. Pull the model again or convert it.")
    files: dict[str, Path] = {}
    for file in names:
        try:
            check_header(file)
            with safe_open(file, framework="np") as tensors:
                files.update(dict.fromkeys(tensors.keys(), file))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or cut short ({error}). Pull the model again.") from error
    if long := next((name for name in files if len(name) > _MAX_NAME_CHARS), None):
        raise ModelError(f"{path} is damaged: a tensor has a name of {len(long)} characters.")
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error!r}). Pull the model again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ModelError(f"{index} names a file outside its folder: {name!r}.")
    return [index.parent / name for name in names]


def shape_of(file: Path, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises `ModelError` if it cannot be read."""
    return shapes_of({name: file})[name]


def shapes_of(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors; each file is opened once. Raises `ModelError` if one cannot be read."""
    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    shapes = {}
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="np") as tensors:
                for name in names:
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"The tensors of {file} cannot be read: {error}. Pull the model again."
            ) from error
    return {name: shapes[name] for name in files}


def check_header(file: Path) -> None:
    """Refuse a file with an implausibly large header, before the header is read into memory.

    Raises:
        ModelError: the header is larger than that of any model.
        OSError: the file cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(2, "there is no such file", str(file))
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise ModelError(
            f"{file} is damaged: its header would have {header_bytes} bytes; the largest models have less "
            f"than {_MAX_HEADER_BYTES}. Pull the model again."
        )

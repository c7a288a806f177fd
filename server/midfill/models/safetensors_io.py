"""The safetensors files of a model folder: which tensor is where, and tensors block by block.

A file is opened anew for every block of a tensor and closed after it, so that little of it is in
memory at any time. Nothing pickled is read. Knows files, not modules; imports neither torch nor
transformers. Runs on the engine thread and, while a model loads, on a few threads of its own.
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
"""Tensors are read in blocks of about this many elements. A file's map counts as memory while it is open,
and larger scratch memory leaves holes between the layers: with 2^22 a 0.5b model ends 0.4 GB higher."""

# 90,000 tensors, which a model of 671 billion weights has in all its files, take 10 MB.
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
            raise ModelError(f"{index} names a file outside of its folder: {name!r}.")
    return [index.parent / name for name in names]


def shape_of(file: Path, name: str) -> tuple[int, ...]:
    """The shape of a tensor. Raises `ModelError` if it cannot be read."""
    return shapes_of({name: file})[name]


def shapes_of(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors; each file is opened once. Raises `ModelError` if one cannot be read."""
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
    """Refuse a file whose table of contents would take much memory, or many tensors, before it is read.

    Raises:
        ModelError: it is larger than that of any model.
        OSError: the file cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(2, "there is no such file", str(file))
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise ModelError(
            f"{file} is damaged: its header says that it has {header_bytes} bytes, and the largest models "
            f"have less than {_MAX_HEADER_BYTES}. Pull the model again."
        )

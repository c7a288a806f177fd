"""Write adapters of PEFT's format as GGUF files, which llama.cpp loads.

Each is written once, into midfill's cache, under its digest and that of the layout of the model's matrices.
The adapter has been checked against the model's layers before (`adapters.format`). Any thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from midfill.adapters.format import Adapter
from midfill.errors import AdapterError, ModelError
from midfill.models.gguf import LinearLayer, linear_layers, permuted
from midfill.models.gguf_file import open_gguf
from midfill.models.store import make_cache_root

_MAX_FILES = 16
"""Files kept in the cache: four times as many as a model can have, at 35 MB each for the default model."""


def write(adapter: Adapter, model: Path) -> Path:
    """Return the GGUF file of an adapter for a model's file; write it unless that was done before.

    Raises:
        AdapterError: it cannot be written.
        ModelError: the model's architecture is not one whose matrices we know.
    """
    with open_gguf(model) as file:
        layers = linear_layers(file)
        architecture = str(file.metadata["general.architecture"])
    used = {name: layers[name] for name in sorted(adapter.branches)}
    layout = json.dumps([architecture, *((layer.tensor, layer.head_rows) for layer in used.values())])
    name = f"{adapter.digest[:32]}-{hashlib.sha256(layout.encode()).hexdigest()[:12]}.gguf"
    try:
        folder = make_cache_root() / "gguf-adapters"
        folder.mkdir(exist_ok=True)
        target = folder / name
        if _is_complete(target, 2 * len(used)):
            target.touch()
        else:
            _write(adapter, used, architecture, target)
            _prune(folder)
    except OSError as error:
        raise AdapterError(f"The adapter {adapter.path} cannot be written to the cache: {error}.") from error
    return target


def _prune(folder: Path) -> None:
    """Delete the files that were not used for longest. Those in models are read already."""
    files = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in files[_MAX_FILES:]:
        path.unlink(missing_ok=True)


def _is_complete(path: Path, num_tensors: int) -> bool:
    """Return whether the file exists with all its tensors."""
    if not path.is_file():
        return False
    try:
        with open_gguf(path) as file:
            return len(file.tensors) == num_tensors
    except ModelError:
        return False


def _write(adapter: Adapter, layers: Mapping[str, LinearLayer], architecture: str, target: Path) -> None:
    import gguf

    descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(descriptor)
    part = Path(name)
    try:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # None: each matrix has its own scale, which is in its values.
        writer.add_float32("adapter.lora.alpha", 0.0)
        for module, layer in layers.items():
            branch = adapter.branches[module]
            up = np.float32(branch.scale) * branch.up
            up = permuted(up, layer.head_rows) if layer.head_rows else up
            writer.add_tensor(f"{layer.tensor}.lora_a", np.ascontiguousarray(branch.down))
            writer.add_tensor(f"{layer.tensor}.lora_b", np.ascontiguousarray(up))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()

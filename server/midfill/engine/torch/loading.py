"""Load a model to be run by torch: choose device and dtype, load in the order that is fastest.

Importing transformers takes 2.5 s on one thread after torch is imported. The model's largest weight takes as
long, so it is built during the import; the vocabulary waits until transformers is imported, because both need
the interpreter lock: 8.8 s instead of 10.4 s on two cores. So this module imports nothing heavier than torch
at its top. Runs on the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.torch import quantize
from midfill.engine.torch.errors import memory_errors
from midfill.engine.torch.quantize import Int8Weight
from midfill.engine.torch.threads import ThreadCount, num_cores
from midfill.errors import EngineError
from midfill.models.safetensors_io import find_tensors, read_blocks, shape_of, shapes_of

if TYPE_CHECKING:
    from midfill.engine.torch.runner import TorchRunner

T = TypeVar("T")

_AHEAD_ELEMENTS = 1 << 22
"""Block size, in elements, of the weight that is built during the import.

With smaller blocks it would spend most of its time waiting for the interpreter lock, which the import holds.
"""

_DTYPES = ("int8", "float32", "bfloat16")


def load_runner(
    path: Path,
    *,
    device: str,
    dtype: str,
    num_threads: int,
    report: Callable[[float], None],
    meanwhile: Callable[[], T],
) -> tuple[TorchRunner, T]:
    """Load the model of a folder.

    Args:
        path: the model's folder.
        device: see `EngineSpec`.
        dtype: see `EngineSpec`.
        num_threads: see `EngineSpec`.
        report: called with the share done, 0..1.
        meanwhile: called in another thread while weights are read and packed, which leaves the interpreter
            free.

    Returns:
        The model, and the result of `meanwhile`.

    Raises:
        ModelError: the model cannot be used.
        EngineError: the device or dtype is not available.
        MemoryError: there is not enough memory.
    """
    target = _device(device)
    plan = _plan(dtype, target)
    # The user's number of threads is never changed.
    thread_count = ThreadCount(num_cores()) if num_threads == 0 and target.type == "cpu" else None
    num_threads = num_threads or num_cores()
    # Each thread loads one tensor. Helper threads of each would spin while the others work: 21 s, not 9.
    torch.set_num_threads(1)
    with memory_errors(), ThreadPoolExecutor(2, thread_name_prefix="midfill-ahead") as pool:
        files = find_tensors(path)
        ahead = {}
        if plan == "int8" and (name := _largest(files)) is not None:
            ahead[name] = pool.submit(_int8_weight, files[name], name)
        # Imports transformers, which takes as long as the largest weight and leaves one core free.
        from midfill.engine.torch.runner import TorchRunner
        from midfill.engine.torch.weights import build_model

        result = pool.submit(meanwhile)
        model = build_model(
            path,
            files,
            plan,
            target,
            num_threads=num_threads,
            ahead=ahead,
            report=report,
            fused=target.type == "cuda",
        )
    torch.set_num_threads(num_threads)
    runner = TorchRunner(model, plan, target, thread_count)
    if target.type == "cuda":
        from midfill.engine.torch import cuda

        runner.use_graphs(
            cuda.CudaDevice(target), partial(cuda.kernel, target), NUM_SLOTS, cuda.free_bytes(target)
        )
    return runner, result.result()


def _largest(files: dict[str, Path]) -> str | None:
    """Return the name of the largest matrix; of equal ones the head's, if it is not tied to the embedding."""
    shapes = shapes_of(files)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    return max(matrices, key=lambda name: (math.prod(shapes[name]), "head" in name), default=None)


def _int8_weight(file: Path, name: str) -> Int8Weight:
    shape = torch.Size(shape_of(file, name))
    with torch.no_grad():
        weight = Int8Weight(shape, read_blocks(file, name, shape, _AHEAD_ELEMENTS))
        _ = weight.packed
    return weight


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f'There is no device "{name}"; use auto, cpu or cuda.') from error
    if device.type == "cuda":
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise EngineError(
                f'Device "{name}" was not found; torch sees {torch.cuda.device_count()} CUDA devices.'
            )
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise EngineError(f'Device "{name}" is not supported; use auto, cpu or cuda.')
    return device


def _plan(dtype: str, device: torch.device) -> str:
    if dtype == "auto":
        if device.type == "cuda":
            return "bfloat16"
        return "int8" if quantize.supported() else "float32"
    if dtype not in _DTYPES:
        raise EngineError(f'There is no dtype "{dtype}"; use auto, {", ".join(_DTYPES)}.')
    if dtype == "int8" and (device.type != "cpu" or not quantize.supported()):
        raise EngineError("int8 needs an x86 CPU; use dtype float32 or auto.")
    return dtype

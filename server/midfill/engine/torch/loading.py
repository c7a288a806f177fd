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
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.torch import devices, memory, quantize
from midfill.engine.torch.devices import Device, Kind
from midfill.engine.torch.errors import memory_errors
from midfill.engine.torch.quantize import Int8Weight
from midfill.engine.torch.threads import ThreadCount, num_cores
from midfill.errors import EngineError
from midfill.models.safetensors_io import find_tensors, read_blocks, shape_of, shapes_of

if TYPE_CHECKING:
    from midfill.engine.api import LocalModel
    from midfill.engine.torch.runner import TorchRunner

T = TypeVar("T")

_AHEAD_ELEMENTS = 1 << 22
"""Block size, in elements, of the weight that is built during the import.

With smaller blocks it would spend most of its time waiting for the interpreter lock, which the import holds.
"""


def load_runner(
    path: Path,
    *,
    device: str | Device,
    dtype: str,
    num_threads: int,
    report: Callable[[float], None],
    meanwhile: Callable[[], T],
    prompt_tokens: int = 0,
) -> tuple[TorchRunner, T]:
    """Load the model of a folder.

    Args:
        path: the model's folder.
        device: see `EngineSpec`, or a device that was chosen already.
        dtype: see `EngineSpec`; on a GPU "auto" is the device's 16-bit format, see `memory` for a choice.
        num_threads: see `EngineSpec`.
        report: called with the share done, 0..1.
        meanwhile: called in another thread while weights are read and packed, which leaves the interpreter
            free.
        prompt_tokens: see `EngineSpec`.

    Returns:
        The model, and the result of `meanwhile`.

    Raises:
        ModelError: the model cannot be used.
        EngineError: the device or dtype is not available.
        MemoryError: there is not enough memory.
    """
    chosen = device if isinstance(device, Device) else devices.choose(device, devices.find_gpus(device))[0]
    plan = _plan(dtype, chosen)
    kind = devices.KINDS[chosen.kind]
    target = torch.device(chosen.torch_name)
    is_cpu = chosen.kind == "cpu"
    # The user's number of threads is never changed.
    thread_count = ThreadCount(num_cores()) if num_threads == 0 and is_cpu else None
    num_threads = num_threads or num_cores()
    # Each thread loads one tensor. Helper threads of each would spin while the others work: 21 s, not 9.
    torch.set_num_threads(1)
    with memory_errors(), ThreadPoolExecutor(2, thread_name_prefix="midfill-ahead") as pool:
        files = find_tensors(path)
        ahead = {}
        if is_cpu and plan == "int8" and (name := _largest(files)) is not None:
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
            **_form(plan, chosen),
        )
    torch.set_num_threads(num_threads)
    runner = TorchRunner(model, plan, target, thread_count, chunk_tokens=kind.chunk_tokens)
    _limit_memory(runner, chosen, kind, prompt_tokens)
    return runner, result.result()


def _limit_memory(runner: TorchRunner, device: Device, kind: Kind, prompt_tokens: int) -> None:
    """Give the slots of a GPU the memory that is left; capture graphs if its kind has them."""
    if kind.graphs:
        from midfill.engine.torch import cuda

        target = torch.device(device.torch_name)
        runner.use_graphs(
            cuda.CudaDevice(target),
            partial(cuda.kernel, target),
            NUM_SLOTS,
            cuda.free_bytes(target),
            prompt_tokens,
        )
    elif device.kind != "cpu":
        runner.limit_context(NUM_SLOTS, device.free_bytes(), prompt_tokens)


def choose_format(
    model: LocalModel, device: Device, dtype: str, *, prompt_tokens: int, adapters: bool
) -> str:
    """Return the format for a model on a GPU, from what its memory has free before anything is loaded.

    Args:
        model: its folder is read.
        device: a GPU.
        dtype: see `EngineSpec`; "auto" takes the best that fits.
        prompt_tokens: see `EngineSpec`.
        adapters: whether room for adapters is needed.

    Raises:
        ModelError: the folder holds no model.
        EngineError: the format is not available; or the model does not fit, in a sentence that names one that
            would.
    """
    wanted = devices.check_dtype(dtype, device)
    candidates = device.automatic if wanted == "auto" else (wanted,)
    kind = devices.KINDS[device.kind]
    size = memory.size_of(model.path)
    needs = {
        one: memory.need(
            size,
            one,
            prompt_tokens,
            chunk_tokens=kind.chunk_tokens,
            flash=device.has_flash and one != "float32",
            adapters=adapters,
        )
        for one in candidates
    }
    free = device.free_bytes()
    fitting = memory.first_that_fits(needs, free)
    if fitting is None:
        instead = memory.largest_that_fits(device.automatic, free, prompt_tokens, model.family)
        raise EngineError(memory.refusal(model.name, device.name or kind.title, needs, free, instead))
    return fitting


def _form(plan: str, device: Device) -> dict[str, Any]:
    """Return the arguments of `build_model` that follow from a format and a device."""
    fused = devices.KINDS[device.kind].fused
    if device.kind != "cpu":
        compute = getattr(torch, device.half)
        return {"fused": fused, "compute": compute, "packed": device.packed_products}
    # The CPU's packed products are 80 times faster with bfloat16 than with float32.
    return {"fused": fused, "compute": torch.bfloat16 if plan == "int4" else None, "packed": True}


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


def _plan(dtype: str, device: Device) -> str:
    wanted = devices.check_dtype(dtype, device)
    if wanted == "auto":
        if device.kind != "cpu":
            return device.half
        return "int8" if quantize.supported() else "float32"
    if wanted == "int8" and device.kind == "cpu" and not quantize.supported():
        raise EngineError("int8 on a CPU needs an x86 CPU; use dtype float32 or auto.")
    return wanted

"""From a model's folder to a runner of torch's: the device, the dtype plan, and the order of loading.

After torch, importing transformers takes 2.5 s on one thread. The model's largest weight takes as long, so
it is made meanwhile, and the vocabulary waits until transformers is there, since both need Python: 8.8 s
instead of 10.4 on two cores. So this module imports torch only. Runs on the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.torch import quantize
from midfill.engine.torch.quantize import Int8Weight
from midfill.engine.torch.threads import FreeCores, num_cores
from midfill.errors import EngineError
from midfill.models.safetensors_io import find_tensors, read_blocks, shape_of, shapes_of

if TYPE_CHECKING:
    from midfill.engine.torch.runner import Runner

T = TypeVar("T")

_AHEAD_ELEMENTS = 1 << 22
"""Block size of the weight that is made during the import: with smaller blocks it waits for the interpreter
lock, which the import holds, most of the time."""

_DTYPES = ("int8", "float32", "bfloat16")


def load_runner(  # noqa: PLR0913 - the fields of EngineSpec, by name
    path: Path,
    *,
    device: str,
    dtype: str,
    num_threads: int,
    report: Callable[[float], None],
    meanwhile: Callable[[], T],
) -> tuple[Runner, T]:
    """Load the model of a folder. The arguments are those of `EngineSpec`; `report` gets the share done.

    `meanwhile` is called in a thread of its own while weights are read and packed, which leaves Python free.

    Returns:
        The model, and the result of `meanwhile`.

    Raises:
        ModelError: the model cannot be used.
        EngineError: the device or dtype cannot be had.
        MemoryError: there is not enough memory.
    """
    place = _device(device)
    plan = _plan(dtype, place)
    # A number that the user has set is kept to.
    cores = FreeCores(num_cores()) if num_threads == 0 and place.type == "cpu" else None
    num_threads = num_threads or num_cores()
    # Several threads do a tensor each. Helpers of each would spin while the others work: 21 s, not 9.
    torch.set_num_threads(1)
    with memory_errors(), ThreadPoolExecutor(2, thread_name_prefix="midfill-ahead") as pool:
        files = find_tensors(path)
        ahead = {}
        if plan == "int8" and (name := _largest(files)) is not None:
            ahead[name] = pool.submit(_int8_weight, files[name], name)
        # These import transformers, which takes as long as the largest weight and leaves a core free.
        from midfill.engine.torch.runner import Runner  # noqa: PLC0415
        from midfill.engine.torch.weights import build_model  # noqa: PLC0415

        result = pool.submit(meanwhile)
        model = build_model(path, files, plan, place, num_threads=num_threads, ahead=ahead, report=report)
    torch.set_num_threads(num_threads)
    if place.type == "cuda":
        from midfill.engine.torch.fuse import fuse  # noqa: PLC0415 - of no use elsewhere

        fuse(model)
    runner = Runner(model, plan, place, cores)
    if place.type == "cuda":
        from midfill.engine.torch import cuda  # noqa: PLC0415 - of no use elsewhere

        runner.use_replays(
            cuda.CudaDevice(place), partial(cuda.kernel, place), NUM_SLOTS, cuda.free_bytes(place)
        )
    return runner, result.result()


def _largest(files: dict[str, Path]) -> str | None:
    """The tensor that takes longest: the head's. Its own, if it shares none with the embedding."""
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
                f'Device "{name}" is not there; torch sees {torch.cuda.device_count()} CUDA devices.'
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


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what torch raises for want of memory, on whatever device, into `MemoryError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise

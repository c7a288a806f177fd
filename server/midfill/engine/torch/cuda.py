"""What captured passes need of CUDA, and which attention they use on it. Runs on the engine thread only."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from midfill.engine.torch.graph_shapes import Shape
from midfill.engine.torch.kv_cache import Entries, FixedMemory, Kernel, Rows, flash_rows, packed_rows
from midfill.engine.torch.loading import memory_errors

_LOG = logging.getLogger(__name__)

_RESERVE_BYTES = 1 << 30
"""Memory that graphs leave free, for passes that are not captured and for other programs."""


class _Copy:
    """Values on their way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def wait(self) -> list[list[float]]:
        """See `cuda_graphs.Fetch`."""
        # Releases the interpreter: the event loop goes on.
        self._done.synchronize()
        values: list[list[float]] = self._host.tolist()
        return values


class CudaDevice:
    """`cuda_graphs.Device` for one CUDA device."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        # Graphs are replayed on this thread's current device.
        torch.cuda.set_device(place)
        self._stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
        # All graphs share scratch memory: they never run at the same time, and what must outlive a replay is
        # copied out of it by the pass itself.
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `cuda_graphs.Device.capture`."""
        graph = torch.cuda.CUDAGraph()
        with memory_errors():
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            # Libraries allocate at their first call, which must not be recorded.
            with torch.cuda.stream(self._stream):
                run()
            # Other threads of the process may use CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                run()
            here.wait_stream(self._stream)
        return graph.replay

    def fetch(self, tensor: torch.Tensor) -> _Copy:
        """See `cuda_graphs.Device.fetch`."""
        return _Copy(tensor)

    def has_room(self) -> bool:
        """See `cuda_graphs.Device.has_room`."""
        return free_bytes(self._place) > _RESERVE_BYTES


def free_bytes(place: torch.device) -> int:
    """Free memory of a device; what torch holds without using it counts as free."""
    free, _ = torch.cuda.mem_get_info(place)
    return free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)


def kernel(place: torch.device, like: Entries, heads: int) -> Kernel:
    """The attention for captured passes on this device.

    Flash attention where it is there and agrees with plain operations for these heads; it reads only what is
    needed and copies nothing, but not every device, system and version of torch has it.

    Args:
        place: the device.
        like: keys and values of one layer in a slot.
        heads: query heads.
    """
    try:
        difference = max(_difference(place, like, heads, width) for width in (1, 8))
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:
        _LOG.info("no flash attention here: %s", error)
        return packed_rows
    if not difference < 0.03:  # of bf16 values of about 1; NaN is no agreement either
        _LOG.warning("flash attention differs by %.2g here and is not used", difference)
        return packed_rows
    return flash_rows


def _difference(place: torch.device, like: Entries, heads: int, width: int) -> float:
    """How far the two kernels are from each other on random values, two rows in slots 2 and 0."""
    generator = torch.Generator(place).manual_seed(0)
    memory = FixedMemory([like], num_slots=3, capacity=256)
    for tensor in memory.layers[0]:
        tensor.normal_(generator=generator)
    slots, starts = torch.tensor([[2, 0], [150, 31]], device=place)
    shape = Shape(rows=2, width=width, keys=256)
    query = torch.randn(
        (1, heads, 2 * width, like[0].shape[-1]), generator=generator, device=place, dtype=like[0].dtype
    )
    outputs = [
        attend(Rows(memory, slots, starts, shape, attend), query, memory.layers[0], None, window)
        for attend in (flash_rows, packed_rows)
        for window in (None, 64)
    ]
    return max(float((outputs[i] - outputs[i + 2]).abs().max()) for i in range(2))

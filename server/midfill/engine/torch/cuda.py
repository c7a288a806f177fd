"""Graph capture, copies to the host and the choice of attention on CUDA. Runs on the engine thread only."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from midfill.engine.torch.errors import memory_errors
from midfill.engine.torch.graph_shapes import GraphShape
from midfill.engine.torch.kv_cache import (
    FixedKVCache,
    FixedShapePast,
    Kernel,
    LayerKV,
    flash_kernel,
    packed_kernel,
)

_LOG = logging.getLogger(__name__)

_FLASH = (8, 0)
"""Compute capability from which on cards have flash attention, if torch was built with it."""

_RESERVE_BYTES = 1 << 30
"""Memory that graphs leave free, for passes that are not captured and for other programs."""


class _PendingHostCopy:
    """A copy of a tensor to pinned host memory, in progress."""

    def __init__(self, tensor: torch.Tensor, *, sleeps: bool) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event(blocking=sleeps)  # type: ignore[no-untyped-call]
        self._done.record()

    def wait(self) -> list[list[float]]:
        """Wait for the copy and return the values."""
        # Releases the interpreter lock, so that the event loop can run.
        self._done.synchronize()
        values: list[list[float]] = self._host.tolist()
        return values


class CudaDevice:
    """`cuda_graphs.GraphDevice` for one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Graphs are replayed on this thread's current device.
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # All graphs share scratch cache: they never run at the same time, and what must outlive a replay is
        # copied out of it by the pass itself.
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once, capture a graph and return what replays it. Raises `MemoryError`."""
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        with memory_errors():
            try:
                self._stream.wait_stream(here)
                # Libraries allocate at their first call, which must not be recorded.
                with torch.cuda.stream(self._stream):
                    run()
                self._record(graph, run)
            finally:
                # `torch.cuda.graph` leaves its stream current if the capture fails.
                torch.cuda.set_stream(here)
                here.wait_stream(self._stream)
        return graph.replay

    def _record(self, graph: torch.cuda.CUDAGraph, run: Callable[[], None]) -> None:
        failure: Exception | None = None
        # Other threads of the process may use CUDA meanwhile.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with capture:
                try:
                    run()
                except Exception as error:
                    failure = error
                    raise
        except Exception:
            # The end of a failed capture raises an error of its own, which would hide the reason.
            if failure is not None:
                raise failure from None
            raise

    def fetch(self, tensor: torch.Tensor, *, sleeps: bool = False) -> _PendingHostCopy:
        """Start to copy the tensor to the host."""
        return _PendingHostCopy(tensor, sleeps=sleeps)

    def has_room(self) -> bool:
        """Return whether another graph leaves the reserve free."""
        return free_bytes(self._device) > _RESERVE_BYTES


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device. Memory that torch holds without using it counts as free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def kernel(device: torch.device, like: LayerKV, heads: int) -> Kernel:
    """Return the attention kernel for captured passes on this device.

    Flash attention, if this device, system and version of torch have it and if it agrees with plain
    operations for these heads: it reads only the entries that are needed and copies nothing. Otherwise plain
    operations. Logs a warning if flash attention is missing where it should be available.

    Args:
        device: the device.
        like: keys and values of one layer in a slot.
        heads: number of query heads.
    """
    try:
        difference = max(_difference(device, like, heads, width) for width in (1, 8, 32))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        expected = like[0].dtype != torch.float32 and torch.cuda.get_device_capability(device) >= _FLASH
        level = logging.WARNING if expected else logging.INFO
        name = torch.cuda.get_device_name(device)
        why = str(error).strip().split("\n")[0]
        _LOG.log(level, "flash attention is not available on %s, so attention is slower: %s", name, why)
        return packed_kernel
    if not difference < 0.03:  # of bf16 values of about 1; NaN is no agreement either
        _LOG.warning(
            "flash attention differs by %.2g from plain attention on this device and is not used", difference
        )
        return packed_kernel
    return flash_kernel


def _difference(device: torch.device, like: LayerKV, heads: int, width: int) -> float:
    """Return the largest difference of the two kernels on random values, two rows in slots 2 and 0."""
    # Drawn on the host, so that every device gets the same.
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, like[0].dtype)

    cache = FixedKVCache([like], num_slots=3, capacity=256)
    for tensor in cache.layers[0]:
        tensor.copy_(random(*tensor.shape))
    slots, starts = torch.tensor([[2, 0], [150, 31]], device=device)
    shape = GraphShape(rows=2, width=width, keys=256)
    query = random(1, heads, 2 * width, like[0].shape[-1])
    outputs = [
        attend(FixedShapePast(cache, slots, starts, shape, attend), query, cache.layers[0], None, window)
        for attend in (flash_kernel, packed_kernel)
        for window in (None, 64)
    ]
    return max(float((outputs[i] - outputs[i + 2]).abs().max()) for i in range(2))

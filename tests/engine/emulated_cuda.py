"""A CUDA device emulated on CPU tensors, so that the code for GPUs runs where there is none.

`emulated()` replaces functions of `torch.cuda`, and nothing of midfill: `device="cuda:0"` loads, captures and
replays through the real classes. Tensors are on the CPU; what differs from a CPU is emulated:

- Capture executes nothing: operations are recorded with their tensors, what they wrote to older tensors is
  undone at the end, and what they allocated is filled with NaN. Reading a value on the host is an error.
- A replay runs the recorded operations on the very same tensors, with the Python numbers of the capture.
  Afterwards all that they allocated is filled with NaN again: other graphs share that memory.
- The stream runs late: replays and copies that do not block wait until an event is waited for, or until any
  other operation needs a tensor.

So a host value in a graph, a result that was not copied out, or an upload that overtakes a launch gives wrong
tokens. Not emulated: kernels, several streams at a time, the allocator, timing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU = torch.device("cpu")
GIGABYTE = 1 << 30
FLASH = torch.ops.aten._flash_attention_forward.default
BMM_WITH_DTYPE = torch.ops.aten.bmm.dtype
HOST_READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique"}
RANDOM = {"normal_", "uniform_", "bernoulli_", "randn", "rand", "random_"}
WITHOUT_VALUES = {
    "detach",
    "view",
    "select",
    "slice",
    "unsqueeze",
    "squeeze",
    "alias",
    "transpose",
    "expand",
    "t",
}
# `tolist` of a tensor on the host, which may come too early: it does not wait for the device.
WITHOUT_VALUES |= {"resolve_conj", "resolve_neg"}
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


class EmulatedCuda:
    """The state of the emulated device.

    Attributes:
        free_bytes: free memory; a larger tensor does not fit.
        flash: dtypes that flash attention supports; none where a card has no flash attention.
        broken: a kernel has accessed memory that it must not; as on a device, all that follows fails.
        stats: how often something happened.
    """

    def __init__(self, flash):
        self.free_bytes = 8 * GIGABYTE
        self.total_bytes = 16 * GIGABYTE
        self.flash = flash
        self.broken = False
        self.stats = Counter()
        self.queue = deque()
        self.num_queued = self.num_done = 0
        self.local = _Local()
        self._lock = threading.RLock()

    def enqueue(self, work):
        self.check()
        with self._lock:
            self.queue.append(work)
            self.num_queued += 1
            self.stats["longest queue"] = max(self.stats["longest queue"], len(self.queue))

    def run_until(self, number):
        """Run what was queued first; returns with at least `number` done."""
        with self._lock, self.executing(), _without_modes(), torch.inference_mode():
            while self.queue and self.num_done < number:
                work = self.queue.popleft()
                self.num_done += 1
                work()

    def synchronize(self, *_device):
        self.check()
        self.run_until(self.num_queued)

    @contextlib.contextmanager
    def executing(self):
        """What runs in here is the device's own work."""
        before, self.local.executes = self.local.executes, True
        try:
            yield
        finally:
            self.local.executes = before

    def check(self):
        if self.broken:
            raise torch.AcceleratorError(ILLEGAL_ACCESS)

    def run(self, function, args, kwargs):
        """An operation, flash attention included, which a CPU does not have."""
        if function is FLASH:
            result = self._flash(*args, **kwargs)
            self.stats["flash"] += 1
        elif function is BMM_WITH_DTYPE:
            left, right, dtype = args
            result = torch.bmm(left.to(dtype), right.to(dtype))
        else:
            result = function(*args, **kwargs)
        if self.local.executes and self.local.recording is None:
            return result  # a replay, which allocates nothing
        for tensor in _tensors(result):
            if tensor.nbytes > self.free_bytes and not tensor.is_meta:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tensor.nbytes} bytes.")
        return result

    def _flash(
        self,
        query,
        key,
        value,
        first_queries,
        first_keys,
        max_queries,
        max_keys,
        dropout,
        is_causal,
        debug,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
    ):
        """The rules of FlashAttention 2: the last query of a sequence is at its last key."""
        if query.dtype not in self.flash:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if self.local.recording is not None:  # nothing is computed, and there are no values to compute with
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
            return output, *(torch.empty(0) for _ in range(4))
        assert {tensor.dtype for tensor in (first_queries, first_keys, seqused_k)} == {torch.int32}
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert dropout == 0
        assert not debug
        window = [-1 if size is None else size for size in (window_size_left, window_size_right)]
        left, right = window[0], 0 if is_causal else window[1]
        rows = first_queries.shape[0] - 1
        num_queries = len(query) // rows
        assert first_queries.tolist() == list(range(0, len(query) + 1, num_queries)), "rows of equal length"
        assert num_queries <= max_queries
        ends = first_keys[:-1] + seqused_k
        assert int(seqused_k.max()) <= max_keys
        assert int(ends.max()) <= len(key)
        keys = torch.arange(int(seqused_k.max()))
        index = (first_keys[:-1, None] + keys).clamp(max=len(key) - 1)
        queries = torch.arange(num_queries) + seqused_k[:, None] - num_queries
        seen = (keys < seqused_k[:, None])[:, None].expand(rows, num_queries, len(keys))
        if right >= 0:
            seen = seen & (keys <= queries[..., None] + right)
        if left >= 0:
            seen = seen & (keys >= queries[..., None] - left)
        output = torch.nn.functional.scaled_dot_product_attention(
            query.unflatten(0, (rows, num_queries)).transpose(1, 2),
            *(tensor[index].transpose(1, 2) for tensor in (key, value)),
            attn_mask=seen[:, None],
            scale=scale,
            enable_gqa=True,
        )
        return output.transpose(1, 2).flatten(0, 1).contiguous(), *(torch.empty(0) for _ in range(4))


def _tensors(result):
    """The tensors of an operation's result."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for value in result for tensor in _tensors(value)]
    return []


@contextlib.contextmanager
def _without_modes():
    """The device's own work: quick, and not emulated again."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class _Plain(threading.local):
    active = False


_PLAIN = _Plain()


@contextlib.contextmanager
def not_emulated():
    """Plain torch on the CPU in this thread: what a test compares with."""
    before, _PLAIN.active = _PLAIN.active, True
    try:
        yield
    finally:
        _PLAIN.active = before


class _Local(threading.local):
    executes = False
    recording = None
    stream = None
    uses_device = False


class _OnTheCpu(TorchFunctionMode):
    """Put on the CPU what is asked for on the device; delay copies that do not block."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _PLAIN.active:
            return function(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = self._mapped(kwargs["device"])
        args = [self._mapped(value) if isinstance(value, torch.device) else value for value in args]
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str):
            args[1] = self._mapped(args[1])
        if function is torch.Tensor.copy_ and kwargs.pop("non_blocking", False):
            target, source = args
            assert self.cuda.local.recording is None, "a copy between host and device cannot be captured"
            self.cuda.enqueue(lambda: torch.ops.aten.copy_(target, source))
            return target
        return function(*args, **kwargs)

    def _mapped(self, device):
        if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
            self.cuda.check()
            return CPU
        return device


class _InOrder(TorchDispatchMode):
    """Any operation comes after what is queued."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        cuda = self.cuda
        if _PLAIN.active:
            return function(*args, **(kwargs or {}))
        if cuda.local.uses_device:
            cuda.check()
        if cuda.queue and not cuda.local.executes and function.overloadpacket.__name__ not in WITHOUT_VALUES:
            cuda.run_until(cuda.num_queued)
        return cuda.run(function, args, kwargs or {})


class _Recording(TorchDispatchMode):
    """The operations of a captured pass."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda
        self.operations = []
        self.before = {}  # storages that are older than the capture, and what was in them
        self.fresh = {}  # a tensor of each storage that the capture has allocated
        self.kept = []
        self.invalid = False

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in HOST_READS or name in RANDOM:
            self.invalid = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
        inputs = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        written = _written_by(function, args, kwargs)
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.fresh and storage._cdata not in self.before:
                self.before[storage._cdata] = (storage, storage.clone())
        try:
            result = self.cuda.run(function, args, kwargs)
        except Exception:
            self.invalid = True
            raise
        outputs = _tensors(result)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_new = [tensor.untyped_storage()._cdata not in known for tensor in outputs]
        for tensor, new in zip(outputs, is_new, strict=True):
            if new:
                self.fresh[tensor.untyped_storage()._cdata] = tensor
        self.kept += [*inputs, *outputs]  # no address is used twice
        if written or any(is_new):
            self.operations.append((function, args, kwargs, outputs, is_new))
        return result

    def end(self):
        with self.cuda.executing(), _without_modes(), torch.inference_mode():
            for storage, content in self.before.values():
                storage.copy_(content)
            self.before.clear()
            self.poison()

    def replay(self):
        for function, args, kwargs, outputs, is_new in self.operations:
            result = self.cuda.run(function, args, kwargs)
            found = _tensors(result)
            for old, value, new in zip(outputs, found, is_new, strict=True):
                if new:
                    torch.ops.aten.copy_(old, value)
        self.poison()

    def poison(self):
        for tensor in self.fresh.values():
            if tensor.dtype.is_floating_point:
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.bool:
                tensor.fill_(True)
            elif tensor.numel():
                tensor.fill_(torch.iinfo(tensor.dtype).min // 2)


def _written_by(function, args, kwargs):
    arguments = function._schema.arguments
    named = {argument.name: argument for argument in arguments}
    pairs = [*zip(arguments, args, strict=False), *((named[name], value) for name, value in kwargs.items())]
    return [
        value
        for argument, value in pairs
        if argument.alias_info is not None and argument.alias_info.is_write and torch.is_tensor(value)
    ]


def _classes(cuda):
    """torch.cuda's classes for this device."""

    class Stream:
        def __init__(self, *_args):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

    main = Stream()

    @contextlib.contextmanager
    def stream(wanted):
        before, cuda.local.stream = cuda.local.stream, wanted
        try:
            yield
        finally:
            cuda.local.stream = before

    def set_stream(wanted):
        cuda.local.stream = wanted

    class Event:
        def __init__(self, *, enable_timing=False, blocking=False):
            self.number, self.blocking, self.time_s = None, blocking, None
            cuda.stats["blocking events"] += blocking

        def record(self, *_stream):
            assert cuda.local.recording is None, "events of a capture are part of the graph"

            def note():
                self.time_s = time.perf_counter()

            cuda.enqueue(note)
            self.number = cuda.num_queued

        def synchronize(self):
            cuda.check()
            cuda.run_until(self.number)
            cuda.stats["waits"] += 1

        def query(self):
            return cuda.num_done >= self.number

        def elapsed_time(self, end):
            return (end.time_s - self.time_s) * 1000

    class CUDAGraph:
        recording = None

        def capture_begin(self, *_pool, **_options):
            cuda.check()
            assert not cuda.queue, "torch.cuda.graph synchronizes first"
            assert cuda.local.stream is not None, "capture needs a stream that is not the default"
            cuda.local.executes = True
            cuda.local.recording = _Recording(cuda)
            cuda.local.recording.__enter__()

        def capture_end(self):
            recording, cuda.local.recording = cuda.local.recording, None
            recording.__exit__(None, None, None)
            cuda.local.executes = False
            recording.end()
            if recording.invalid:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.recording = recording
            cuda.stats["captures"] += 1

        def replay(self):
            assert self.recording is not None
            cuda.stats["replays"] += 1
            cuda.enqueue(self.recording.replay)

    return {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "stream": stream,
        "set_stream": set_stream,
        "current_stream": lambda *_device: cuda.local.stream or main,
        "default_stream": lambda *_device: main,
    }


def _functions(cuda):
    """torch.cuda's functions for this device."""

    def set_device(_device):
        cuda.check()
        cuda.local.uses_device = True

    def empty_cache():
        cuda.check()
        assert cuda.local.recording is None, "memory cannot be freed during a capture"

    properties = SimpleNamespace(
        name="emulated", major=9, minor=0, total_memory=cuda.total_bytes, multi_processor_count=132
    )
    return {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_args, **_kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": set_device,
        "get_device_name": lambda *_device: "emulated",
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "get_device_capability": lambda *_device: (9, 0),
        "get_device_properties": lambda *_device: properties,
        "mem_get_info": lambda *_device: (cuda.free_bytes, cuda.total_bytes),
        **{
            name: lambda *_device: 0
            for name in (
                "memory_allocated",
                "memory_reserved",
                "max_memory_allocated",
                "max_memory_reserved",
                "reset_peak_memory_stats",
            )
        },
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": cuda.synchronize,
        "empty_cache": empty_cache,
    }


@contextlib.contextmanager
def emulated(*, flash=(torch.float32, torch.bfloat16, torch.float16)):
    """Emulate a device, in this thread and in those that are started meanwhile.

    Flash attention supports float32 here, which no card does, so that tokens can be compared exactly.
    """
    cuda = EmulatedCuda(flash)
    run_thread = threading.Thread.run

    def run(thread):
        with _OnTheCpu(cuda), _InOrder(cuda):
            run_thread(thread)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**_classes(cuda), **_functions(cuda)}.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(threading.Thread, "run", run)
        with _OnTheCpu(cuda), _InOrder(cuda):
            yield cuda

"""Tensors without values on "cuda:0", on a CPU build of torch: the kernels of a pass, and its host reads.

Shapes, types and devices are real, memory and values are not there, so that the largest model fits. A CPU
build cannot index a tensor of that device or build one from Python values; `FakeCuda` writes these as the
operations that they amount to.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
HOST_READS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique"}
# Operations that launch nothing.
FREE = {
    *(
        "view",
        "transpose",
        "slice",
        "split",
        "expand",
        "unsqueeze",
        "select",
        "permute",
        "alias",
        "detach",
        "t",
    ),
    *(
        "as_strided",
        "_unsafe_view",
        "squeeze",
        "unflatten",
        "split_with_sizes",
        "lift_fresh",
        "view_as",
        "chunk",
    ),
    *("narrow", "unbind", "expand_as", "empty", "new_empty", "empty_like", "empty_strided", "_reshape_alias"),
    *(
        "dropout",
        "sym_size",
        "_has_same_storage_numel",
        "is_pinned",
        "_assert_tensor_metadata",
        "dim",
        "size",
    ),
    *("resolve_conj", "resolve_neg", "device"),
}
# These copy only if the strides or the type ask for it.
MAYBE_FREE = {"reshape", "contiguous", "to", "_to_copy", "flatten", "clone"}


class FakeCuda:
    """Modes in which tensors are fake, and a record of what ran.

    Attributes:
        kernels: names of the operations that launch a kernel, in order.
        faults: reads on the host, and operations on tensors of two devices.
    """

    def __init__(self):
        self.kernels = []
        self.faults = []
        self._modes = []

    def __enter__(self):
        self._modes = [FakeTensorMode(), _Indexing(), torch.inference_mode(), _Record(self)]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def run(self, work):
        """Return the kernels and the faults of `work`."""
        self.kernels, self.faults = [], []
        work()
        return Counter(self.kernels), list(self.faults)


class _Record(TorchDispatchMode):
    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        outputs = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        # A number is one of any device.
        devices = {tensor.device.type for tensor in [*inputs, *outputs] if tensor.ndim or tensor.is_cuda}
        if name in HOST_READS and "cuda" in devices:
            self.cuda.faults.append(f"{name} reads on the host")
        if len(devices) > 1:
            self.cuda.faults.append(f"{name} on {sorted(devices)}")
        same_memory = name in MAYBE_FREE and (
            outputs[0].untyped_storage()._cdata == inputs[0].untyped_storage()._cdata
        )
        if "cuda" in devices and name not in FREE and not same_memory:
            self.cuda.kernels.append(name)
        return result


class _Indexing(TorchFunctionMode):
    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.__getitem__:
            view, indexes = _parts(*args)
            return view if indexes is None else aten.index(view, indexes)
        if function is torch.Tensor.__setitem__:
            view, indexes = _parts(*args[:2])
            value = args[2]
            if not isinstance(value, torch.Tensor):
                value = torch.full((), value, dtype=view.dtype, device=view.device)
            return aten.copy_(view, value) if indexes is None else aten.index_put_(view, indexes, value)
        if function is torch.tensor:
            # An upload, which is no kernel.
            values = torch.utils._pytree.tree_leaves(args[0])
            default = torch.float32 if isinstance(values[0], float) else torch.int64
            shape, inner = [], args[0]
            while isinstance(inner, (list, tuple)):
                shape.append(len(inner))
                inner = inner[0]
            return torch.empty(shape, dtype=kwargs.get("dtype") or default, device=kwargs.get("device"))
        if function is torch.Tensor.copy_:
            return aten.copy_(args[0], args[1])
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "not linked" not in str(error):
                raise
            if function.__name__ == "to":
                dtype = next((value for value in args[1:] if isinstance(value, torch.dtype)), None)
                device = next((value for value in args[1:] if isinstance(value, torch.device)), None)
                return aten._to_copy(args[0], dtype=dtype, device=device)
            return getattr(aten, function.__name__)(*args, **kwargs)


def _parts(tensor, key):
    """Return the view that `tensor[key]` is of, and the tensors that index it, or None."""
    key = key if isinstance(key, tuple) else (key,)
    dim, tensors = 0, {}
    for part in key:
        if part is Ellipsis:
            dim += tensor.dim() - sum(each is not None and each is not Ellipsis for each in key)
        elif part is None:
            tensor = aten.unsqueeze(tensor, dim)
            dim += 1
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        elif isinstance(part, torch.Tensor):
            if not part.ndim and part.dtype != torch.bool:
                part.item()  # as torch does
            tensors[dim] = part
            dim += 1
        else:
            tensor = aten.select(tensor, dim, int(part))
    return tensor, [tensors.get(number) for number in range(max(tensors) + 1)] if tensors else None

"""Layers with 8-bit weights and, for linear ones, 8-bit activations, for the CPU.

Weights are symmetric int8 per output channel, packed for fbgemm; activations are quantized on the fly. fbgemm
knows only one activation scale per call, and one outlier row (the first token of a prompt) then spoils all
others: 80 % top-1 agreement with fp32. So each row is first scaled to the same maximum and its result scaled
back, which gives 93 %. The experiments list the alternatives that were measured.

Knows weights, not models. Runs on the engine thread only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn

_CPU = torch.device("cpu")

_SMALLEST = 1e-12
"""Replaces the maximum of an all-zero row, to avoid a division by zero."""


def supported() -> bool:
    """Return whether this CPU and this build of torch have the fbgemm kernels."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def _needs_reduced_range() -> bool:
    """Return whether 8-bit products can overflow.

    Without AVX-512 VNNI fbgemm adds pairs of u8 * s8 products in 16 bits, which saturate; with activations of
    7 bits they cannot.
    """
    has_vnni: Any = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return not has_vnni()


class Int8Weight:
    """A weight (out x in, or vocabulary x width) in 8 bits: row ~ values * scale.

    Attributes:
        values: int8 rows.
        scales: one for each row, fp64.
    """

    def __init__(self, shape: torch.Size, blocks: Iterable[torch.Tensor]) -> None:
        """Quantize a weight that comes in blocks of consecutive rows, of any float type.

        Raises:
            ValueError: a value is not finite.
        """
        self.values, self.scales = _round(shape, blocks)

    @cached_property
    def packed(self) -> Any:
        """The kernel's own form. Packing takes three times as long as the rounding, on one thread."""
        zeros = torch.zeros(len(self.scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch says that quantised tensors will be removed and names torchao instead. Ours lives for
            # this call only, the packed form is not deprecated, and torchao has no x86 kernel as fast.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            quantised = torch._make_per_channel_quantized_tensor(self.values, self.scales, zeros, 0)  # noqa: SLF001 - no public one takes int8
        return torch.ops.quantized.linear_prepack(quantised, None)


class Int8Linear(nn.Linear):
    """A linear layer whose `weight` is an empty placeholder: the real one is packed for the kernel.

    It remains an `nn.Linear` so that PEFT puts an unmerged LoRA around it.
    """

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        num_out, num_in = weight.values.shape
        super().__init__(num_in, num_out, bias=False, device="meta")
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self._packed = weight.packed
        self._reduce_range = _needs_reduced_range()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product in fp32."""
        if input.numel() == self.in_features:
            # One row: the scale per call is the scale per row.
            output = torch.ops.quantized.linear_dynamic(input, self._packed, self._reduce_range)
        else:
            row_max = input.abs().amax(dim=-1, keepdim=True).clamp_min_(_SMALLEST)
            output = torch.ops.quantized.linear_dynamic(input / row_max, self._packed, self._reduce_range)
            output.mul_(row_max)
        result: torch.Tensor = output if self.bias is None else output.add_(self.bias)
        return result


class Int8Embedding(nn.Embedding):
    """An embedding with 8-bit rows; the rows that are looked up are converted to the activations' type.

    Its rounding error is far below that of the activations after it. In 16 bits it would take a quarter of a
    small model's memory.
    """

    def __init__(
        self,
        weight: Int8Weight,
        padding_idx: int | None,
        device: torch.device = _CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        num_rows, width = weight.values.shape
        super().__init__(num_rows, width, padding_idx, device="meta")
        self.weight = nn.Parameter(weight.values.to(device), requires_grad=False)
        # In float32 before they go to the device: some have no float64.
        self._scales = weight.scales.float()[:, None].to(device, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows in the activations' type."""
        return self.weight[input] * self._scales[input]


def _round(shape: torch.Size, blocks: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 rows and one scale for each (fp64), so that row ~ values * scale.

    No complete fp32 copy exists at any time.
    """
    values = torch.empty(shape, dtype=torch.int8)
    scales = torch.empty(shape[0], dtype=torch.float64)
    start = 0
    for block in blocks:
        wide = block.float()
        low, high = torch.aminmax(wide, dim=1)
        row_max = torch.maximum(low.neg_(), high)
        if not bool(row_max.isfinite().all()):
            raise ValueError("the weight has values that are not finite")
        scale = row_max.clamp_min_(_SMALLEST).div_(127)
        end = start + len(block)
        scales[start:end] = scale
        # Not in place: if the file holds fp32, `wide` is a view of it.
        values[start:end] = torch.div(wide, scale[:, None]).round_()
        start = end
    return values, scales
